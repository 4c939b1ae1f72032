"""Trained weights out: safetensors, config.json and tokenizer of a model folder, ours or Hugging Face's."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from avlm.config import DataConfig, DecoderConfig, ModelConfig, VisionConfig
from avlm.config_file import to_dict
from avlm.data.chat import Chat, Tokenizer
from avlm.models.lora import is_adapter, merge
from avlm.pretrained import ACTIVATIONS, read_json, stop_ids
from avlm.weights_tables import hugging_face_name

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"]
PROMPT_KEYS = ["template", "system", "seq_length", "video", "max_media_bytes", "max_image_pixels", "max_audio_seconds"]
PEFT_NAMES = {"down.weight": "lora_A.weight", "up.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
SHARD_BYTES = 5 * 10**9


def export(
    config: ModelConfig,
    state: dict[str, Tensor],
    folder: str | Path,
    format: str = "avlm",
    *,
    data: DataConfig | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
) -> None:
    """Write a model folder: safetensors, config.json, generation_config.json and the tokenizer of ``data``.

    avlm     every module under our names; ``config.json`` also holds what encoding a prompt needs
    decoder  LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM; towers are left out
    llava    LlavaForConditionalGeneration
    adapter  the decoder's adapters for PEFT, on the decoder ``base``; all other formats have adapters merged

    ``state`` holds whole CPU tensors under our parameter names; ``dtype`` casts them.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    if format == "adapter":
        return write_adapter(config, state, folder, dtype, base)
    if config.lora:
        config, state = dataclasses.replace(config, lora=None), merge(state, config.lora, dtype)
    if config.decoder.tie_embedding:
        state = {name: tensor for name, tensor in state.items() if name != "decoder.head.weight"}
    tokenizer = Tokenizer(data.tokenizer) if data is not None and data.tokenizer else None
    image_token = None
    if format == "avlm":
        prompt = {key: value for key, value in to_dict(data).items() if key in PROMPT_KEYS} if data is not None else {}
        keys = {"architecture": "AVLM", "model": to_dict(config), "data": prompt}
    elif format == "decoder":
        keys, state = decoder_keys(config.decoder), _renamed(state, {"decoder": "model."}, "lm_head.weight")
    elif format == "llava":
        image_token = _image_token(tokenizer, config.decoder.vocab_size)
        keys, state = llava_keys(config, image_token), _llava_state(config, state, image_token)
        keys["text_config"]["vocab_size"] = state["language_model.model.embed_tokens.weight"].shape[0]
    else:
        raise ValueError(f"format {format!r} is not one of avlm, decoder, llava, adapter")

    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    keys["torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(state, folder)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, data.template, folder, image_token)
    if format == "llava":
        _write_json(folder / "preprocessor_config.json", _preprocessor_keys(config.vision))
    _write_json(folder / "config.json", keys)  # last: a folder with it is whole


def write_adapter(
    config: ModelConfig, state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, base: str | None
) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT writes them for the decoder in transformers."""
    ours = {name: tensor for name, tensor in state.items() if name.startswith("decoder.") and is_adapter(name)}
    if not ours:
        raise ValueError("the adapter format holds adapters of the decoder, and the model has none")
    tensors, targets = {}, set()
    for name, tensor in ours.items():
        path, _, part = name.removeprefix("decoder.").partition(".lora_")
        target = f"model.{hugging_face_name('decoder', path)}"
        targets.add(target)
        tensors[f"base_model.model.{target}.{PEFT_NAMES[part]}"] = tensor.to(dtype or tensor.dtype).contiguous()
    leaves = {target.rpartition(".")[2] for target in targets}
    keys = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "use_rslora": config.lora.rslora,
        "use_dora": config.lora.dora,
        "target_modules": sorted(leaves if len(targets) == len(leaves) * config.decoder.num_layers else targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _write_json(folder / "adapter_config.json", keys)


def _renamed(state: dict[str, Tensor], prefixes: dict[str, str], head: str) -> dict[str, Tensor]:
    """The modules of ``prefixes`` under Hugging Face's names."""
    renamed = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module in prefixes:
            theirs = head if name == "decoder.head.weight" else prefixes[module] + hugging_face_name(module, rest)
            renamed[theirs] = tensor
    return renamed


def _llava_state(config: ModelConfig, state: dict[str, Tensor], image_token: int) -> dict[str, Tensor]:
    """Layout of the Hub's LLaVA-1.5; vocabulary padded to hold the image token."""
    vision = "vision_tower.vision_model."
    prefixes = {"decoder": "language_model.model.", "vision": vision, "vision_projector": "multi_modal_projector."}
    state = _renamed(state, prefixes, "language_model.lm_head.weight")
    side = config.vision.patch_size
    patch = f"{vision}embeddings.patch_embedding.weight"
    state[patch] = state[patch].unflatten(1, (3, side, side))
    token = f"{vision}embeddings.class_embedding"
    if token in state:
        state[token] = state[token][0]
    # Of use to the pooled output only, which no LLaVA reads; transformers wants it all the same.
    state[f"{vision}post_layernorm.weight"] = torch.ones_like(state[f"{vision}encoder.layers.0.layer_norm1.weight"])
    state[f"{vision}post_layernorm.bias"] = torch.zeros_like(state[f"{vision}encoder.layers.0.layer_norm1.bias"])
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in state and state[name].shape[0] <= image_token:
            # The mean row: its logit is the mean of the others, so it never wins.
            rows = image_token + 1 - state[name].shape[0]
            state[name] = torch.cat([state[name], state[name].mean(0, keepdim=True).expand(rows, -1)])
    return state


def _image_token(tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """The id of "<image>", or the first that the tokenizer leaves free."""
    if tokenizer is None:
        return vocab_size
    added = read_json(tokenizer.file).get("added_tokens") or []
    return {token["content"]: token["id"] for token in added}.get("<image>", tokenizer.size)


def _copy_tokenizer(tokenizer: Tokenizer, template: str, folder: Path, image_token: int | None) -> None:
    """The tokenizer's files, with "<image>" among its tokens where LLaVA needs it, and the ids that end an answer."""
    for name in TOKENIZER_FILES:
        if tokenizer.file.with_name(name).is_file():
            shutil.copyfile(tokenizer.file.with_name(name), folder / name)
    shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    tree = read_json(tokenizer.file)
    added = tree.get("added_tokens") or []
    if image_token is not None and all(token["content"] != "<image>" for token in added):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"] = [*added, {"id": image_token, "content": "<image>", **flags, "special": True}]
        _write_json(folder / "tokenizer.json", tree)
    stops = {*stop_ids(tokenizer.file.parent), *Chat(tokenizer, template).stop_ids}
    _write_json(folder / "generation_config.json", {"eos_token_id": sorted(stops)})


def _preprocessor_keys(vision: VisionConfig) -> dict:
    side = {"height": vision.image_size, "width": vision.image_size}
    crop = vision.resize == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if crop else side,
        "do_center_crop": crop,
        "crop_size": side,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


def write_tensors(state: dict[str, Tensor], folder: Path) -> None:
    """One model.safetensors, or shards of at most SHARD_BYTES with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        return save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


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
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
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
