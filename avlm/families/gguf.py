"""GGUF: what llama.cpp calls things, in model.gguf (the decoder) and mmproj.gguf (towers and projectors).

The names, the keys and what is computed are those of its sources: tools/mtmd (clip-impl.h, clip.cpp, models/llava.cpp,
models/whisper-enc.cpp) and src/models, as llama-cpp-python 0.3.36 has them. What they compute differently from us is
refused by name. What is let through although it is only near stands in docs/serving.md.

    vision   "mlp": squares, a tower without class token, and two linears with GELU (LLaVA's; it takes the tanh form)
    audio    "glma": windows of 30 s, rows stacked, two linears with GELU; the rows of two marker tokens around them
             "ultravox": the same with norms and a gate, and nothing around them
"""

import dataclasses
import math
import re
from typing import Any

from avlm.config.decoder import DecoderConfig, YarnScaling
from avlm.config.media import ImageLayout
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # in which matrices are stored

ATTENTION = {
    "attention_norm": "ln1",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_out",
    "ffn_norm": "ln2",
    "up": "ffn_up",
    "down": "ffn_down",
}
# Our module -> {a part or parameter of it: its name in files, {i} the layer}.
NAMES = {
    "decoder": {
        "embedding": "token_embd",
        "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
        "blocks.{i}.attention.q": "blk.{i}.attn_q",
        "blocks.{i}.attention.k": "blk.{i}.attn_k",
        "blocks.{i}.attention.v": "blk.{i}.attn_v",
        "blocks.{i}.attention.o": "blk.{i}.attn_output",
        "blocks.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
        "blocks.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
        "blocks.{i}.ffn_norm": "blk.{i}.ffn_norm",
        "blocks.{i}.ffn.gate": "blk.{i}.ffn_gate",
        "blocks.{i}.ffn.up": "blk.{i}.ffn_up",
        "blocks.{i}.ffn.down": "blk.{i}.ffn_down",
        "norm": "output_norm",
        "head": "output",
    },
    "vision": {
        "patch": "v.patch_embd",
        "position": "v.position_embd.weight",
        "pre_norm": "v.pre_ln",
        **{f"blocks.{{i}}.{ours}": f"v.blk.{{i}}.{theirs}" for ours, theirs in ATTENTION.items()},
        "post_norm": "v.post_ln",
    },
    "vision_projector": {"up": "mm.0", "down": "mm.2"},
    "audio": {
        "conv1": "a.conv1d.1",
        "conv2": "a.conv1d.2",
        **{f"blocks.{{i}}.{ours}": f"a.blk.{{i}}.{theirs}" for ours, theirs in ATTENTION.items()},
        "norm": "a.post_ln",
    },
    "audio_projector": {
        "feature_norm": "mm.a.norm_pre",
        "up": "mm.a.mlp.1",
        "gate": "mm.a.mlp.1",
        "hidden_norm": "mm.a.norm_mid",
        "down": "mm.a.mlp.2",
    },
}
POSITIONS = "a.position_embd.weight"  # the audio tower's table, which we compute
MARKERS = ("v.boi", "v.eoi")  # rows before and after the features of a window of "glma"
UP, GATE = "audio_projector.up.weight", "audio_projector.gate.weight"  # of "ultravox": the halves of one tensor
CONVOLUTION_BIASES = ("audio.conv1.bias", "audio.conv2.bias")  # (D, 1) in files
GLMA_NORM = "mm.a.norm_pre"  # the last norm of the tower, which "glma" does in its projector
ROPE_FACTORS = "rope_freqs.weight"  # by which the speed of each pair of dimensions is divided

WINDOW_ROWS = 1500  # of 30 s, the only window that llama.cpp has
AUDIO_EPS, ULTRAVOX_EPS = 1e-5, 1e-6
# Field -> the values under which llama.cpp computes what we do.
VISION: dict[str, tuple] = {
    "resize": ("crop", "stretch"),
    "class_token": (False,),
    "gated": (False,),
    "qk_norm": (False,),
    "layer_scale": (False,),
    "norm": ("layer",),
    "deepstack_layers": ([],),
    "resample": ("bicubic",),
}
AUDIO: dict[str, tuple] = {
    **{"window": ("fixed",), "max_positions": (WINDOW_ROWS,), "pool": (1,), "key_bias": (False,)},
    **{"block": ("whisper",), "scale_input": (False,)},
}
DECODER: dict[str, tuple] = {"sliding_window": (None,), "mrope_sections": (None,)}
# The same of what llama.cpp has in architectures that we do not write.
UNWRITTEN: dict[str, tuple] = {
    "activation": ("silu",),
    "norm_offset": (False,),
    "post_norms": (False,),
    "embedding_scale": (False,),
    "score_size": (None,),
    "attention_softcap": (None,),
    "logit_softcap": (None,),
    "rope_stretch": (1.0,),
    "bidirectional": ("none",),
}
REASONS = {
    "vision.class_token": "llama.cpp puts the class token behind the patches and drops the first patch in its place",
    "vision.resize": "its mlp projector takes squares",
    "audio.window": "it encodes 30 s always, and its attention sees what is past the clip",
    "audio.max_positions": "its windows have 30 s",
    "decoder.sliding_window": "it attends to all tokens",
    "decoder.mrope_sections": "its mlp projector knows one position for each token",
}
FREE = ("hidden_size", "output_std")  # of projectors
PLAIN = ProjectorConfig()  # of "mlp" and "glma"
ULTRAVOX = ProjectorConfig(type="swiglu", bias=False, feature_norm="rms", hidden_norm="rms", norm_eps=ULTRAVOX_EPS)


def check(config: ModelConfig, data: DataConfig) -> None:
    """ValueError for a model that llama.cpp does not compute, and for prompts that it does not make."""
    _check_decoder(config.decoder)
    if config.vision is not None:
        assert config.vision_projector is not None
        _check_vision(config.vision, config.vision_projector)
        if data.image_layout != ImageLayout():
            raise _refused("data.image_layout", "with tiles or markers", "its mlp projector takes an image whole")
    if config.audio is not None:
        assert config.audio_projector is not None
        _check_audio(config.audio, config.audio_projector)
        before, after = data.markers.get("audio", ["", ""])
        if audio_type(config) == "glma" and not (before and after):
            raise ValueError(
                f"GGUF cannot hold data.markers.audio={shown([before, after])} with audio_projector.type=mlp2x_gelu: "
                "llama.cpp's projector of that kind (glma) puts one row before the features and one behind them, so "
                "train with markers of one control token each"
            )


def _refused(field: str, value: Any, reason: str = "llama.cpp does not compute it") -> ValueError:
    return ValueError(f"GGUF cannot hold {field}={shown(value)}: {REASONS.get(field, reason)}")


def _check_fields(module: str, config: Any, held: dict[str, tuple]) -> None:
    for field, values in held.items():
        value = getattr(config, field)
        if value not in values:
            raise _refused(f"{module}.{field}", value)


def _check_decoder(config: DecoderConfig) -> None:
    _check_fields("decoder", config, DECODER)
    if config.experts is not None:
        raise ValueError(
            "GGUF cannot hold decoder.experts: our files for llama.cpp hold no experts, take avlm or decoder"
        )
    for field, values in UNWRITTEN.items():
        if getattr(config, field) not in values:
            value = getattr(config, field)
            raise _refused(f"decoder.{field}", value, "the export writes Llama's, Mistral's and Qwen's decoders alone")
    is_qwen = config.qkv_bias or config.qk_norm
    if is_qwen and config.rope_scaling is not None:
        raise _refused("decoder.rope_scaling", "llama3", "its Qwen decoders have plain speeds or YaRN's")
    if is_qwen and config.query_growth:
        raise _refused("decoder.query_growth", config.query_growth, "of its decoders only Mistral's have it")
    if is_qwen and config.yarn is not None:
        for field in ("beta_fast", "beta_slow"):
            if getattr(config.yarn, field) != YarnScaling.__dataclass_fields__[field].default:
                raise _refused(f"decoder.yarn.{field}", getattr(config.yarn, field), "its Qwen decoders have 32 and 1")


def _check_vision(config: VisionConfig, projector: ProjectorConfig) -> None:
    _check_fields("vision", config, VISION)
    if config.intermediate_size == config.hidden_size:
        size = config.intermediate_size
        raise _refused("vision.intermediate_size", size, "llama.cpp tells the two linears of a layer by their widths")
    _check_projector("vision_projector", projector, PLAIN, ("norm_eps",))


def _check_audio(config: AudioConfig, projector: ProjectorConfig) -> None:
    _check_fields("audio", config, AUDIO)
    if projector.type == "swiglu":
        _check_projector("audio_projector", projector, ULTRAVOX, ("downsample",))
    else:
        _check_projector("audio_projector", projector, PLAIN, ("bias", "downsample", "norm_eps"))
    stacked = projector.downsample * config.hidden_size
    numbers = WINDOW_ROWS * config.hidden_size
    # ggml pads the numbers of a window to whole stacks by a mask of bits, which few widths but powers of 2 survive.
    padded = (numbers + stacked - 1) & ~(stacked - 1)
    if WINDOW_ROWS % projector.downsample or (projector.downsample > 1 and padded != numbers):
        reason = f"llama.cpp cannot stack the {WINDOW_ROWS} rows of a window, {config.hidden_size} wide, so"
        raise _refused("audio_projector.downsample", projector.downsample, reason)


def _check_projector(module: str, projector: ProjectorConfig, computed: ProjectorConfig, free: tuple[str, ...]) -> None:
    """``computed``: what llama.cpp computes; ``free``: the fields that may differ."""
    for field in dataclasses.fields(projector):
        value, theirs = getattr(projector, field.name), getattr(computed, field.name)
        if value != theirs and field.name not in (*FREE, *free):
            raise _refused(f"{module}.{field.name}", value, f"llama.cpp computes {theirs} here")


def audio_type(config: ModelConfig) -> str:
    """Which of llama.cpp's projectors computes ours."""
    assert config.audio_projector is not None
    return "ultravox" if config.audio_projector.type == "swiglu" else "glma"


def architecture(config: DecoderConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "llama" if config.yarn is None else "mistral3"  # of the two only Mistral's reads all of YaRN's keys


def name_of(config: ModelConfig, ours: str) -> str:
    """The name in files of our parameter, with its module."""
    if ours.startswith("audio.norm.") and audio_type(config) == "glma":
        return ours.replace("audio.norm", GLMA_NORM)
    module, _, name = ours.partition(".")
    number = re.search(r"\.(\d+)\.", name)
    pattern, leaf = re.sub(r"\.\d+\.", ".{i}.", name), ""
    if pattern not in NAMES[module]:
        pattern, _, leaf = pattern.rpartition(".")
        leaf = f".{leaf}"
    theirs = NAMES[module][pattern] + leaf
    return theirs.replace("{i}", number[1]) if number else theirs


def stored_shape(config: ModelConfig, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in files of our parameter, which has ``shape`` here."""
    if ours in CONVOLUTION_BIASES:
        return (*shape, 1)
    if ours == "vision.patch.weight" and config.vision is not None:
        side = config.vision.patch_size
        return (shape[0], 3, side, side)
    return shape


def half_of(config: ModelConfig, ours: str) -> int | None:
    """Which half of a tensor's rows our parameter is; None: it is all of it."""
    if config.audio_projector is None or audio_type(config) != "ultravox":
        return None
    return {UP: 0, GATE: 1}.get(ours)


def rotated_heads(config: ModelConfig, ours: str) -> int | None:
    """The heads of a parameter in which llama.cpp turns neighbouring dimensions, where we turn halves; None: it has
    the same order."""
    if architecture(config.decoder) not in ("llama", "mistral3"):
        return None
    heads = {"q": config.decoder.num_heads, "k": config.decoder.num_kv_heads}
    found = re.fullmatch(r"decoder\.blocks\.\d+\.attention\.([qk])\.\w+", ours)
    return heads[found[1]] if found else None


def decoder_keys(config: DecoderConfig) -> dict[str, Any]:
    """Metadata of model.gguf, without the tokenizer's."""
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.yarn is not None:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.yarn.factor,
            "rope.scaling.original_context_length": config.yarn.original_max_position,
            # llama.cpp multiplies by the factor of the paper, 1 + ln(factor) / 10, whatever a file says
            "rope.scaling.attn_factor": config.yarn.attention_factor / (1 + 0.1 * math.log(config.yarn.factor)),
            "rope.scaling.yarn_beta_fast": config.yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": config.yarn.beta_slow,
        }
    if config.query_growth:
        keys["attention.temperature_scale"] = config.query_growth
    prefix = architecture(config)
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def projector_keys(config: ModelConfig) -> dict[str, Any]:
    """Metadata of mmproj.gguf."""
    vision, audio = config.vision, config.audio
    keys = {"has_vision_encoder": vision is not None, "has_audio_encoder": audio is not None}
    if vision is not None:
        keys |= {
            "use_gelu": vision.activation in ("gelu", "gelu_tanh"),  # its tanh form; without either: quick_gelu
            "use_silu": vision.activation == "silu",
            "vision.projector_type": "mlp",
            "vision.image_size": vision.image_size,
            "vision.patch_size": vision.patch_size,
            "vision.image_mean": vision.mean,
            "vision.image_std": vision.std,
            "vision.feature_layer": [vision.num_blocks],  # without it the last layer would not be run
            **_tower_keys("vision", config, vision, vision.norm_eps),
        }
    if audio is not None:
        assert config.audio_projector is not None
        keys |= {
            "audio.projector_type": audio_type(config),
            "audio.num_mel_bins": audio.num_mels,
            "audio.projector.stack_factor": config.audio_projector.downsample,
            **_tower_keys("audio", config, audio, AUDIO_EPS),
        }
    return {f"clip.{key}": value for key, value in keys.items()}


def _tower_keys(name: str, config: ModelConfig, tower: VisionConfig | AudioConfig, eps: float) -> dict[str, Any]:
    return {
        f"{name}.embedding_length": tower.hidden_size,
        f"{name}.feed_forward_length": tower.intermediate_size,
        f"{name}.block_count": tower.num_blocks,
        f"{name}.projection_dim": config.decoder.hidden_size,
        f"{name}.attention.head_count": tower.num_heads,
        f"{name}.attention.layer_norm_epsilon": eps,
    }
