"""Export: what transformers and we read back, and how a folder appears."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from avlm.config.decoder import DecoderConfig, RopeScaling
from avlm.config.model import AudioConfig, LoraConfig, ProjectorConfig
from avlm.config.run import DataConfig, InitFrom
from avlm.data.media.audio import mels
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IMAGE
from avlm.storage import model_folder
from avlm.storage.run_folder import read_run
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from avlm.weights.sources import open_checkpoint
from tests.families.measured import close, note
from tests.models.handmade import build, loaded, make_batch, normalised, pixels_of, save
from tests.models.test_avlm import AUDIO_ONLY, DECODER, WHOLE, llava
from tests.parallel.small import MODELS, make_config
from tests.weights.test_sources import write_run


def test_an_exported_avlm_reads_back_exactly(tmp_path):
    for tie in (False, True):
        config = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, tie_embedding=tie))
        model = build(config)
        folder = tmp_path / str(tie)
        export(config, model.state_dict(), folder, data=DataConfig(train="x", template="chatml", system="Be brief."))
        assert read_config(folder) == config
        prompt = json.loads((folder / "config.json").read_text())["data"]
        assert (prompt["template"], prompt["system"]) == ("chatml", "Be brief.") and "train" not in prompt
        again = loaded(config, all=folder)
        assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))
        part = AVLM(config)
        [report] = load_weights(part, InitFrom(audio=str(folder)))
        assert part.audio.conv1.weight.equal(model.audio.conv1.weight)
        assert all(name.startswith("audio.") for name in report.names)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen2 window", "qwen3"])
def test_an_exported_decoder_has_equal_logits_in_transformers(family, tmp_path):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    changes = {
        "llama": {"head_dim": 16},
        "llama3": {"rope_scaling": scaling, "tie_embedding": True},
        "mistral": {"sliding_window": 10},
        "qwen2": {"qkv_bias": True},
        "qwen2 window": {"qkv_bias": True, "sliding_window": 10, "window_layers": [0]},
        "qwen3": {"qk_norm": True, "head_dim": 12},
    }
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    decoder = DecoderConfig(**sizes, num_kv_heads=2, max_position=256, **changes[family])
    config = dataclasses.replace(WHOLE, decoder=decoder)
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "decoder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__.lower() == f"{family.replace('llama3', 'llama').removesuffix(' window')}forcausallm"
    document = torch.randint(61, (100,)).tolist()
    batch = make_batch(config, [document])
    with torch.no_grad():
        x_TD = model.hidden(batch)
        logits = model.decoder.head(model.decoder.norm(x_TD), None)
        close(logits, theirs(torch.tensor([document])).logits[0], "decoder export")
    assert read_config(tmp_path / "out") == decoder


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_exported_llava_has_equal_logits_in_transformers(family, tmp_path):
    vision = dataclasses.replace(WHOLE.vision, num_layers=3, feature_layer=-2)
    if family == "siglip":
        siglip = {"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"}
        vision = dataclasses.replace(vision, **siglip, mean=[0.5] * 3, std=[0.5] * 3, resize="stretch")
    config = dataclasses.replace(WHOLE, vision=vision, audio=None, audio_projector=None)
    config = dataclasses.replace(config, vision_projector=dataclasses.replace(config.vision_projector, downsample=1))
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "llava")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    document = [1, *[IMAGE] * 16, 4, 5, 6]
    pixels = pixels_of(1, 16)
    batch = make_batch(config, [document], pixels)
    ids = [theirs.config.image_token_index if token == IMAGE else token for token in document]
    with torch.no_grad():
        x_TD = model.hidden(batch)
        logits = model.decoder.head(model.decoder.norm(x_TD), None)
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=normalised(pixels, config.vision)).logits[0]
    close(logits, expected[:, :61], "llava export")
    assert expected.shape[1] == 62 and (expected.argmax(-1) != 61).all()  # the image token's row never wins
    back = read_config(tmp_path / "out")
    assert back.vision.num_layers == 2 and back.vision.feature_layer == -1 and back.vision.mean == vision.mean


def test_formats_refuse_what_they_cannot_hold(tmp_path):
    model = build(WHOLE)
    with pytest.raises(ValueError, match="without an audio tower"):
        export(WHOLE, model.state_dict(), tmp_path / "a", "llava")
    odd = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, qk_norm=True, qkv_bias=True))
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        export(odd, build(odd).state_dict(), tmp_path / "b", "decoder")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


VOXTRAL = dataclasses.replace(
    AUDIO_ONLY,
    audio=AudioConfig(
        **{"hidden_size": 24, "intermediate_size": 96, "num_layers": 2, "num_heads": 2},
        **{"num_mels": 80, "max_positions": 100, "window": "fixed"},
    ),
    audio_projector=ProjectorConfig(downsample=4, bias=False),
)


def logits_of(model, config, document, clips):
    batch = make_batch(config, [document], clips=clips)
    with torch.no_grad():
        x_TD = model.hidden(batch)
        return model.decoder.head(model.decoder.norm(x_TD), None)


@pytest.mark.parametrize("tie", [False, True])
def test_an_exported_voxtral_has_equal_logits_and_answers_in_transformers(tie, tmp_path):
    """Two clips of which one fills half a window; the mels of transformers' own extractor as our folder sets it up."""
    config = dataclasses.replace(VOXTRAL, decoder=dataclasses.replace(DECODER, tie_embedding=tie))
    model = build(config)
    export(config, model.state_dict(), tmp_path, "voxtral")
    theirs, report = transformers.VoxtralForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    waves = [torch.randn(16_000), torch.randn(32_000)]
    clips = [mel for wave in waves for mel in mels(wave, config.audio)]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    features = extractor([wave.numpy() for wave in waves], sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(features, torch.stack(clips), atol=1e-4, rtol=1e-4)
    document = [1, *[AUDIO] * 25, 4, 5, *[AUDIO] * 25, 6, 7]
    ids = torch.tensor([[theirs.config.audio_token_id if token == AUDIO else token for token in document]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, input_features=features).logits[0]
    close(logits_of(model, config, document, clips), expected[:, :61], "voxtral export")
    assert expected.shape[1] == 62 and (expected.argmax(-1) != 61).all()
    answers = theirs.generate(
        input_ids=ids, input_features=features, max_new_tokens=6, do_sample=False, eos_token_id=99
    )
    ours = list(document)
    for _ in range(6):
        ours.append(logits_of(model, config, ours, clips)[-1].argmax().item())
    assert answers[0, len(document) :].tolist() == ours[len(document) :]
    note("voxtral answers")


def test_a_voxtral_of_transformers_loads_and_goes_out_as_it_came(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {**sizes, "num_mel_bins": 8, "max_source_positions": 20}
    text = {**sizes, "hidden_size": 32, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"max_position_embeddings": 256}
    theirs = transformers.VoxtralForConditionalGeneration(
        transformers.VoxtralConfig(audio_config=encoder, text_config={"model_type": "llama", **text}, audio_token_id=60)
    )
    table = theirs.model.audio_tower.embed_positions
    table.weight.data.copy_(transformers.models.whisper.modeling_whisper.sinusoids(*table.weight.shape))
    save(theirs, tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert (config.audio.window, config.audio_projector.downsample, config.audio_projector.bias) == ("fixed", 2, False)
    assert config.decoder.rope_theta == 1e8
    ours = loaded(config, all=tmp_path / "theirs")
    clips = [torch.randn(8, 40)]
    document = [1, *[AUDIO] * 10, 4, 5]
    ids = torch.tensor([[60 if token == AUDIO else token for token in document]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, input_features=torch.stack(clips)).logits[0]
    torch.testing.assert_close(logits_of(ours, config, document, clips), expected, atol=1e-4, rtol=1e-4)
    export(config, ours.state_dict(), tmp_path / "ours", "voxtral")
    again = transformers.VoxtralForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert again[name][: len(tensor)].equal(tensor) or (
            "embed_positions" in name and (again[name] - tensor).abs().max() < 1e-6
        )
    table.weight.data.add_(0.1)
    theirs.save_pretrained(tmp_path / "shifted")
    with pytest.raises(ValueError, match="away from Whisper's sinusoids"):
        loaded(config, all=tmp_path / "shifted")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"audio_projector": {"bias": True}}, "bias=false"),
        ({"audio_projector": {"type": "linear"}}, "mlp2x_gelu"),
        ({"audio_projector": {"hidden_size": 40}}, "audio_projector.hidden_size=40"),
        ({"audio_projector": {"downsample": 5}}, "audio_projector.downsample=5"),
        ({"audio": {"window": "true"}}, "audio.window=fixed"),
        ({"audio": {"max_positions": 98}}, "audio.max_positions=98"),
        (None, "without a vision tower"),
    ],
)
def test_what_voxtral_cannot_hold_is_refused_by_name(changes, named, tmp_path):
    config = WHOLE
    if changes is not None:
        parts = {part: dataclasses.replace(getattr(VOXTRAL, part), **keys) for part, keys in changes.items()}
        config = dataclasses.replace(VOXTRAL, **parts)
    with pytest.raises(ValueError, match=named):
        export(config, AVLM(config).state_dict(), tmp_path / "out", "voxtral")
    assert not list(tmp_path.iterdir())


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_export_load_and_export_again_give_equal_bytes(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    data = DataConfig(train="x", template="chatml")
    export(WHOLE, build(WHOLE).state_dict(), tmp_path / "one", data=data, dtype=dtype)
    again = loaded(WHOLE, all=tmp_path / "one")
    export(WHOLE, again.state_dict(), tmp_path / "two", data=data, dtype=dtype)
    one = folder_bytes(tmp_path / "one")
    assert one == folder_bytes(tmp_path / "two") and len(one) > 5


def test_what_came_from_hugging_face_goes_out_with_equal_tensors(tmp_path):
    save(llava(), tmp_path / "llava")
    config = read_config(tmp_path / "llava")
    model = loaded(config, all=tmp_path / "llava")
    export(config, model.state_dict(), tmp_path / "out", "llava")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "out"))
    left = {name for name in theirs if ".encoder.layers.2." in name or ".post_layernorm." in name}  # never computed
    for name in theirs.keys() - left:
        there = ours[name.replace("vision_tower.", "vision_tower.vision_model.")]
        assert there[: len(theirs[name])].equal(theirs[name]), name  # one row more, for the image token
    export(config, model.state_dict(), tmp_path / "decoder", "decoder", dtype=torch.bfloat16)
    decoder = load_file(tmp_path / "decoder" / "model.safetensors")
    for name, tensor in decoder.items():
        source = f"language_model.{name}"
        assert tensor.equal(theirs[source].bfloat16()), name


def test_a_folder_is_replaced_when_the_new_one_is_whole_and_not_before(tmp_path, monkeypatch):
    model, folder = build(WHOLE), tmp_path / "out"
    export(WHOLE, model.state_dict(), folder)
    before = folder_bytes(folder)
    with pytest.raises(ValueError, match="is not empty: choose another folder, or give --overwrite"):
        export(WHOLE, model.state_dict(), folder)
    for file in write_run(tmp_path / "run", model).glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100_000])  # some of it can be read
    _, path = read_run(tmp_path / "run")
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    with pytest.raises(ValueError, match="cannot be read"):
        export(WHOLE, open_checkpoint(path), folder, overwrite=True)
    shutil.rmtree(tmp_path / "run")
    assert folder_bytes(folder) == before and list(tmp_path.iterdir()) == [folder]
    changed = build(WHOLE, seed=1)
    export(WHOLE, changed.state_dict(), folder, overwrite=True)
    assert loaded(WHOLE, all=folder).decoder.norm.weight.equal(changed.decoder.norm.weight)
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no model"):
        export(WHOLE, changed.state_dict(), tmp_path / "mine", overwrite=True)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ValueError, match=r"out.partial is left over"):
        export(WHOLE, changed.state_dict(), folder, overwrite=True)


def test_the_command_exports_any_step_of_a_run_with_adapters_merged(tmp_path, monkeypatch):
    config = dataclasses.replace(WHOLE, lora=LoraConfig(rank=4, targets=["decoder.*", "audio.*.up"], dora=True))
    models = {step: build(config, seed=step) for step in (3, 5)}
    for step, model in models.items():
        write_run(tmp_path / "run", model, step)
    export(config, models[3].state_dict(), tmp_path / "expected", dtype=torch.bfloat16)
    command = [sys.executable, "-m", "avlm.weights", "export", tmp_path / "run", tmp_path / "three", "--step", "3"]
    subprocess.run(command, check=True)
    three, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("three", "expected"))
    assert three.keys() == expected.keys() and all(three[name].equal(expected[name]) for name in three)
    for arguments, message in (
        (["run", "four", "--step", "4"], "no complete checkpoint of step 4: there are those of steps 3, 5"),
        (["run", "three"], "is not empty"),
        (["no", "four"], "holds no complete checkpoint"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["weights", "export", *arguments])
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main()
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("model", ["queries", "cross"])
def test_connectors_that_no_other_format_holds_are_refused_there_and_kept_in_ours(model, tmp_path):
    config = make_config(model=MODELS[model]).model
    built = build(config)
    for name in ("transformers", "llava", "gguf"):
        with pytest.raises(
            ValueError, match=rf"the {name} format cannot hold model\.(cross|vision_projector\.resampler)"
        ):
            export(config, built.state_dict(), tmp_path / name, format=name)
    export(config, built.state_dict(), tmp_path / "ours")
    if model == "cross":  # where gates begin is no size
        config = dataclasses.replace(config, cross=dataclasses.replace(config.cross, first_gate=0.0))
    again = loaded(config, all=tmp_path / "ours")
    assert all(a.equal(b) for a, b in zip(built.parameters(), again.parameters(), strict=True))
