"""Configs and processors of Hugging Face folders with values of any type: read, or refused in one line."""

import json

import pytest
import transformers

from avlm.weights.folder import read_config, stop_ids
from tests.families import test_mistral3
from tests.families.test_qwen_vl_keys import keys_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 24, "patch_size": 8}
AUDIO = {"d_model": 32, "encoder_ffn_dim": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "num_mel_bins": 8}
TEXT = transformers.LlamaConfig(**SIZES)
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
GEMMA3 |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
FAMILIES = {
    "old Llama": {"model_type": "llama", **SIZES, "rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **ROPE}},
    "Qwen 2": transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, max_window_layers=2
    ).to_dict(),
    "SigLIP": transformers.SiglipVisionConfig(**VISION).to_dict(),
    "CLIP": transformers.CLIPConfig(vision_config=VISION).to_dict(),
    "Whisper": transformers.WhisperConfig(**AUDIO).to_dict(),
    "LLaVA": transformers.LlavaConfig(
        text_config=TEXT, vision_config=transformers.CLIPVisionConfig(**VISION)
    ).to_dict(),
    "Voxtral": transformers.VoxtralConfig().to_dict(),
    **{name: keys_of(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")},
    "Qwen 3 with experts": transformers.Qwen3MoeConfig(**SIZES, num_key_value_heads=2).to_dict(),
    "Qwen 2 with experts": transformers.Qwen2MoeConfig(**SIZES, num_key_value_heads=2).to_dict(),
    "old Gemma 2": {"model_type": "gemma2", **SIZES, **GEMMA, "rope_theta": 1e4},
    "old Gemma 3": {"model_type": "gemma3_text", **SIZES, **GEMMA, **GEMMA3},
    "BLIP-2": transformers.Blip2Config(vision_config=VISION, qformer_config={"hidden_size": 32}).to_dict(),
    **{name: test_mistral3.keys_of(name) for name in ("pixtral", "ministral3")},
}
PIXELS = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
PIXELS |= {"resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True}
ODD = [None, "\x1b" * 300, [], {}, [[]], -1, 0, 1.5, 2**70, True, {"a": [1]}, 1e308]


def changed(tree):
    """The tree with every key at every depth in turn of every odd value."""
    for key, value in tree.items():
        yield from ({**tree, key: odd} for odd in ODD)
        if isinstance(value, dict):
            yield from ({**tree, key: inner} for inner in changed(value))


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_any_type_are_read_or_refused_in_one_short_line(family, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FAMILIES[family]))
    read_config(tmp_path)
    refused = 0
    for keys in changed(FAMILIES[family]):
        file.write_text(json.dumps(keys))
        for read in (read_config, stop_ids):
            try:
                read(tmp_path)
            except ValueError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 800 and "ArgsKwargs" not in str(error)
    assert refused > 50


def test_processors_and_files_of_any_type_are_read_or_refused_in_one_short_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["SigLIP"]))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(PIXELS))
    assert read_config(tmp_path).resize == "crop"
    texts = [json.dumps(keys) for keys in (*changed(PIXELS), *({"image_processor": odd} for odd in ODD))]
    texts += ["[" * 100_000, "[]", "", "9" * 5000, '{"size": ' + "9" * 5000 + "}", "\ud800".join('""')]
    for family, name in (("SigLIP", file.name), ("qwen3_vl", file.name), ("qwen3_vl", "processor_config.json")):
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family]))
        for text in texts:
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
            try:
                read_config(tmp_path)
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) < 800
        (tmp_path / name).unlink()
    for raw in (b"[" * 100_000, b"\xff\xfe", b"", b"{", b"9" * 5000, b"x" * 2**27):
        (tmp_path / "config.json").write_bytes(raw)
        with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds no keys)") as error:
            read_config(tmp_path)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_tower_that_cannot_be_is_refused_without_the_words_of_a_library(tmp_path):
    """As SigLIP so400m-patch14-384 was refused: with the repr of pydantic's arguments in the line."""
    for key, value, said in (
        ("patch_size", 25, "patch_size=25 is more than image_size=24"),
        ("hidden_size", 33, "33 is not divi"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES["SigLIP"] | {key: value}))
        with pytest.raises(
            ValueError, match=rf"config\.json: hidden_size={said}" if key == "hidden_size" else said
        ) as error:
            read_config(tmp_path)
        assert "ArgsKwargs" not in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["SigLIP"] | {"image_size": 384, "patch_size": 14}))
    assert read_config(tmp_path).patches_per_side == 27
