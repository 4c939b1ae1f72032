"""Trained weights out: safetensors, config.json and tokenizer of a model folder, ours or Hugging Face's."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avlm.config.load import to_dict
from avlm.config.model import LoraConfig, ModelConfig
from avlm.config.run import DataConfig
from avlm.data.text.chat import Tokenizer
from avlm.data.text.export import MEDIA_TOKENS, media_token, write_tokenizer
from avlm.families.export_configs import (
    decoder_keys,
    llava_keys,
    picture_keys,
    processor_keys,
    sound_keys,
    voxtral_keys,
)
from avlm.families.tables import hugging_face_name
from avlm.models.lora import is_adapter, merge
from avlm.models.whisper import sinusoids
from avlm.parallel.mesh import World
from avlm.storage.model_folder import Lazy, publish, write_json, write_tensors
from avlm.weights.peft import adapter_keys, peft_names
from avlm.weights.sources import Stored

FORMATS = ("avlm", "decoder", "llava", "voxtral", "adapter")
PROMPT_KEYS = ["template", "system", "seq_length", "video", "max_media_bytes", "max_image_pixels", "max_audio_seconds"]
ADAPTER = ("lora_down.weight", "lora_up.weight", "lora_magnitude")
State = dict[str, Lazy]


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor | Stored],
    folder: str | Path,
    format: str = "avlm",
    *,
    data: DataConfig | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    overwrite: bool = False,
    world: World | None = None,
) -> None:
    """Write a model folder: safetensors, config.json, generation_config.json and the tokenizer of ``data``.

    avlm     every module under our names; ``config.json`` also holds what encoding a prompt needs
    decoder  LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM; towers are left out
    llava    LlavaForConditionalGeneration
    voxtral  VoxtralForConditionalGeneration; a tied head is written beside the embedding, as Voxtral ties none
    adapter  the decoder's adapters for PEFT, on the decoder ``base``; all other formats have adapters merged

    ``state`` holds tensors under our parameter names, whole on the CPU or stored, and read when they are written;
    ``dtype`` casts them. The folder is there when it is whole; one that was there stays until then, and is replaced
    only with ``overwrite``. The ranks of ``world`` share the work. Raises ValueError or OSError.
    """
    folder = Path(folder)
    lazy = {name: Lazy.of(tensor) for name, tensor in state.items()}
    if config.lora and format != "adapter":
        config, lazy = dataclasses.replace(config, lora=None), merged(lazy, config.lora, dtype)
    if config.decoder.tie_embedding:
        lazy.pop("decoder.head.weight", None)
    tokenizer = Tokenizer(data.tokenizer) if data is not None and data.tokenizer else None
    media = MEDIA_TOKENS.get(format)
    token = media_token(tokenizer, media, config.decoder.vocab_size) if media else None
    keys, tensors = _formatted(format, config, lazy, data, token, base)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        write_tensors(tensors, partial, world, "adapter_model" if format == "adapter" else "model")
        if world is not None and not world.is_first:
            return
        if format == "adapter":
            return write_json(partial / "adapter_config.json", keys)
        if tokenizer is not None:
            write_tokenizer(tokenizer, data, partial, format, token, keys.get("model_type"))
        if media:
            processor = picture_keys(config.vision) if format == "llava" else sound_keys(config.audio)
            write_json(partial / "preprocessor_config.json", processor)
        if format == "llava":
            write_json(partial / "processor_config.json", processor_keys(config.vision, media))
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_json(partial / "config.json", {**keys, "torch_dtype": stored})

    publish(folder, write, overwrite, world)


def _formatted(
    format: str, config: ModelConfig, state: State, data: DataConfig | None, token: int | None, base: str | None
) -> tuple[dict[str, Any], State]:
    """The keys of a format's config, and its tensors under its names."""
    if format == "avlm":
        prompt = {key: value for key, value in to_dict(data).items() if key in PROMPT_KEYS} if data is not None else {}
        return {"architecture": "AVLM", "model": to_dict(config), "data": prompt}, state
    if format == "decoder":
        return decoder_keys(config.decoder), _renamed(state, {"decoder": "model."}, "lm_head.weight")
    if format == "adapter":
        names = peft_names(state)
        if not names:
            raise ValueError("the adapter format holds adapters of the decoder, and the model has none")
        return adapter_keys(config, state, base), {theirs: state[name] for name, theirs in names.items()}
    if format not in MEDIA_TOKENS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    keys = llava_keys(config, token) if format == "llava" else voxtral_keys(config, token)
    tensors = _llava_state(config, state) if format == "llava" else _voxtral_state(config, state)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            tensors[name] = _padded(tensors[name], token + 1)
            keys["text_config"]["vocab_size"] = tensors[name].shape[0]
    return keys, tensors


def merged(state: State, config: LoraConfig, dtype: torch.dtype | None = None) -> State:
    """Weights with adapters in them, in ``dtype`` (None: that of the base), each computed when it is read."""
    done = {}
    for name, base in state.items():
        adapter = [state.get(f"{name.removesuffix('.weight')}.{part}") for part in ADAPTER]
        if adapter[0] is not None:
            done[name] = base.changed(functools.partial(_merge, adapter, config), dtype=torch.float32)
            done[name] = done[name].to(dtype or base.dtype)
        elif not is_adapter(name):
            done[name] = base
    return done


def _merge(adapter: list[Lazy | None], config: LoraConfig, base_OI: Tensor) -> Tensor:
    return merge(base_OI, *(part and part.read() for part in adapter), config)


def _renamed(state: State, prefixes: dict[str, str], head: str) -> State:
    """The modules of ``prefixes`` under Hugging Face's names."""
    renamed = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module in prefixes:
            theirs = head if name == "decoder.head.weight" else prefixes[module] + hugging_face_name(module, rest)
            renamed[theirs] = tensor
    return renamed


def _llava_state(config: ModelConfig, state: State) -> State:
    """Layout of the Hub's LLaVA-1.5."""
    vision = "vision_tower.vision_model."
    prefixes = {"decoder": "language_model.model.", "vision": vision, "vision_projector": "multi_modal_projector."}
    state = _renamed(state, prefixes, "language_model.lm_head.weight")
    side = config.vision.patch_size
    patch = f"{vision}embeddings.patch_embedding.weight"
    shape = (config.vision.hidden_size, 3, side, side)
    state[patch] = state[patch].changed(lambda tensor: tensor.view(shape), shape=shape)
    token = f"{vision}embeddings.class_embedding"
    if token in state:
        state[token] = state[token].changed(lambda tensor: tensor[0], shape=shape[:1])
    # Of use to the pooled output only, which no LLaVA reads; transformers wants it all the same.
    norm = state[f"{vision}encoder.layers.0.layer_norm1.weight"]
    state[f"{vision}post_layernorm.weight"] = norm.changed(torch.ones_like)
    state[f"{vision}post_layernorm.bias"] = norm.changed(torch.zeros_like)
    return state


def _voxtral_state(config: ModelConfig, state: State) -> State:
    """Layout of the Hub's Voxtral."""
    prefixes = {
        "decoder": "language_model.model.",
        "audio": "audio_tower.",
        "audio_projector": "multi_modal_projector.",
    }
    state = _renamed(state, prefixes, "language_model.lm_head.weight")
    tied = state["language_model.model.embed_tokens.weight"].changed(torch.clone)  # safetensors shares no memory
    state.setdefault("language_model.lm_head.weight", tied)
    rows, width = config.audio.max_positions, config.audio.hidden_size
    position = Lazy((rows, width), torch.float32, lambda: sinusoids(torch.arange(rows), width))
    return {**state, "audio_tower.embed_positions.weight": position.to(state["audio_tower.conv1.weight"].dtype)}


def _padded(embedding: Lazy, rows: int) -> Lazy:
    """At least so many rows, for a media token that is never an answer: the mean row, whose logit is the mean of the
    others, so it never wins."""
    short = rows - embedding.shape[0]
    if short <= 0:
        return embedding
    pad = lambda table_VD: torch.cat([table_VD, table_VD.mean(0, keepdim=True).expand(short, -1)])
    return embedding.changed(pad, shape=(rows, embedding.shape[1]))
