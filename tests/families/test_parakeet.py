"""Parakeet's encoder against transformers: features, gradients, log-mel, exports."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.audio_utils import mel_filter_bank
from transformers.models.parakeet.feature_extraction_parakeet import ParakeetFeatureExtractor

from avlm.config.model import AudioConfig
from avlm.families import parakeet
from avlm.families.door import hugging_face_name
from avlm.models import log_mel, nemo_mel
from avlm.models.avlm import AVLM
from avlm.weights.export import export
from avlm.weights.folder import read_config
from tests.families.measured import close, gradients_close
from tests.models.handmade import around, build, load_tower, save, windows_of

LENGTHS = (61, 5, 104, 8, 1)  # frames of clips
PLAIN = {"attention_bias": False, "convolution_bias": False, "scale_input": False}


def config_of(**changes) -> transformers.ParakeetEncoderConfig:
    keys = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_mel_bins": 16, "subsampling_conv_channels": 6, "conv_kernel_size": 5},
    }
    return transformers.ParakeetEncoderConfig(**keys | changes)


def saved(folder: Path, **changes) -> transformers.ParakeetEncoder:
    """A model whose batch norms have seen something, saved."""
    torch.manual_seed(0)
    theirs = transformers.ParakeetEncoder(config_of(**changes))
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand_like(buffer)
    save(theirs, folder)
    return theirs


def features_of(theirs: torch.nn.Module, clips: list[Tensor]) -> Tensor:
    """Of clips (M, W), padded into one batch."""
    longest = max(clip.shape[1] for clip in clips)
    padded = torch.stack([torch.nn.functional.pad(clip, (0, longest - clip.shape[1])) for clip in clips])
    is_clip = torch.arange(longest) < torch.tensor([clip.shape[1] for clip in clips])[:, None]
    out = theirs(padded.mT, attention_mask=is_clip)
    return out.last_hidden_state[out.attention_mask.bool()]


def gradients_of(theirs: torch.nn.Module) -> dict[str, Tensor]:
    """By their names; of a batch norm's weight and bias as those of a scale and a shift."""
    found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # weight's = (scale's - mean * shift's) / sqrt(var + eps)
            of_weight = module.weight.grad * (module.running_var + module.eps).sqrt()
            found[f"{name}.weight"] = of_weight + module.running_mean * module.bias.grad
    return found


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["biases", "plain"])
def test_features_and_gradients_equal_those_of_transformers_alone_and_packed(changes, tmp_path):
    theirs = saved(tmp_path, **changes)
    tower, report = load_tower(read_config(tmp_path), tmp_path)
    assert report.skipped == {"counters of batch norms": 2}
    assert len(report.names) == len(list(theirs.parameters()))
    clips = [torch.randn(16, length) for length in LENGTHS]
    packed = tower(windows_of(tower.config, clips))
    close(packed, features_of(theirs, clips), "parakeet features")
    alone = [theirs(clip.T[None]).last_hidden_state[0] for clip in clips]
    close(packed, torch.cat(alone), "parakeet features of each clip")
    for clip, expected in zip(clips, alone):
        close(tower(windows_of(tower.config, [clip])), expected, "parakeet features alone")
    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    (torch.cat(alone) * weights).sum().backward()
    ours = {hugging_face_name(parakeet, "audio", name): p.grad for name, p in tower.named_parameters()}
    gradients_close(ours, gradients_of(theirs), "parakeet")


def test_what_is_exported_is_read_by_transformers_and_by_us(tmp_path):
    theirs = saved(tmp_path / "given")
    name, config = around(read_config(tmp_path / "given"))
    model = AVLM(config)
    assert name == "audio"
    model.audio, _ = load_tower(config.audio, tmp_path / "given")
    written = export(config, model.state_dict(), tmp_path / "out", "parakeet")
    assert written.keys() == theirs.state_dict().keys()
    back, said = transformers.ParakeetEncoder.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.config.to_diff_dict().keys() >= {"num_mel_bins", "subsampling_conv_channels"}
    clips = [torch.randn(16, length) for length in LENGTHS]
    with torch.no_grad():
        close(features_of(back.eval(), clips), features_of(theirs, clips), "parakeet export")
    assert read_config(tmp_path / "out") == config.audio
    again, _ = load_tower(config.audio, tmp_path / "out")
    for (key, ours), first in zip(again.named_parameters(), model.audio.parameters()):
        assert (ours - first).abs().max() <= 1e-6, key
    extractor = ParakeetFeatureExtractor.get_feature_extractor_dict(tmp_path / "out")[0]
    assert (extractor["feature_size"], extractor["win_length"], extractor["n_fft"]) == (16, 400, 512)
    with pytest.raises(ValueError, match=r"parakeet format cannot hold audio\.pool=2, only 1"):
        parakeet.config_json(dataclasses.replace(config.audio, pool=2))


def test_a_batch_norm_that_is_not_whole_is_refused_and_heads_are_left_out(tmp_path):
    keys = {"vocab_size": 10, "pad_token_id": 0, "encoder_config": config_of(num_hidden_layers=1).to_dict()}
    theirs = transformers.ParakeetForCTC(transformers.ParakeetCTCConfig(**keys))
    save(theirs, tmp_path)
    config = read_config(tmp_path)
    _, report = load_tower(config, tmp_path)
    assert report.skipped == {"counters of batch norms": 1, "heads that write text": 2}
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layers.0.conv.norm.running_var"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor encoder\.layers\.0\.conv\.norm\.running_var"):
        load_tower(config, tmp_path)


def test_keys_of_each_class_are_read():
    encoder = transformers.ParakeetEncoderConfig().to_dict()
    expected = AudioConfig(
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 24, "num_heads": 8, "num_mels": 80},
        **{"max_positions": 5000, "block": "conformer", "stem": "depthwise", "stem_width": 256, "mel": "nemo"},
        **{"log_mel": "clip", "edge": "masked", "conv_kernel": 9, "scale_input": True},
    )
    assert parakeet.read(encoder, {}) == parakeet.read({"model_type": "parakeet_encoder"}, {}) == expected
    for name in ("CTC", "RNNT", "TDT"):
        config = getattr(transformers, f"Parakeet{name}Config")(encoder_config=encoder)
        assert parakeet.read(config.to_dict(), {}) == expected
    for key, value in {"hidden_act": "relu", "subsampling_factor": 4, "conv_kernel_size": 8}.items():
        with pytest.raises(ValueError, match=key.removesuffix("_size")):
            parakeet.read({**encoder, key: value}, {})


@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mel_equals_that_of_the_feature_extractor(num_mels):
    """Which makes its filters with a package that is no requirement of ours; these are transformers' own."""
    filters = mel_filter_bank(257, num_mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(nemo_mel._filters(num_mels), torch.from_numpy(filters.T).float(), atol=5e-9, rtol=1e-6)
    extractor = object.__new__(ParakeetFeatureExtractor)
    super(ParakeetFeatureExtractor, extractor).__init__(feature_size=num_mels, sampling_rate=16_000, padding_value=0.0)
    extractor.hop_length, extractor.n_fft, extractor.win_length, extractor.preemphasis = 160, 512, 400, 0.97
    extractor.mel_filters = nemo_mel._filters(num_mels)
    audio = dataclasses.replace(parakeet.read({"model_type": "parakeet_encoder"}, {}), num_mels=num_mels)
    for samples in (1, 159, 320, 479, 16_001, 40_079, 500_000):  # the last in two blocks of frames
        noise = 0.1 * torch.randn(samples)
        click = torch.zeros(samples)
        click[-1] = 0.5
        for clip in (noise, 1e-4 * noise, torch.zeros(samples), click):
            made = extractor(clip.numpy(), sampling_rate=16_000)
            frames = int(made["attention_mask"].sum())
            assert frames == samples // 160
            found = torch.cat([torch.empty(num_mels, 0), *log_mel.windows(clip, audio)], 1)
            torch.testing.assert_close(found, made["input_features"][0, :frames].T, atol=1e-5, rtol=0)
    one = nemo_mel.log_mel(0.1 * torch.randn(200), num_mels)  # NaN there
    assert one.shape == (num_mels, 1) and not one.any()


def test_a_long_clip_is_cut_after_its_log_mel_is_made_or_before():
    audio = dataclasses.replace(parakeet.read({"model_type": "parakeet_encoder"}, {}), max_positions=10)
    clip = torch.randn(200 * 160) * torch.linspace(0.01, 1, 200 * 160)
    cut = log_mel.windows(clip, audio)
    assert [window.shape[1] for window in cut] == [80, 80, 40] == [audio.item_shape(n)[1] for n in (80, 80, 40)]
    assert torch.cat(cut, 1).equal(nemo_mel.log_mel(clip, 80))
    each = log_mel.windows(clip, dataclasses.replace(audio, log_mel="window"))
    assert each[1].equal(nemo_mel.log_mel(clip[80 * 160 : 160 * 160], 80))


def test_zero_clips_give_exactly_zero_gradients():
    tower = build(around(parakeet.read(config_of().to_dict(), {}))[1]).audio
    features = tower(windows_of(tower.config, []))
    assert features.shape == (0, 32)
    features.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())
