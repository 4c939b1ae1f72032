"""Qwen2.5-Omni, the part that sees, hears and writes (the "thinker"): the decoder and tower of Qwen2.5-VL, and an audio
tower whose windows of 2 s neither convolutions nor attention cross.

A folder may hold the thinker alone, or the whole model; of the latter we leave out what speaks. A video is heard where
its frames are seen, in turns of ``seconds_per_chunk``: so the model was trained and is shown by its authors, while
transformers' processor leaves the sound out unless it is asked for (use_audio_in_video). ``data.video.audio: false``
does the same.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, qwen2_5_vl, qwen2_vl, whisper
from avlm.families.keys import require_accepted, require_same, to_ours, to_theirs

WHOLE, THINKER = "qwen2_5_omni", "qwen2_5_omni_thinker"
WHOLE_KEY, WHOLE_PREFIX = "thinker_config", "thinker."  # of the thinker in the whole model
WHOLE_CLASS = "Qwen2_5OmniForConditionalGeneration"
WHOLE_FILES = ("spk_dict.pt",)  # voices
MODEL_TYPES = (WHOLE, THINKER)
# our field of AudioConfig -> their key
FIELDS = {**whisper.FIELDS, "max_positions": "n_window"}
TOWER: dict[str, Any] = {"log_mel": "clip", "edge": "masked", "pool": 2}  # what no key tells
# A config.json may leave out the keys that equal the defaults of its classes.
DEFAULTS = {"position_id_per_seconds": 25, "seconds_per_chunk": 2}
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "mrope_section": [16, 24, 24],
    "mrope_interleaved": False,
}
AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "n_window": 100,
    "output_dim": 3584,  # that of the decoder
}
EXTRACTOR_SECONDS = 300  # of audio that their feature extractor takes

# The first name of a module tells it apart from those of other families.
NAMES = {
    **llama.NAMES,
    "vision": {
        "blocks.{i}.attention.q": "blocks.{i}.attn.q",
        "blocks.{i}.attention.k": "blocks.{i}.attn.k",
        "blocks.{i}.attention.v": "blocks.{i}.attn.v",
        **{ours: theirs for ours, theirs in qwen2_5_vl.NAMES["vision"].items() if not theirs.endswith("qkv")},
    },
    "vision_projector": qwen2_vl.NAMES["vision_projector"],
    "audio": {"norm": "ln_post", **{ours: theirs for ours, theirs in whisper.NAMES["audio"].items() if ours != "norm"}},
    "audio_projector": {"linear": "proj"},
}
PREFIXES = {
    "decoder": ["model.", "thinker.model."],
    "vision": ["visual.", "thinker.visual."],
    "vision_projector": ["visual.", "thinker.visual."],
    "audio": ["audio_tower.", "thinker.audio_tower."],
    "audio_projector": ["audio_tower.", "thinker.audio_tower."],
}
HEAD, WHOLE_HEAD = "lm_head.weight", "thinker.lm_head.weight"
CLASS = "Qwen2_5OmniThinkerForConditionalGeneration"
LOADED = {module: prefixes[0] for module, prefixes in PREFIXES.items()}
SPEAKS = [
    (r"talker\.", "the talker, which speaks"),
    (r"token2wav\.", "the codec of the talker"),
    (r"(thinker\.audio_tower\.)?audio_bos_eos_token\.", "two embeddings of the audio tower that are never read"),
]
SKIPPED = dict.fromkeys(PREFIXES, SPEAKS)
SKIPPED["decoder"] = [*llama.SKIPPED["decoder"], *SPEAKS]
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {"vision_projector": ("merger",), "audio_projector": ("audio_tower.proj",)}

PROCESSOR_FILES = ("config.json", *qwen2_vl.PROCESSOR_FILES)
SEE, IMAGE, VIDEO, SEEN = "<|vision_bos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_eos|>"
HEAR, AUDIO, HEARD = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
MEDIA = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
MEDIA_TOKENS = (SEE, IMAGE, VIDEO, SEEN, HEAR, AUDIO, HEARD)
TOKEN_NAMES = {
    **{"image_token": IMAGE, "video_token": VIDEO, "vision_bos_token": SEE, "vision_eos_token": SEEN},
    **{"audio_token": AUDIO, "audio_bos_token": HEAR, "audio_eos_token": HEARD},
}
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    keys = _thinker(keys)
    require_accepted(keys, qwen2_vl.ACCEPTED)
    vision = {
        **qwen2_5_vl.VISION_DEFAULTS,
        **(keys.get("vision_config") or {}),
        "tokens_per_second": keys["position_id_per_seconds"],
    }
    tower = qwen2_5_vl.read_tower(vision, files)
    tied = bool(keys.get("tie_word_embeddings"))  # that of the decoder's own keys does not count
    text = {**(keys.get("text_config") or {}), "tie_word_embeddings": tied}
    decoder = qwen2_vl.read_decoder({"text_config": text}, "qwen2", TEXT_DEFAULTS)
    seeing = qwen2_vl.whole(decoder, tower, vision["spatial_merge_size"], vision["out_hidden_size"])
    audio = {**AUDIO_DEFAULTS, **(keys.get("audio_config") or {})}
    require_accepted(audio, whisper.ACCEPTED)
    if audio["n_window"] % 2:
        raise ValueError(
            f"n_window={shown(audio['n_window'])} is odd: a mean of rows of two windows is not implemented"
        )
    if audio["output_dim"] != decoder.hidden_size:
        width = shown(audio["output_dim"])
        raise ValueError(f"audio_config has features of {width} numbers, and the decoder {decoder.hidden_size}")
    return ModelConfig(
        decoder=decoder,
        vision=tower,
        vision_projector=seeing.vision_projector,
        audio=AudioConfig(**to_ours(FIELDS, audio), **TOWER),
        audio_projector=ProjectorConfig(type="linear"),
    )


def _thinker(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the thinker, of a config.json of it or of the whole model."""
    if keys["model_type"] == WHOLE:
        keys = keys.get(WHOLE_KEY) or {}
    return {**DEFAULTS, **{key: value for key, value in keys.items() if value is not None}}


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    if config.audio is None or config.vision is None:
        raise ValueError("the qwen2_5_omni format holds a decoder with a vision tower and an audio tower")
    qwen2_vl.require_any_grid(config, "qwen2_5_omni")
    vision = qwen2_5_vl.write_tower(config, "qwen2_5_omni")
    per_second = vision.pop("tokens_per_second")
    keys = {
        "architectures": [CLASS],
        "model_type": THINKER,
        "audio_start_token_id": ids[HEAR],
        "audio_token_index": ids[AUDIO],
        "audio_end_token_id": ids[HEARD],
        "vision_start_token_id": ids[SEE],
        "image_token_index": ids[IMAGE],
        "video_token_index": ids[VIDEO],
        "vision_end_token_id": ids[SEEN],
        "position_id_per_seconds": per_second,
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": {
            **qwen2_vl.write_decoder(config.decoder),
            "model_type": "qwen2_5_omni_text",
            "rope_scaling": {"rope_type": "default", "mrope_section": config.decoder.mrope_sections},
        },
        "vision_config": {"model_type": "qwen2_5_omni_vision_encoder", **vision},
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            **to_theirs(FIELDS, config.audio),
            **whisper.CONSTANT_KEYS,
            "output_dim": config.decoder.hidden_size,
        },
    }
    require_same("qwen2_5_omni", config, read, keys, processor_json(config, None))
    return keys


def constants(config: ModelConfig) -> llama.Constants:
    """Two embeddings that the class has and never reads."""
    return {"audio_tower.audio_bos_eos_token.weight": ((2, config.decoder.hidden_size), 0.0)}


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes. Its bounds of a video are
    those of the class, whatever files say."""
    thinker = _thinker(files["config.json"])
    image, video = (qwen2_vl.pixels_processor(files, kind)[1] for kind in ("image", "video"))
    frames = {
        "spread": "starts",
        "frame_tokens": qwen2_vl.read_size({}, qwen2_vl.FRAME_AREA, config),
        "audio": "interleaved" if thinker.get("use_audio_in_video", True) else False,
        "chunk_seconds": float(thinker["seconds_per_chunk"]),
    }
    return {
        **qwen2_vl.read_images(image, config),
        "markers": {"image": [SEE, SEEN], "video": [SEE, SEEN], "audio": [HEAR, HEARD]},
        "video": {**qwen2_vl.read_frames(video), **frames},
    }


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The keys of config.json that ``prompts`` reads. Sound after the frames of a video has none."""
    seconds = data.video.chunk_seconds
    if seconds != int(seconds):
        raise ValueError(f"the qwen2_5_omni format holds whole seconds, and data.video.chunk_seconds is {seconds:g}")
    return {"seconds_per_chunk": int(seconds), "use_audio_in_video": bool(data.video.audio)}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The feature extractor's stand among those of images."""
    files = qwen2_vl.processor_json(config, data)
    files = {name: {**keys, "processor_class": "Qwen2_5OmniProcessor"} for name, keys in files.items()}
    frames = EXTRACTOR_SECONDS * whisper.SAMPLE_RATE // whisper.HOP
    files["preprocessor_config.json"] |= {
        **whisper.write_processor(config.audio, frames),
        "return_attention_mask": True,
    }
    return files
