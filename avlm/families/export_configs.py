"""config.json, preprocessor_config.json and processor_config.json of the formats of Hugging Face that we write; what a
format cannot hold is refused by the name of the key."""

from typing import Any

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, VisionConfig
from avlm.families.pretrained import ACTIVATIONS, RESAMPLE
from avlm.models.log_mel import FFT, HOP, SAMPLE_RATE


def decoder_keys(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a decoder in the older dialect, which every version of transformers reads."""
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no Hugging Face architecture has both qkv_bias and qk_norm")
    model_type = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_position,
    }
    return {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type] + "ForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embedding,
    }


def llava_keys(config: ModelConfig, image_token: int) -> dict[str, Any]:
    """config.json of a LLaVA; its tower has the layers that we build, so its features are those of the last one."""
    vision, projector = config.vision, config.vision_projector
    if vision is None or config.audio is not None:
        raise ValueError("the llava format holds a decoder with a vision tower and without an audio tower")
    if projector.type != "mlp2x_gelu" or projector.downsample != 1 or vision.post_norm:
        raise ValueError("the llava format holds an mlp2x_gelu projector without downsampling, and no post_norm")
    if projector.hidden_size not in (0, config.decoder.hidden_size):
        raise ValueError(f"the llava format has no vision_projector.hidden_size={projector.hidden_size}")
    if not vision.class_token == vision.pre_norm != vision.patch_bias:
        raise ValueError("the llava format holds a CLIP or a SigLIP tower")
    num_patches = vision.num_patches
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": _feature_strategy(vision),
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": decoder_keys(config.decoder),
        "vision_config": {
            "model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers + 1 + vision.feature_layer,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[vision.activation],
            "layer_norm_eps": vision.norm_eps,
            "vision_use_head": False,
        },
    }


def voxtral_keys(config: ModelConfig, audio_token: int) -> dict[str, Any]:
    """config.json of a Voxtral. It encodes whole windows, and its projector, which has no biases, takes as many rows
    side by side as make the width of the encoder's MLP."""
    audio, projector = config.audio, config.audio_projector
    if audio is None or config.vision is not None:
        raise ValueError("the voxtral format holds a decoder with an audio tower and without a vision tower")
    if projector.type != "mlp2x_gelu" or projector.bias:
        raise ValueError("the voxtral format holds an audio_projector of type mlp2x_gelu with bias=false")
    if projector.hidden_size not in (0, config.decoder.hidden_size):
        raise ValueError(f"the voxtral format has no audio_projector.hidden_size={projector.hidden_size}")
    if audio.window != "fixed":
        raise ValueError("the voxtral format holds whole windows: audio.window=fixed")
    if projector.downsample * audio.hidden_size != audio.intermediate_size:
        raise ValueError(
            f"the voxtral format stacks as many rows as make audio.intermediate_size={audio.intermediate_size}, which "
            f"audio_projector.downsample={projector.downsample} of {audio.hidden_size} numbers do not"
        )
    if audio.max_positions % projector.downsample:
        raise ValueError(
            f"the voxtral format wants audio.max_positions={audio.max_positions} to be a multiple of "
            f"audio_projector.downsample={projector.downsample}"
        )
    return {
        "architectures": ["VoxtralForConditionalGeneration"],
        "model_type": "voxtral",
        "audio_token_id": audio_token,
        "projector_hidden_act": "gelu",
        "text_config": decoder_keys(config.decoder) | {"tie_word_embeddings": False},
        "audio_config": {
            "model_type": "voxtral_encoder",
            "hidden_size": audio.hidden_size,
            "intermediate_size": audio.intermediate_size,
            "num_hidden_layers": audio.num_layers,
            "num_attention_heads": audio.num_heads,
            "num_mel_bins": audio.num_mels,
            "max_source_positions": audio.max_positions,
            "activation_function": "gelu",
            "scale_embedding": False,
        },
    }


def sound_keys(audio: AudioConfig) -> dict[str, Any]:
    """preprocessor_config.json of Whisper's windows."""
    samples = 2 * audio.max_positions * HOP
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": audio.num_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": FFT,
        "chunk_length": samples // SAMPLE_RATE,
        "n_samples": samples,
        "nb_max_frames": 2 * audio.max_positions,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def picture_keys(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json of CLIP or SigLIP."""
    side = {"height": vision.image_size, "width": vision.image_size}
    crop = vision.resize == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if crop else side,
        "do_center_crop": crop,
        "crop_size": side,
        "resample": {name: number for number, name in RESAMPLE.items()}[vision.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


def processor_keys(vision: VisionConfig, image_word: str) -> dict[str, Any]:
    """processor_config.json of a LLaVA: a picture is as many ``image_word`` as (side / patch_size)^2 and the additional
    ones, less one under the strategy "default", which drops the class token."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_word,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": _feature_strategy(vision),
    }


def _feature_strategy(vision: VisionConfig) -> str:
    return "default" if vision.class_token else "full"
