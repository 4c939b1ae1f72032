"""Config keys of the Llama family: both dialects in, the older one out."""

import dataclasses
import math

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from avlm.config.decoder import DecoderConfig, RopeScaling, YarnScaling
from avlm.families import llama

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
LLAMA = DecoderConfig(**SIZES, num_kv_heads=2, head_dim=12, rope_theta=5e5, norm_eps=1e-6, max_position=256)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
YARN = YarnScaling(factor=4.0, original_max_position=64, beta_fast=16.0, attention_factor=1.2)
DECODERS = {
    "llama": LLAMA,
    "llama with scaled frequencies": dataclasses.replace(LLAMA, rope_scaling=SCALING, tie_embedding=True),
    "llama, stretched": dataclasses.replace(LLAMA, rope_stretch=4.0),
    "ministral3": dataclasses.replace(LLAMA, yarn=YARN, query_growth=0.2),
    "ministral3 with a window": dataclasses.replace(LLAMA, yarn=YARN, query_growth=0.2, sliding_window=64),
    "qwen2 with yarn": dataclasses.replace(LLAMA, qkv_bias=True, yarn=YARN),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "mistral with a window": dataclasses.replace(LLAMA, sliding_window=64),
    "qwen2 with a window": dataclasses.replace(LLAMA, qkv_bias=True, sliding_window=64),
    "qwen2 with a window in the last layer": dataclasses.replace(
        LLAMA, qkv_bias=True, sliding_window=64, window_layers=[1]
    ),
    "qwen3 with a window in the first layer": dataclasses.replace(
        LLAMA, qk_norm=True, sliding_window=64, window_layers=[0]
    ),
}
SIZES_OF_THEIRS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "ministral3": transformers.Ministral3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.mark.parametrize("name", DECODERS)
def test_our_config_comes_back_from_their_keys(name):
    assert llama.read(llama.write(DECODERS[name])) == DECODERS[name]


@pytest.mark.parametrize("name", DECODERS)
def test_our_config_comes_back_from_the_newer_dialect(name):
    """transformers 5 reads the keys that we write, and writes its own ``rope_parameters``."""
    keys = llama.write(DECODERS[name])
    theirs = CLASSES[keys["model_type"]](**keys).to_dict()
    assert "rope_parameters" in theirs and "rope_theta" not in theirs
    assert llama.read(theirs) == DECODERS[name]


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_keys_have_the_defaults_of_their_class(model_type):
    defaults = CLASSES[model_type]().to_dict()
    given = {"model_type": model_type}
    assert dataclasses.replace(llama.read(given), rope_theta=2.0) == dataclasses.replace(
        llama.read(defaults), rope_theta=2.0
    )


YARN_KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (1 + 0.1 * math.log(4)) / (1 + 0.05 * math.log(4))),
        ({"mscale": 1.0, "attention_factor": 0.7}, 0.7),
        ({"beta_fast": None, "truncate": True}, 1 + 0.1 * math.log(4)),
    ],
)
def test_yarn_is_read_in_both_dialects_with_the_factor_that_transformers_computes(keys, factor):
    sizes = {**SIZES_OF_THEIRS, "model_type": "qwen2", "max_position_embeddings": 256}
    found = llama.read({**sizes, "rope_parameters": {**YARN_KEYS, "rope_theta": 1e6, **keys}})
    assert llama.read({**sizes, "rope_theta": 1e6, "rope_scaling": {**YARN_KEYS, **keys}}) == found
    assert (found.rope_theta, found.yarn.factor, found.yarn.beta_fast) == (1e6, 4.0, 32.0)
    theirs = CLASSES["qwen2"](**sizes, rope_parameters={**YARN_KEYS, "rope_theta": 1e6, **keys})
    assert ROPE_INIT_FUNCTIONS["yarn"](theirs, None)[1] == pytest.approx(found.yarn.attention_factor)
    assert found.yarn.attention_factor == pytest.approx(factor)


def test_yarn_that_we_compute_otherwise_is_refused():
    for keys, message in (
        ({"truncate": False}, "truncate=False"),
        ({"factor": None}, r"with the keys .*'original_max_position_embeddings'"),
        ({"llama_4_scaling_beta": 0.1}, "with the keys .*llama_4_scaling_beta"),  # Llama's class does not read it
    ):
        with pytest.raises(ValueError, match=message):
            llama.read({**SIZES_OF_THEIRS, "model_type": "llama", "rope_scaling": {**YARN_KEYS, **keys}})
    without = {key: value for key, value in YARN_KEYS.items() if key != "original_max_position_embeddings"}
    keys = {**SIZES_OF_THEIRS, "model_type": "llama", "max_position_embeddings": 96, "rope_scaling": without}
    found = llama.read(keys)
    assert found.yarn.original_max_position == 96 and found.max_position == 4 * 96


def test_a_folder_that_got_yarn_later_reaches_as_far_as_yarn_does():
    """Its largest position is that of the original context still; and the original context at the top wins."""
    sizes = {**SIZES_OF_THEIRS, "model_type": "qwen2"}
    for longest, expected in ((64, 256), (200, 200)):
        assert (
            llama.read({**sizes, "max_position_embeddings": longest, "rope_scaling": YARN_KEYS}).max_position
            == expected
        )
    top = {**sizes, "max_position_embeddings": 256, "original_max_position_embeddings": 32}
    found = llama.read({**top, "rope_scaling": YARN_KEYS})
    theirs = CLASSES["qwen2"](**top, rope_scaling=dict(YARN_KEYS))
    ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    assert found.yarn.original_max_position == theirs.rope_parameters["original_max_position_embeddings"] == 32


def test_windows_are_read_as_transformers_reads_them():
    """Mistral has them in all layers, Qwen from max_window_layers on if it uses them, or where layer_types says so."""
    sizes = CLASSES["qwen2"](**SIZES_OF_THEIRS, max_position_embeddings=100).to_dict()
    del sizes["layer_types"], sizes["model_type"], sizes["use_sliding_window"]

    def found(model_type: str, **keys) -> tuple:
        config = llama.read({**sizes, "model_type": model_type, **keys})
        return config.sliding_window, config.window_layers

    assert found("mistral", sliding_window=10) == (10, None)
    assert found("mistral", sliding_window=100) == (None, None)  # never reached
    qwen = dict(sliding_window=10, max_window_layers=1)
    assert found("qwen2", use_sliding_window=True, **qwen) == (10, [1, 2])
    assert found("qwen2", use_sliding_window=False, **qwen) == (None, None)
    assert found("qwen2", use_sliding_window=True, sliding_window=10, max_window_layers=3) == (None, None)
    assert found("qwen2", use_sliding_window=True, sliding_window=10, max_window_layers=0) == (10, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert found("qwen3", use_sliding_window=True, layer_types=kinds, **qwen) == (10, [0, 2])


def test_windows_in_some_layers_of_a_plain_decoder_are_no_architecture():
    with pytest.raises(ValueError, match="window_layers without qkv_bias or qk_norm"):
        llama.write(dataclasses.replace(LLAMA, sliding_window=64, window_layers=[1]))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_their_keys_come_back_from_our_config(model_type):
    keys = CLASSES[model_type](num_attention_heads=8, num_key_value_heads=2, hidden_size=64).to_dict()
    written = llama.write(llama.read(keys))
    again = CLASSES[model_type](**written).to_dict()
    for key in (*llama.FIELDS.values(), "model_type", "hidden_act"):
        if keys.get(key) is not None:  # null stands for a default that we write out
            assert again[key] == keys[key], key
    assert again["rope_parameters"] == keys["rope_parameters"]


def test_a_decoder_of_no_known_architecture_is_refused():
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        llama.write(dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True))
    with pytest.raises(ValueError, match="query_growth with qkv_bias or qk_norm"):
        llama.write(dataclasses.replace(LLAMA, yarn=YARN, query_growth=0.1, qk_norm=True))
