"""What can be wrong with the data of a run, known before any rank starts or found out while it trains."""

import math
from dataclasses import replace

from avlm.config.model import ModelConfig
from avlm.config.run import Config, DataConfig, StageConfig, is_hf, is_json, may_be_there, shares
from avlm.data.bad_samples import Look, look
from avlm.data.loader import open_loader
from avlm.data.media.area import halved, tokens_a_side
from avlm.data.stream import Stream
from avlm.data.text.chat import check_vocabulary
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.freezing import trained_names
from avlm.models.shapes import parameter_shapes


def check_data(config: Config) -> list[list[Look]]:
    """Raise ValueError or FileNotFoundError for data sources, tokenizers and rows that cannot be used.

    Returns, for each stage, what looking at the first samples of its sources found; nothing for synthetic rows.
    """
    for stage in config.stages:
        for source in [*shares(stage.data.train), *stage.data.validation.values()]:
            if not may_be_there(source):
                raise FileNotFoundError(f"stage {stage.name}: no data at {source}")
        if not all(source.startswith("synthetic") for source in shares(stage.data.train)):
            part = "text" if stage.objective == "contrastive" else "decoder"
            size = getattr(config.model, part).vocab_size
            check_vocabulary(Tokenizer(stage.data.tokenizer), size, f"model.{part}.vocab_size")
    check_room_for_media(config)
    looks: list[list[Look]] = []
    checked: list[tuple[str, DataConfig]] = []
    for stage in config.stages:
        read = stage.objective, replace(stage.data, validation={}, metrics={})
        looks.append(looks[checked.index(read)] if read in checked else _check_training(config, stage))
        checked.append(read)
        if config.train.validate_every:
            _check_validation(config, stage)
    return looks


def check_room_for_media(config: Config) -> None:
    """A stage that trains a tower or its projector needs rows that hold one of its media.

    Windows of true length may be short, and a stage of text needs no such room: there a sample that is too long is
    skipped by name.
    """
    for stage in config.stages:
        _check_room(config.model, stage)


def _check_room(model: ModelConfig, stage: StageConfig) -> None:
    trained = {name.split(".")[0] for name in trained_names(stage, model, parameter_shapes(model))}
    sizes = {}
    if {"vision", "vision_projector"} & trained:
        sizes["vision"] = ("the smallest image or frame", _least_image(model, stage.data))
    if {"audio", "audio_projector"} & trained and model.audio.window == "fixed":
        tokens = model.tokens_of("audio", model.audio.window_frames)
        sizes["audio"] = ("an audio window", tokens)
    for tower, (item, tokens) in sizes.items():
        if tokens > stage.data.seq_length:
            fix = f"model.{tower}_projector.downsample"
            resampler = getattr(model, f"{tower}_projector").resampler
            if resampler is not None and resampler.num_queries:
                fix = f"lower model.{tower}_projector.resampler.num_queries"
            elif tower == "vision" and model.vision.any_grid:
                fix = "lower the least of data.image_tokens"
            raise ValueError(
                f"stage {stage.name}: {item} takes {tokens} tokens, more than data.seq_length="
                f"{stage.data.seq_length}: raise it, or {fix}"
            )


def _least_image(model: ModelConfig, data: DataConfig) -> int:
    """Features of the smallest image, or frame of a video."""
    vision = model.vision
    if vision.any_grid and model.vision_projector.resampler is None and model.cross is None:
        return math.ceil(data.image_tokens[0]) if vision.resize == "area" else 1
    return math.prod(halved(tokens_a_side((vision.patches_per_side,) * 2, model), model))


def _check_training(config: Config, stage: StageConfig) -> list[Look]:
    """The training data of a stage, however late it comes, can be opened, and most of its first samples can be used."""
    data = stage.data
    options = {"rank": 0, "world": 1, "seed": config.seed, "objective": stage.objective}
    stream = Stream(data.train, data, config.model, **options, train=True)
    try:
        if isinstance(data.train, str) and not (is_json(data.train) or is_hf(data.train)):
            open_loader(stream)
        looks = look(stream) if stream.has_samples else []
        for found in looks:
            _check_look(found, data.max_bad_fraction)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"stage {stage.name}: data.train: {error}") from None
    return looks


def _check_look(found: Look, max_bad_fraction: float) -> None:
    if len(found.bad) == found.looked_at:
        key, reason = found.bad[0]
        raise ValueError(f"no sample of {found.source} can be used; {key}: {reason}")
    if is_too_bad(found.looked_at, len(found.bad), max_bad_fraction):
        raise ValueError(
            f"{'; '.join(found.lines())}; more than data.max_bad_fraction={max_bad_fraction}: repair the data, or "
            "raise it"
        )


def _check_validation(config: Config, stage: StageConfig) -> None:
    for name, source in stage.data.validation.items():
        try:
            options = {"rank": 0, "world": 1, "seed": config.seed, "objective": stage.objective}
            open_loader(Stream(source, stage.data, config.model, **options, train=False))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"stage {stage.name}: data.validation.{name}: {error}") from None


def check_skipped(read: float, skipped: float, max_fraction: float, num_samples: int | None = None) -> None:
    """Stop a run whose data is mostly broken. ``num_samples``: of the set, whose bad ones count in every pass."""
    passes = math.ceil(read / num_samples) if num_samples else 1
    if is_too_bad(read, skipped, max_fraction, max(passes, 1)):
        raise ValueError(
            f"{skipped:.0f} of {read:.0f} samples were bad and skipped (named above), more than "
            f"data.max_bad_fraction={max_fraction}: repair the data, or raise it"
        )


def is_too_bad(read: float, skipped: float, max_fraction: float, passes: int = 1) -> bool:
    """Ten bad samples of each pass are forgiven, however early they come."""
    return skipped > max(10.0 * passes, max_fraction * read)
