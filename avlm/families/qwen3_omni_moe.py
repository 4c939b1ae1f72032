"""Qwen3-Omni's thinker, which sees and hears: a Qwen3-MoE decoder with M-RoPE, the tower of Qwen3-VL, and Whisper's
encoder behind convolutions over frames and mel bins.

What the model speaks with (its talker and the codec behind that) is left out. Their encoder fills the last piece of a
clip with zeros up to the longest piece of the call; ours always fills it up to a whole piece, so that a clip's features
do not depend on other clips. They are the same wherever a clip of a second or more is in the call.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.audio import AudioConfig, halved
from avlm.config.model import ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, qwen2_5_omni, qwen2_vl, qwen3_moe, qwen3_vl, whisper
from avlm.families.keys import require_accepted, require_same, to_ours, to_theirs

WHOLE, WHOLE_KEY, THINKER = "qwen3_omni_moe", "thinker_config", "qwen3_omni_moe_thinker"
WHOLE_PREFIX = "thinker."  # of its tensors in the whole model
WHOLE_CLASS = "Qwen3OmniMoeForConditionalGeneration"
WHOLE_FILES: tuple[str, ...] = ()  # that transformers reads with the whole model, besides those of any
MODEL_TYPES = (WHOLE, THINKER)
# our field of AudioConfig -> their key
FIELDS = {
    **{ours: key for ours, key in whisper.FIELDS.items() if ours != "max_positions"},
    "stem_width": "downsample_hidden_size",
}
TOWER: dict[str, Any] = {"log_mel": "clip", "stem": "conv2d", "key_bias": True}  # what no key tells
PIECE = 100  # frames that are convolved together: the class counts 13 rows of them, whatever n_window says
# A config.json may leave out the keys that equal the defaults of its classes.
DEFAULTS = {"position_id_per_seconds": 25}
TEXT_DEFAULTS = {
    "vocab_size": 3584,
    "hidden_size": 2048,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "num_mel_bins": 128,
    "n_window": 50,
    "n_window_infer": 800,
    "downsample_hidden_size": 480,
    "output_dim": 3584,  # that of the decoder
}
AUDIO_ACCEPTED = {**whisper.ACCEPTED, "scale_embedding": (False,), "n_window": (PIECE // 2,)}
FRAME_AREA = (128 * 32 * 32, 768 * 32 * 32)  # the least and the most pixels of a frame of a video, of the class
EXTRACTOR_SECONDS = 300  # of audio that their feature extractor takes

# The first name of a module tells it apart from those of other families.
NAMES = {
    **llama.NAMES,
    "vision": qwen3_vl.NAMES["vision"],
    "vision_projector": {
        "deep.{i}.norm": "merger_list.{i}.ln_q",
        "deep.{i}.up": "merger_list.{i}.mlp.0",
        "deep.{i}.down": "merger_list.{i}.mlp.2",
        "norm": "merger.ln_q",
        "up": "merger.mlp.0",
        "down": "merger.mlp.2",
    },
    "audio": {
        "conv1": "conv2d1",
        "conv2": "conv2d2",
        "conv3": "conv2d3",
        "stem_out": "conv_out",
        "norm": "ln_post",
        **{ours: key for ours, key in whisper.NAMES["audio"].items() if ours not in ("conv1", "conv2", "norm")},
    },
    "audio_projector": {"up": "proj1", "down": "proj2"},
}
PREFIXES = qwen2_5_omni.PREFIXES
HEAD, WHOLE_HEAD = qwen2_5_omni.HEAD, qwen2_5_omni.WHOLE_HEAD
CLASS = "Qwen3OmniMoeThinkerForConditionalGeneration"
LOADED = qwen2_5_omni.LOADED
SPEAKS = [
    (r"talker\.", "the talker, which speaks"),
    (r"code2wav\.", "the codec of the talker"),
    (r"(rotary_pos_emb\.inv_freq|positional_embedding\.)", "computed positions"),
]
SKIPPED = dict.fromkeys(PREFIXES, SPEAKS)
SKIPPED["decoder"] = [*llama.SKIPPED["decoder"], *SPEAKS]
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {
    "vision_projector": ("merger", "merger_list.{i}"),
    "audio_projector": ("audio_tower.proj1", "audio_tower.proj2"),
}
constants = llama.constants

PROCESSOR_FILES = ("config.json", *qwen2_vl.PROCESSOR_FILES)
SEE, IMAGE, VIDEO, SEEN = qwen2_vl.MEDIA_TOKENS
HEAR, AUDIO, HEARD = "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"
MEDIA = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
MEDIA_TOKENS = (SEE, IMAGE, VIDEO, SEEN, HEAR, AUDIO, HEARD)
TOKEN_NAMES = {
    **{"image_token": IMAGE, "video_token": VIDEO, "vision_bos_token": SEE, "vision_eos_token": SEEN},
    **{"audio_token": AUDIO, "audio_bos_token": HEAR, "audio_eos_token": HEARD},
}
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    keys = _thinker(keys)
    text = {**qwen3_moe.with_number(keys.get("text_config") or {})}
    text["tie_word_embeddings"] = bool(keys.get("tie_word_embeddings"))  # that of the decoder's own keys does not count
    decoder = qwen2_vl.read_decoder({"text_config": text}, "qwen3_moe", TEXT_DEFAULTS)
    seconds = {"tokens_per_second": float(keys["position_id_per_seconds"]), "fractional_time": True}
    seeing = qwen3_vl.read_around(decoder, keys, files, **seconds)
    audio = {**AUDIO_DEFAULTS, **(keys.get("audio_config") or {})}
    require_accepted(audio, AUDIO_ACCEPTED)
    if audio["output_dim"] != decoder.hidden_size:
        width = shown(audio["output_dim"])
        raise ValueError(f"audio_config has features of {width} numbers, and the decoder {decoder.hidden_size}")
    if audio["n_window_infer"] % PIECE or not audio["n_window_infer"]:
        frames = shown(audio["n_window_infer"])
        raise ValueError(f"n_window_infer={frames} is no multiple of the {PIECE} frames that are convolved together")
    rows = audio["n_window_infer"] // PIECE * halved(PIECE, 3)
    tower = AudioConfig(**to_ours(FIELDS, audio), **TOWER, stem_frames=PIECE, max_positions=rows)
    return ModelConfig(
        decoder=decoder,
        vision=seeing.vision,
        vision_projector=seeing.vision_projector,
        audio=tower,
        audio_projector=ProjectorConfig(hidden_size=tower.hidden_size),
    )


def _thinker(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the thinker, of a config.json of it or of the whole model."""
    if keys["model_type"] == WHOLE:
        keys = keys.get(WHOLE_KEY) or {}
    return {**DEFAULTS, **{key: value for key, value in keys.items() if value is not None}}


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    if config.audio is None or config.vision is None:
        raise ValueError("the qwen3_omni_moe format holds a decoder with a vision tower and an audio tower")
    qwen2_vl.require_any_grid(config, "qwen3_omni_moe")
    vision, audio = config.vision, config.audio
    if vision.tokens_per_second is None or audio.stem != "conv2d":
        raise ValueError("the qwen3_omni_moe format needs vision.tokens_per_second and audio.stem=conv2d")
    keys = {
        "architectures": [CLASS],
        "model_type": THINKER,
        "audio_start_token_id": ids[HEAR],
        "audio_token_id": ids[AUDIO],
        "audio_end_token_id": ids[HEARD],
        "vision_start_token_id": ids[SEE],
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "vision_end_token_id": ids[SEEN],
        "position_id_per_seconds": int(vision.tokens_per_second),
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": {
            **qwen2_vl.write_decoder(config.decoder),
            "model_type": "qwen3_omni_moe_text",
            "rope_scaling": qwen3_vl.rope_scaling(config.decoder),
        },
        "vision_config": {"model_type": "qwen3_omni_moe_vision_encoder", **qwen3_vl.write_tower(config)},
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            **to_theirs(FIELDS, audio),
            **whisper.CONSTANT_KEYS,
            "max_source_positions": 1500,
            "n_window": PIECE // 2,
            "n_window_infer": audio.window_frames,
            "output_dim": config.decoder.hidden_size,
        },
    }
    require_same("qwen3_omni_moe", config, read, keys, processor_json(config, None))
    return keys


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes. Its bounds of a video are
    those of the class, whatever files say."""
    image, video = (qwen2_vl.pixels_processor(files, kind)[1] for kind in ("image", "video"))
    heard = _thinker(files["config.json"]).get("use_audio_in_video", True)
    frames = {
        "spread": "starts",
        "frame_tokens": qwen2_vl.read_size({}, FRAME_AREA, config),
        "audio": "merged" if heard else False,
    }
    return {
        **qwen2_vl.read_images(image, config),
        "markers": {"image": [SEE, SEEN], "video": [SEE, SEEN], "audio": [HEAR, HEARD]},
        "video": {**qwen2_vl.read_frames(video), **frames},
    }


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The keys of config.json that ``prompts`` reads."""
    return {"use_audio_in_video": bool(data.video.audio)}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The feature extractor's stand among those of images."""
    files = qwen2_vl.processor_json(config, data)
    files = {name: {**keys, "processor_class": "Qwen3OmniMoeProcessor"} for name, keys in files.items()}
    frames = EXTRACTOR_SECONDS * whisper.SAMPLE_RATE // whisper.HOP
    files["preprocessor_config.json"] |= {
        **whisper.write_processor(config.audio, frames),
        "return_attention_mask": True,
    }
    return files
