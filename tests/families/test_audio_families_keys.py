"""Qwen2-Audio, Audio Flamingo 3 and Qwen2.5-Omni: config and processor keys, in and out."""

import dataclasses
import json

import pytest
import transformers

from avlm.config.model import AudioConfig, ProjectorConfig
from avlm.families import audioflamingo3, qwen2_5_omni, qwen2_audio
from avlm.weights.folder import media_prompts, read_config
from tests.families.test_qwen_vl_keys import ROPE, TEXT, VISION

FAMILIES = {"qwen2_audio": qwen2_audio, "audioflamingo3": audioflamingo3, "qwen2_5_omni": qwen2_5_omni}
CONFIGS = {
    "qwen2_audio": transformers.Qwen2AudioConfig,
    "audioflamingo3": transformers.AudioFlamingo3Config,
    "qwen2_5_omni": transformers.models.qwen2_5_omni.configuration_qwen2_5_omni.Qwen2_5OmniThinkerConfig,
}
# Ids of the tokens of a prompt, in the order of MEDIA_TOKENS.
IDS = {
    "qwen2_audio": (94, 95, 96),
    "audioflamingo3": (95,),
    "qwen2_5_omni": (91, 92, 93, 97, 94, 95, 96),
}
OLD = {"num_mel_bins": 16, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40}
NEW = {"num_mel_bins": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def config_of(name: str, tied: bool = False) -> transformers.PretrainedConfig:
    """A tiny model of a family, with windows of 1 s, or of 0.2 s."""
    plain = {**TEXT, "model_type": "qwen2"}
    if name == "qwen2_audio":
        audio = {**OLD, "max_source_positions": 50}
        return CONFIGS[name](audio_config=audio, text_config=plain, audio_token_index=95)
    if name == "audioflamingo3":
        audio = {**NEW, "max_source_positions": 50}
        return CONFIGS[name](audio_config=audio, text_config=plain, audio_token_id=95)
    vision = {key: value for key, value in VISION["qwen2_5_vl"].items() if key != "tokens_per_second"}
    return CONFIGS[name](
        audio_config={**OLD, "max_source_positions": 50, "n_window": 10, "output_dim": 32},
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": dict(ROPE), "tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        **{"audio_token_index": 95, "image_token_index": 92, "video_token_index": 93},
        **{"audio_start_token_id": 94, "audio_end_token_id": 96},
        **{"vision_start_token_id": 91, "vision_end_token_id": 97, "user_token_id": 3},
    )


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    family = FAMILIES[name]
    config = family.read(keys_of(name), {})
    assert config.audio.pool == 2 and config.audio.edge == ("masked" if name == "qwen2_5_omni" else "silence")
    ids = dict(zip(family.MEDIA_TOKENS, IDS[name], strict=True))
    keys, files = family.config_json(config, ids), family.processor_json(config, None)
    assert family.read(keys, files) == config
    theirs = CONFIGS[name](**keys)
    named = [key for key in keys if "_token_i" in key]
    assert named and {key: getattr(theirs, key) for key in named} == {key: keys[key] for key in named}
    assert set(IDS[name]) >= {keys[key] for key in named}
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_their_classes(name):
    given = {"model_type": CONFIGS[name].model_type}
    theirs = CONFIGS[name]()
    assert FAMILIES[name].read(given, {}) == FAMILIES[name].read(json.loads(theirs.to_json_string(use_diff=False)), {})


@pytest.mark.parametrize(("inner", "outer"), [(True, False), (False, True)])
def test_the_head_of_qwen_omni_is_tied_where_the_thinker_says_so(inner, outer):
    keys = keys_of("qwen2_5_omni")
    keys["tie_word_embeddings"], keys["text_config"]["tie_word_embeddings"] = outer, inner
    theirs = transformers.Qwen2_5OmniThinkerForConditionalGeneration(CONFIGS["qwen2_5_omni"](**keys))
    is_tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert qwen2_5_omni.read(keys, {}).decoder.tie_embedding == is_tied == outer


def test_a_whole_qwen_omni_has_the_config_of_its_thinker(tmp_path):
    thinker = keys_of("qwen2_5_omni")
    config = qwen2_5_omni.read(thinker, {})
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert read_config(tmp_path) == config
    assert config.vision.tokens_per_second == 25 and config.vision.window == 4
    assert config.audio == AudioConfig(
        **{"hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 2, "num_mels": 16},
        **{"max_positions": 10, "log_mel": "clip", "edge": "masked", "pool": 2},
    )
    prompts = media_prompts(tmp_path)
    assert prompts["markers"]["audio"] == ["<|audio_bos|>", "<|audio_eos|>"]
    assert (prompts["video"]["audio"], prompts["video"]["chunk_seconds"]) == ("interleaved", 2.0)
    silent = {**thinker, "use_audio_in_video": False, "seconds_per_chunk": 4}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    prompts = media_prompts(tmp_path)
    assert (prompts["video"]["audio"], prompts["video"]["chunk_seconds"]) == (False, 4.0)
    nothing = dict.fromkeys(("use_audio_in_video", "seconds_per_chunk", "position_id_per_seconds"))
    (tmp_path / "config.json").write_text(json.dumps({**thinker, **nothing}))
    assert read_config(tmp_path) == config
    prompts = media_prompts(tmp_path)
    assert (prompts["video"]["audio"], prompts["video"]["chunk_seconds"]) == ("interleaved", 2.0), "null is the default"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2_audio", {"audio_config": {**OLD, "activation_function": "relu"}}, "activation_function='relu'"),
        ("qwen2_audio", {"text_config": {"model_type": "gemma"}}, "Qwen2-Audio with a decoder of model_type 'gemma'"),
        ("qwen2_audio", {"audio_config": [1]}, r"audio_config must be an object, not \[1\]"),
        ("audioflamingo3", {"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ("audioflamingo3", {"projector_bias": "no"}, "projector_bias must be true or false"),
        ("qwen2_5_omni", {"audio_config": {**OLD, "n_window": 5, "output_dim": 32}}, "n_window=5 is odd"),
        ("qwen2_5_omni", {"audio_config": {**OLD, "output_dim": 8}}, "features of 8 numbers, and the decoder 32"),
        ("qwen2_5_omni", {"position_id_per_seconds": "fast"}, "position_id_per_seconds must be a number"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**keys_of(name), **change}))
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "changes", "said"),
    [
        ("qwen2_audio", "audio", {"edge": "zeros"}, r"the qwen2_audio format cannot hold audio\.edge=zeros"),
        ("qwen2_audio", "audio", {"key_bias": True}, r"audio\.key_bias=True"),
        ("qwen2_audio", "audio_projector", {"type": "mlp2x_gelu"}, r"audio_projector\.type=mlp2x_gelu, only linear"),
        ("audioflamingo3", "audio_projector", {"downsample": 2}, r"audio_projector\.downsample=2, only 1"),
        ("audioflamingo3", "audio_projector", {"output_norm": "rms"}, r"audio_projector\.output_norm=rms"),
        ("audioflamingo3", "audio_projector", {"hidden_size": 48}, r"audio_projector\.hidden_size=48"),
        ("qwen2_5_omni", "audio", {"log_mel": "window"}, r"audio\.log_mel=window, only clip"),
        ("qwen2_5_omni", "vision", {"tokens_per_second": None}, r"vision\.tokens_per_second"),
        ("qwen2_5_omni", "vision_projector", {"norm": "layer"}, r"vision_projector\.norm=layer"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name, module, changes, said):
    config = FAMILIES[name].read(keys_of(name), {})
    other = dataclasses.replace(config, **{module: dataclasses.replace(getattr(config, module), **changes)})
    ids = dict.fromkeys(FAMILIES[name].MEDIA_TOKENS, 0)
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].config_json(other, ids)
    same = dataclasses.replace(config.audio_projector, output_std=0.5, norm_eps=1e-3, hidden_size=0)
    assert FAMILIES[name].config_json(dataclasses.replace(config, audio_projector=same), ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_format_says_which_towers_it_holds(name):
    config = FAMILIES[name].read(keys_of(name), {})
    tower = {"qwen2_5_omni": "audio"}.get(name, "vision")
    changes = {tower: None, f"{tower}_projector": None}
    if tower == "vision":
        seeing = qwen2_5_omni.read(keys_of("qwen2_5_omni"), {})
        changes = {"vision": seeing.vision, "vision_projector": ProjectorConfig(downsample=2)}
    with pytest.raises(ValueError, match=r"the \w+ format holds a decoder with"):
        FAMILIES[name].config_json(dataclasses.replace(config, **changes), {})
