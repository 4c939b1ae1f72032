"""Batches made by hand, and the rule that gradients are compared by."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import InitFrom
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack_media
from avlm.data.sample import EncodedSample, Items, placeholders
from avlm.models.avlm import AVLM
from avlm.models.batch import (
    AUDIO,
    IGNORE,
    IMAGE,
    NEWLINE,
    Batch,
    Features,
    Media,
    no_media,
    seen_segments,
    text_positions,
)
from avlm.models.initial import init
from avlm.weights.load import Report, init_weights, load_weights
from kernels.segments import Segments

transformers.utils.logging.set_verbosity_error()


def make_batch(
    config: ModelConfig,
    documents: list[list[int]],
    images: Tensor | None = None,
    clips: list[Tensor] = (),
    num_targets: int | None = None,
) -> Batch:
    """Documents of token ids, media placeholders written out; each row learns the next text token.

    ``images`` are pixels as for ``images_of``, ``clips`` mel windows (M, W) of any even length W.
    """
    token_T = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
    target_T = torch.tensor([t for d in documents for t in [*d[1:], IGNORE] if d], dtype=torch.int64)
    target_T[target_T < 0] = IGNORE
    target_rows = (target_T >= 0).nonzero().flatten()[:num_targets]
    image, audio = no_media(config).values()
    if config.vision:
        image = images_of(config.vision, images, config.vision_projector.downsample)
    if config.audio:
        audio = windows_of(config.audio, list(clips), config.audio_projector.downsample)
    whole = Segments.of([len(document) for document in documents])
    return Batch(
        token_T=token_T,
        position_T=torch.cat([text_positions(len(document), config.decoder) for document in documents], dim=-1),
        **seen_segments(whole, token_T, target_rows, config.decoder),
        target_rows_R=target_rows,
        target_R=target_T[target_rows],
        kind_R=torch.zeros_like(target_rows),
        image=dataclasses.replace(
            image, rows=(token_T == IMAGE).nonzero().flatten(), newlines=(token_T == NEWLINE).nonzero().flatten()
        ),
        audio=dataclasses.replace(audio, rows=(token_T == AUDIO).nonzero().flatten()),
    )


def pixels_of(num_images: int, side: int) -> Tensor:
    """Random pixels, uint8 (I, 3, side, side)."""
    return torch.randint(256, (num_images, 3, side, side), dtype=torch.uint8)


def normalised(pixels: Tensor, vision: VisionConfig) -> Tensor:
    """Pixels in 0..255 as a processor of transformers gives them, (I, 3, S, S)."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return (pixels.float() - mean) / std


def images_of(vision: VisionConfig, images: Tensor | Sequence[Tensor] | None, downsample: int = 1) -> Media:
    """Media of pixels in 0..255, (I, 3, S, S), or of images of their own sizes, (frames_per_patch, 3, H, W) each;
    features are written one after the other."""
    items = [
        cut_into_patches(image if image.ndim == 4 else image[None], vision)
        for image in (() if images is None else images)
    ]
    return _media_of("image", items, vision, downsample)


def windows_of(audio: AudioConfig, clips: list[Tensor], downsample: int = 1) -> Media:
    """Media of windows (M, W) of any even length W; features are written one after the other."""
    return _media_of("audio", clips, audio, downsample)


def features_at(rows: Tensor, sources: Tensor, **others: Tensor) -> Media:
    """Media of which only features are given, for a projector."""
    nothing = torch.arange(0)
    found = {"newlines": nothing, **others}
    features = Features(sources, found.pop("mix", None), found.pop("weights", None))
    return Media(torch.empty(0), [], Segments.of([]), features, rows, **found)


def _media_of(modality: str, items: list[Tensor], config: VisionConfig | AudioConfig, downsample: int) -> Media:
    _, model = around(config, downsample)
    token_T = torch.tensor(placeholders(modality, items, model), dtype=torch.int64)
    media: Items = {modality: items}
    return pack_media([EncodedSample("", "mixed", token_T, token_T, media)], token_T, model)[modality]


def build(config: ModelConfig, seed: int = 0) -> AVLM:
    """A random model with biases and norms that are not 0 and 1, so that none of them can be forgotten."""
    model = AVLM(config)
    init(model, seed)
    torch.manual_seed(seed)
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Add noise to every parameter of a fresh model: zero biases and unit norms would hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embed_positions" not in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def save(model, folder: Path) -> Path:
    """A transformers model, shaken and saved."""
    shake(model.eval())
    model.save_pretrained(folder)
    return folder


def loaded(config: ModelConfig, **init_from: Path) -> AVLM:
    """Our model with what ``init_from`` holds; everything else would be NaN."""
    model = AVLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_weights(model, InitFrom(**{key: str(folder) for key, folder in init_from.items()}))
    return model


@torch.no_grad()
def adapted(config: ModelConfig, folder: Path, targets: list[str], entry: str = "all") -> AVLM:
    """A folder's model, with random adapters if there are any targets."""
    model = AVLM(dataclasses.replace(config, lora=LoraConfig(rank=2, alpha=2.0, targets=targets) if targets else None))
    init_weights(model, InitFrom(**{entry: str(folder)}), seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> float:
    """|g - g'| <= tolerance * max(|g'|, 1e-3 * global norm) per tensor. Returns the largest |g - g'| / max(...).

    CLIP's k_proj.bias has a gradient that is zero in exact arithmetic: relative to itself it is noise.
    """
    assert ours.keys() == theirs.keys()
    total = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert total > 0
    errors = {}
    for name, gradient in ours.items():
        reference = theirs[name].reshape(gradient.shape)
        errors[name] = float((gradient - reference).norm() / max(reference.norm(), 1e-3 * total))
        assert errors[name] <= tolerance, f"{name}: {errors[name]:.2e} > {tolerance:.2e}"
    return max(errors.values())


def around(config: VisionConfig | AudioConfig, downsample: int = 1) -> tuple[str, ModelConfig]:
    """The smallest model around a tower, and the tower's name in it."""
    tower = "vision" if isinstance(config, VisionConfig) else "audio"
    decoder = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    return tower, ModelConfig(
        decoder=decoder, **{tower: config, f"{tower}_projector": ProjectorConfig(downsample=downsample)}
    )


def build_tower(config: VisionConfig | AudioConfig) -> nn.Module:
    name, model = around(config)
    return getattr(build(model), name)


def load_tower(config: VisionConfig | AudioConfig, folder: Path) -> tuple[nn.Module, Report]:
    """A tower with the weights of a folder, and the report of the loading."""
    name, config = around(config)
    model = AVLM(config)
    [report] = load_weights(model, InitFrom(**{name: str(folder)}))
    return getattr(model, name), report
