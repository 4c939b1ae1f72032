"""Qwen2-Audio, Audio Flamingo 3 and Qwen2.5-Omni against transformers: features, logits, gradients, answers, exports.

Clips are waveforms: each side makes its own log-mel of them.
"""

import dataclasses
import json
import re

import numpy
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig, InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE, IMAGE, Batch
from avlm.models.log_mel import windows
from avlm.models.whisper import sinusoids
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_audio_families_keys import FAMILIES, IDS, config_of
from tests.families.test_qwen_vl import SIZES, VIDEO, frames, logits_of, pixel_values
from tests.models.handmade import adapted, loaded, save

CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
# Seconds of the clips of a prompt. Windows are of 1 s, those of Qwen2.5-Omni of 0.2 s; a row of a tower takes 0.02 s.
SECONDS = {"qwen2_audio": [0.1, 0.4975, 1.0], "audioflamingo3": [2.635], "qwen2_5_omni": [0.1, 0.73, 1.2]}
HEARD, SEEN, FILMED = 95, 92, 93  # ids of placeholders


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(name of the family, transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = fresh(request.param)
    save(theirs, folder)
    return request.param, theirs, folder, read_config(folder)


def fresh(name: str) -> transformers.PreTrainedModel:
    theirs = CLASSES[name](config_of(name))
    if name != "qwen2_5_omni":  # its table would be random
        table = theirs.model.audio_tower.embed_positions.weight
        table.data = sinusoids(torch.arange(len(table)), table.shape[1])
    return theirs


def noise(seconds: float) -> Tensor:
    """float32 (samples,), louder and louder, so that windows have maxima of their own."""
    count = round(16_000 * seconds)
    return torch.randn(count) * torch.linspace(0.001, 0.3, count)


def log_mel_of(clips: list[Tensor], name: str) -> dict[str, Tensor]:
    """Of a family's feature extractor and processor."""
    second = 16_000
    if name == "audioflamingo3":  # whose processor cuts clips into windows
        clips = [part for clip in clips for part in clip.split(second)]
    length = 1 if name != "qwen2_5_omni" else 2
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=length)
    made = extractor(
        [numpy.asarray(clip) for clip in clips],
        sampling_rate=second,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = "input_features_mask" if name == "audioflamingo3" else "feature_attention_mask"
    return {"input_features": made["input_features"], mask: made["attention_mask"]}


@dataclasses.dataclass
class Prompt:
    """The same prompt for them and for us."""

    inputs: dict[str, Tensor]  # of transformers' forward
    sample: EncodedSample
    batch: Batch


def prompt(name: str, theirs, config: ModelConfig) -> Prompt:
    clips = [noise(seconds) for seconds in SECONDS[name]]
    items = [windows(clip, config.audio) for clip in clips]
    before, after = ([], []) if name == "audioflamingo3" else ([94], [96])
    ids: list[int] = []
    for clip in clips:
        frames_of_clip = -(-len(clip) // 160)
        ids += [5, *before, *[HEARD] * (((frames_of_clip + 1) // 2) // 2), *after, 6]
    inputs = log_mel_of(clips, name)
    media = {"audio": [window for of_clip in items for window in of_clip]}
    if name == "qwen2_5_omni":
        images = [frames(*size, config) for size in SIZES]
        video = [frames(*VIDEO[1:], config) for _ in range(VIDEO[0])]
        seen = [t for lines, columns in SIZES for t in (91, *[SEEN] * (lines * columns), 97, 7)]
        ids = [*seen, *ids, 91, *[FILMED] * (VIDEO[0] * VIDEO[1] * VIDEO[2]), 97]
        media["image"] = [*images, *video]
        inputs |= {
            "pixel_values": pixel_values(images, config),
            "image_grid_thw": torch.tensor([(1, 2 * lines, 2 * columns) for lines, columns in SIZES]),
            "pixel_values_videos": pixel_values(video, config),
            "video_grid_thw": torch.tensor([(VIDEO[0], 2 * VIDEO[1], 2 * VIDEO[2])]),
            "video_second_per_grid": torch.tensor([1.0]),
        }
    ids += [7, 8, 9, 10, 11]
    ids_T = torch.tensor(ids)
    inputs |= {"input_ids": ids_T[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    position_3T = None
    if name == "qwen2_5_omni":
        position_3T = theirs.get_rope_index(
            ids_T[None],
            inputs["image_grid_thw"],
            inputs["video_grid_thw"],
            inputs["attention_mask"],
            audio_seqlens=inputs["feature_attention_mask"].sum(-1),
            second_per_grids=inputs["video_second_per_grid"],
        )[0][:, 0]
    token_T = torch.where(ids_T == HEARD, AUDIO, ids_T)
    token_T = torch.where((ids_T == SEEN) | (ids_T == FILMED), IMAGE, token_T)
    target_T = torch.cat([ids_T[1:], torch.tensor([IGNORE])])
    target_T[torch.cat([token_T[1:] < 0, torch.tensor([False])])] = IGNORE
    sample = EncodedSample("a", "mixed", token_T, target_T, media, position_3T)
    return Prompt(inputs, sample, pack([sample], len(ids), config))


def features_of_transformers(name: str, theirs, inputs: dict[str, Tensor]) -> Tensor:
    """Of the clips alone, without what stands behind them."""
    if name == "audioflamingo3":
        return theirs.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    lengths = inputs["feature_attention_mask"].sum(-1)
    if name == "qwen2_5_omni":
        mels = inputs["input_features"].permute(0, 2, 1)[inputs["feature_attention_mask"].bool()].T
        return theirs.audio_tower(mels, feature_lens=lengths, aftercnn_lens=None).last_hidden_state
    counts = ((lengths - 1) // 2 + 1 - 2) // 2 + 1
    own = []
    for features, count, length in zip(inputs["input_features"], counts, lengths, strict=True):
        mask = (torch.arange(features.shape[1] // 2) < (length - 1) // 2 + 1)[None, None, None]
        rows = theirs.model.audio_tower(features[None], attention_mask=mask).last_hidden_state
        own.append(theirs.model.multi_modal_projector(rows)[0, :count])
    return torch.cat(own)


@torch.no_grad()
def test_features_and_logits_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    media = ask.batch.audio
    into = torch.zeros(len(ask.batch.token_T), config.decoder.hidden_size)
    features, _ = ours.audio_projector(into, media, ours.audio(media))
    close(features[media.rows], features_of_transformers(name, theirs, ask.inputs), f"{name} features")
    close(logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0], f"{name} logits")


def test_gradients_of_the_loss_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    ours(ask.batch)[0].backward()
    logits = theirs(**ask.inputs).logits[0]
    cross_entropy(logits[ask.batch.target_rows_R], ask.batch.target_R, reduction="sum").backward()
    all_gradients_close(ours, theirs, name)
    theirs.zero_grad()


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    """With audio, and with Qwen2.5-Omni images and a video in the same prompt."""
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    [answer] = generate(ours, [ask.sample], stop_ids=[], max_new_tokens=12)
    out = theirs.generate(**ask.inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert answer.token_ids == out[0, ask.inputs["input_ids"].shape[1] :].tolist()
    note(f"{name} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "audio.*"]], ids=["plain", "with adapters"])
@torch.no_grad()
def test_an_export_is_read_back_by_transformers_with_equal_logits(case, targets, tmp_path):
    name, before, folder, config = case
    ours = adapted(config, folder, targets)
    export(ours.config, ours.state_dict(), tmp_path / "out", name)
    theirs, report = CLASSES[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ask = prompt(name, before, config)
    ids = ask.inputs["input_ids"]  # without a tokenizer placeholders get the first free ids
    for old, key in {HEARD: "audio_token_id", SEEN: "image_token_id", FILMED: "video_token_id"}.items():
        ids[ids == old] = getattr(theirs.config, key, old)
    theirs.config.update({"vision_start_token_id": 91, "audio_start_token_id": 94})  # the prompt has these
    logits = theirs(**ask.inputs).logits[0]
    assert logits.shape[1] == config.decoder.vocab_size + len(FAMILIES[name].MEDIA_TOKENS)
    close(logits_of(ours, ask.batch), logits[:, : config.decoder.vocab_size], f"{name} export")
    again = read_config(tmp_path / "out")
    assert dataclasses.replace(again, decoder=config.decoder) == config
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    old = load_file(folder / "model.safetensors").keys()
    assert names == {key.replace("language_model.model.model.", "language_model.model.") for key in old}


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    """transformers writes what the Hub's folders have; other programs write the names of its modules."""
    _, theirs, folder, config = case
    one = loaded(config, all=folder)
    state = dict(theirs.state_dict())
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    for other in (loaded(config, all=tmp_path), loaded(config, all=tmp_path / "weights.pt")):
        assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """The folder of a whole Qwen2.5-Omni: its thinker, and some of what speaks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    save(fresh("qwen2_5_omni"), folder)
    state = {f"thinker.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    more = {"talker.model.embed_tokens.weight", "talker.codec_head.weight", "token2wav.code2wav_dit_model.proj.bias"}
    save_file({**state, **{key: torch.rand(2) for key in more}}, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "thinker_config": keys, "enable_audio_output": False}
    (folder / "config.json").write_text(json.dumps(whole))
    torch.save({"Ethan": torch.rand(2)}, folder / "spk_dict.pt")
    return folder


def test_of_a_whole_qwen_omni_what_speaks_is_left_out_by_name(omni):
    config = read_config(omni)
    [report] = load_weights(AVLM(config), InitFrom(all=str(omni)))
    speaking = {"talker.*, which speaks": 2, "codec of": 1, "two embeddings .* never read": 1}
    for reason, count in speaking.items():
        assert re.search(rf"{count} \([^)]*{reason}", str(report))
    assert report.loaded + 4 == report.total and not report.initialised
    alone = ModelConfig(decoder=config.decoder, audio=config.audio, audio_projector=config.audio_projector)
    [report] = load_weights(AVLM(alone), InitFrom(audio=str(omni)))  # a tower of it, too
    assert all(each.startswith("audio.") for each in report.names) and report.skipped["other modules"] > 0


@torch.no_grad()
def test_a_thinker_goes_back_into_the_whole_model_that_it_came_from(omni, tmp_path):
    config = read_config(omni)
    ours = loaded(config, all=omni)
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(89)}, unk_token="w0"))
    ids = dict(zip(IDS["qwen2_5_omni"], FAMILIES["qwen2_5_omni"].MEDIA_TOKENS, strict=True))
    words.add_special_tokens(["<|im_start|>", "<|im_end|>", *(ids[number] for number in sorted(ids))])
    (tmp_path / "tokenizer").mkdir()
    words.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    data = DataConfig(train="x", template="chatml", tokenizer=str(tmp_path / "tokenizer"))
    out = tmp_path / "out"
    export(config, ours.state_dict(), out, "qwen2_5_omni", data=data, whole=str(omni), dtype=torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (omni, out))
    assert before.keys() == after.keys() and (out / "spk_dict.pt").read_bytes() == (omni / "spk_dict.pt").read_bytes()
    kept = [name for name in before if before[name].equal(after[name])]
    assert sorted(name.split(".")[0] for name in kept) == ["talker", "talker", "thinker", "token2wav"]
    assert "thinker.audio_tower.audio_bos_eos_token.weight" in kept
    model = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(out)
    ask = prompt("qwen2_5_omni", model.thinker, config)
    close(logits_of(ours, ask.batch), model.thinker(**ask.inputs).logits[0], "qwen2_5_omni whole")
    assert read_config(out) == config
    other = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, intermediate_size=8))
    with pytest.raises(ValueError, match=r"one of shape \(48, 32\) for thinker.model.layers.0.mlp.gate_proj.weight"):
        export(other, AVLM(other).state_dict(), tmp_path / "b", "qwen2_5_omni", data=data, whole=str(omni))
    with pytest.raises(ValueError, match="--format qwen2_5_omni or qwen3_omni_moe, and the format is qwen2_audio"):
        export(config, ours.state_dict(), tmp_path / "b", "qwen2_audio", whole=str(omni))
    (omni / "spk_dict.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks spk_dict.pt, which transformers reads with the whole model: add it"):
        export(config, {}, tmp_path / "b", "qwen2_5_omni", whole=str(omni))
    (tmp_path / "thinker").mkdir()
    (tmp_path / "thinker" / "config.json").write_text('{"model_type": "qwen2_5_omni_thinker"}')
    with pytest.raises(ValueError, match="is a qwen2_5_omni_thinker, and qwen2_5_omni is a part of qwen2_5_omni"):
        export(config, {}, tmp_path / "b", "qwen2_5_omni", whole=str(tmp_path / "thinker"))
    assert not (tmp_path / "b").exists()
