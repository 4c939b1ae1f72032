"""Batches made by hand, and the rule that gradients are compared by."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import InitFrom
from avlm.data.packing import patch_rows
from avlm.models.avlm import AVLM, init
from avlm.models.batch import AUDIO, IGNORE, IMAGE, Batch
from avlm.weights.load import Report, load_weights
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

    ``images`` are normalised pixels (I, 3, S, S), ``clips`` mel windows (M, W) of any even length W.
    """
    token_T = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
    target_T = torch.tensor([t for d in documents for t in [*d[1:], IGNORE] if d], dtype=torch.int64)
    target_T[target_T < 0] = IGNORE
    target_rows = (target_T >= 0).nonzero().flatten()[:num_targets]
    vision, audio = config.vision, config.audio
    if images is None:
        images = torch.empty(0, 3, vision.image_size if vision else 2, vision.image_size if vision else 2)
    patches = (vision.image_size // vision.patch_size) ** 2 + vision.class_token if vision else 0
    width = max((clip.shape[1] for clip in clips), default=2)
    mel = torch.zeros(len(clips), audio.num_mels if audio else 1, width)
    stack = config.audio_projector.downsample if audio else 1
    mel_rows, frame_rows, start = [], [], 0
    for i, clip in enumerate(clips):
        mel[i, :, : clip.shape[1]] = clip
        kept = clip.shape[1] // 2
        mel_rows.append(torch.arange(kept) + i * (width // 2))
        rows = torch.full((-(-kept // stack) * stack,), -1)
        rows[:kept] = torch.arange(start, start + kept)
        frame_rows.append(rows.view(-1, stack))
        start += kept
    return Batch(
        token_T=token_T,
        position_T=torch.cat([torch.arange(len(document)) for document in documents]),
        segments=Segments.of([len(document) for document in documents]),
        target_rows_R=target_rows,
        target_R=target_T[target_rows],
        kind_R=torch.zeros_like(target_rows),
        pixels=images,
        image_segments=Segments.of([patches] * len(images)),
        patch_rows_F=(
            patch_rows(len(images), vision, config.vision_projector.downsample)
            if vision
            else torch.zeros(0, 1, dtype=torch.int64)
        ),
        image_rows_F=(token_T == IMAGE).nonzero().flatten(),
        mel=mel,
        mel_rows_K=torch.cat([torch.arange(0), *mel_rows]),
        audio_segments=Segments.of([clip.shape[1] // 2 for clip in clips]),
        frame_rows_G=torch.cat([torch.zeros(0, stack, dtype=torch.int64), *frame_rows]),
        audio_rows_G=(token_T == AUDIO).nonzero().flatten(),
    )


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


def assert_gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """|g - g'| <= tolerance * max(|g'|, 1e-3 * global norm) per tensor.

    CLIP's k_proj.bias has a gradient that is zero in exact arithmetic: relative to itself it is noise.
    """
    assert ours.keys() == theirs.keys()
    total = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert total > 0
    for name, gradient in ours.items():
        reference = theirs[name].reshape(gradient.shape)
        bound = tolerance * max(reference.norm(), 1e-3 * total)
        assert (gradient - reference).norm() <= bound, f"{name}: {(gradient - reference).norm():.2e} > {bound:.2e}"


def around(config: VisionConfig | AudioConfig) -> tuple[str, ModelConfig]:
    """The smallest model around a tower, and the tower's name in it."""
    tower = "vision" if isinstance(config, VisionConfig) else "audio"
    decoder = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    return tower, ModelConfig(decoder=decoder, **{tower: config, f"{tower}_projector": ProjectorConfig()})


def build_tower(config: VisionConfig | AudioConfig) -> nn.Module:
    name, model = around(config)
    return getattr(build(model), name)


def load_tower(config: VisionConfig | AudioConfig, folder: Path) -> tuple[nn.Module, Report]:
    """A tower with the weights of a folder, and the report of the loading."""
    name, config = around(config)
    model = AVLM(config)
    [report] = load_weights(model, InitFrom(**{name: str(folder)}))
    return getattr(model, name), report
