"""What a run is: nested dataclasses, read from one YAML file by ``avlm.config.load``.

The model's part is ``avlm.config.model``. Fields stand in the order of their importance; every number has its range.
"""

import math
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from avlm.config.contrastive import ALIGNMENT, AlignmentModule, Objective
from avlm.config.duplex import DuplexConfig, check_duplex
from avlm.config.media import Bounds, ImageLayout, Marks, VideoConfig, check_bounds, check_places, with_new_names
from avlm.config.model import MODULES, TOWERS, ModelConfig, Module
from avlm.config.parallel import ParallelConfig
from avlm.config.values import (
    Count,
    Epsilon,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    Tokens,
    Whole,
    config,
    counted,
    require,
    shown,
)


def may_change(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A field that may differ between a run and its resume; any other keeps the value that the run began with."""
    return field(default=default, default_factory=default_factory, metadata={"may_change": True})


HF = "hf://"  # what sources of Hugging Face's datasets library begin with
Part = Literal[Module, AlignmentModule, "lora"]  # lora: the adapters of all towers
FREEZE_FLAGS = {
    "freeze_language_model": "decoder",
    "freeze_vision_model": "vision",
    "freeze_audio_model": "audio",
    "freeze_vision_projection": "vision_projector",
    "freeze_audio_projection": "audio_projector",
}  # of a stage, as NeMo calls them -> module


@config
class InitFrom:
    """Where initial weights come from: Hugging Face folders or Hub names, exports, runs or their checkpoints, and
    .ckpt, .pt or .pth files. Parameters that none of them holds are initialised at random."""

    decoder: str | None = None
    vision: str | None = None
    audio: str | None = None
    all: str | None = None  # every module that it and the model share; a tower's own entry wins
    adapter: str | None = None  # a PEFT folder with the decoder's adapters
    allow_missing: list[str] = field(default_factory=list)  # regular expressions: parameters that sources may lack
    allow_unused: list[str] = field(default_factory=list)  # regular expressions: tensors of the sources to leave out


def _checked_sources(train: Any) -> Any:
    """The sources of a blend in the order of their names: a loader's state knows them by their place, and a resumed run
    may name them in another order."""
    if isinstance(train, str):
        return train
    if not (isinstance(train, dict) and train and all(map(_is_weighted, train.items()))):
        raise ValueError(
            f"give a source, or sources with weights such as {{a.jsonl: 3, b.jsonl: 1}}, not {shown(train)}"
        )
    return dict(sorted(train.items()))


def _is_weighted(item: tuple[Any, Any]) -> bool:
    source, weight = item
    return isinstance(source, str) and type(weight) in (int, float) and 0 < weight < math.inf


@config
class DataConfig:
    train: Annotated[str | dict[str, Positive], BeforeValidator(_checked_sources)]
    # Energon folder or metadataset YAML (or its msc:// path), .json or .jsonl file, a data set of Hugging Face's
    # datasets library, hf://NAME?split=train (avlm.data.hf), or "synthetic"; or several of all but the last with their
    # weights: {a.jsonl: 3, shards: 1} draws three samples of a.jsonl for each of shards
    validation: dict[str, str] = may_change(default_factory=dict)  # name -> source
    metrics: dict[str, list[str]] = may_change(default_factory=dict)
    # validation set -> metrics of its answers: exact_match (the default), wer, cer, rouge_l, vqa_accuracy, cider;
    # wer_basic, wer_english, cer_basic and cer_english fix how text is normalised (avlm.evaluation.scores)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    # NAME of hf://NAME -> the record that a row becomes: its keys, and texts in which {column} stands for what the row
    # has there: {cord: {image: "{image}", question: Read it., answer: "{ground_truth.gt_parse}"}}. Other columns are
    # not read; without an entry the columns are the record's keys
    tokenizer: str = ""  # folder with tokenizer.json, or the file
    template: Literal["plain", "paligemma", "llava", "mistral", "smolvlm", "llama3", "chatml", "tokenizer"] = "llama3"
    # tokenizer: its own Jinja template
    seq_length: Tokens = 8192  # tokens of a packed row
    system: str | None = None  # system prompt of samples that have none
    media_root: str | None = may_change(None)  # folder of a JSON file's media; null: the folder of the file
    num_workers: Annotated[int, Field(ge=0, le=1024)] = may_change(2)  # worker processes of each rank; 0: none
    packing: Literal["knapsack", "first_fit"] = "knapsack"
    packing_buffer: Count = 200  # samples that are packed together
    shuffle_buffer: Whole = 1000  # samples of a set of Energon or one that streams, in each worker
    shuffle_buffer_bytes: Count = 2**30  # and no more samples than that many bytes are, encoded as in their files
    max_bad_fraction: Share = may_change(0.01)  # bad samples among those read; above it the run stops
    max_media_bytes: Count = 256 * 2**20  # of one encoded image, audio file or video
    max_image_pixels: Count = 100_000_000
    max_audio_seconds: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    image_tokens: Bounds = field(default_factory=lambda: [4.0, 16384.0])
    # features of an image with model.vision.resize=area; with fractions any area in pixels can be given:
    # tokens * (patch_size * downsample)^2
    markers: dict[Literal["image", "audio", "video"], Marks] = field(default_factory=dict)
    # around the features of each medium: text with control tokens, such as {image: [<|vision_start|>, <|vision_end|>]};
    # "" for none, {n} for the number of the medium among those of its kind
    image_layout: ImageLayout = field(default_factory=ImageLayout)
    video: Annotated[VideoConfig, BeforeValidator(with_new_names)] = field(default_factory=VideoConfig)
    duplex: DuplexConfig | None = None  # records have recordings and the agent's words: a token for each 80 ms

    def __post_init__(self) -> None:
        check_bounds("image_tokens", self.image_tokens)
        for kind, markers in self.markers.items():
            check_places(f"markers.{kind}", markers, ["n"])


def shares(train: str | dict[str, float]) -> dict[str, float]:
    """The sources of ``data.train``, each with its share of the samples that are drawn."""
    weights = {train: 1.0} if isinstance(train, str) else train
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()}


def is_json(source: str) -> bool:
    """Whether a data source is a file of JSON records."""
    return "://" not in source and Path(source).suffix in (".json", ".jsonl")


def is_hf(source: str) -> bool:
    """Whether a data source is one of Hugging Face's datasets library."""
    return source.startswith(HF)


def hf_name(source: str) -> str:
    """NAME of hf://NAME?split=train."""
    name, _, _ = source.removeprefix(HF).partition("?")
    return name


def may_be_there(source: str) -> bool:
    """Whether a data source exists, as far as that is known before it is opened."""
    return source.startswith("synthetic") or "://" in source or Path(source).exists()


@config
class OptimizerConfig:
    """AdamW with linear warmup and a cosine to min_lr."""

    lr: NonNegative
    min_lr: NonNegative | None = None  # null: lr / 10
    warmup_steps: Whole | None = None  # null: 150, or a tenth of the stage's steps if that is less
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    eps: Epsilon = 1e-5
    weight_decay: NonNegative = 0.1  # not of biases, norms and position embeddings
    moments: Literal["fp32", "bf16"] = "fp32"  # how both are held; bf16, rounded at random, takes half of the memory
    clip_norm: NonNegative | None = 1.0  # of all gradients; null: no clipping
    lr_scale: dict[Part, NonNegative] = field(default_factory=dict)
    # module -> factor on lr and min_lr; adapters take that of lora if it is given

    def __post_init__(self) -> None:
        require(
            self.min_lr is None or self.min_lr <= self.lr,
            f"min_lr={self.min_lr} is above lr={self.lr}: the learning rate would rise to the end",
        )
        require(self.clip_norm != 0, "clip_norm=0 would train nothing: for no clipping set clip_norm: null")


@config
class ResumeConfig:
    """``resume: auto`` is short for ``resume: {checkpoint: auto}``."""

    checkpoint: str = "auto"  # auto: the newest complete one of output_dir; never; or a checkpoint folder
    allow: list[str] = field(default_factory=list)  # keys of the optimizer that may change, such as optimizer.lr

    def __post_init__(self) -> None:
        known = [f"optimizer.{each.name}" for each in fields(OptimizerConfig)]
        for key in self.allow:
            require(key in known, f"allow names {shown(key)}, and only these may change: {', '.join(known)}")


@config
class StageConfig:
    """A stretch of training. ``optimizer`` and ``data`` hold the keys that differ from the run's own.

    ``train`` or the freeze flags choose what trains; patterns of parameter names then change that choice
    (``avlm.models.freezing``).
    """

    name: str
    steps: Whole = 0  # 0: those that epochs take
    epochs: Positive | None = may_change(None)  # passes over the samples of data.train, if steps are not given
    optimizer: OptimizerConfig
    data: DataConfig
    objective: Objective = "answers"
    # contrastive: media are compared with their captions, by their towers and model.text; the decoder does not run
    train: Annotated[list[Part], Field(min_length=1)] | None = None
    freeze_language_model: bool | None = None  # the decoder
    freeze_vision_model: bool | None = None
    freeze_audio_model: bool | None = None
    freeze_vision_projection: bool | None = None
    freeze_audio_projection: bool | None = None
    freeze_params: list[str] = field(default_factory=list)  # regular expressions; adapters are left alone
    prevent_freeze_params: list[str] = field(default_factory=list)  # regular expressions: these train after all

    def __post_init__(self) -> None:
        require(self.steps > 0 or self.epochs is not None, "missing key steps (or epochs)")
        flags = [flag for flag in FREEZE_FLAGS if getattr(self, flag) is not None]
        if self.train is not None and flags:
            raise ValueError(f"train and {flags[0]} both say what trains: give one of them")
        if self.train is None and not flags and not self.freeze_params:
            raise ValueError(f"missing key train (or one of {', '.join(FREEZE_FLAGS)}, freeze_params)")
        odd = [name for name in self.train or [] if name in self.idle]
        require(not odd, f"train names {odd and odd[0]}, which does not run with objective={self.objective}")

    @property
    def idle(self) -> list[str]:
        """Modules that do not run, and so do not train."""
        towers = TOWERS.values()
        return [name for name in MODULES if name not in towers] if self.objective == "contrastive" else [*ALIGNMENT]


Recompute = Literal["none", "selective", "full"]


@config
class RecomputeConfig:
    """Activation checkpointing: what each tower recomputes in the backward instead of keeping it.

    full keeps the input of a block; selective keeps attention and every second matrix product but the last
    as well.
    """

    decoder: Recompute = "none"
    vision: Recompute = "none"
    audio: Recompute = "none"
    text: Recompute = "none"


@config
class TrainConfig:
    rows_per_step: Count | None = may_change(None)  # packed rows of a step over all data ranks; null: by accumulate
    accumulate: Count = may_change(1)  # micro-batches (packed rows) of each data rank in a step
    accumulate_mode: Literal["sharded", "local"] = may_change("sharded")
    # sharded: reduce gradients after each micro-batch; local: keep them unsharded, in fp32, and reduce once
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of compute; weights stay fp32; auto: bf16 on GPUs
    recompute: RecomputeConfig = may_change(default_factory=RecomputeConfig)
    offload_activations: bool = may_change(False)  # keep block inputs (recompute: full) in host memory; slower
    compile: bool = may_change(False)  # torch.compile, block by block
    balance_loss: NonNegative = may_change(0.0)  # factor of the balance loss of experts (``avlm.models.moe``)
    float8: bool = may_change(False)  # products of the decoder's linears in float8, by torchao, where it trains
    log_every: Count = may_change(10)  # steps between console lines; metrics.jsonl has every step
    validate_every: Whole = may_change(500)  # steps; 0: never
    validate_batches: Count = may_change(20)  # packed rows of each set and rank
    validate_answers: Whole = may_change(0)  # samples of each set to answer by generation, for data.metrics
    validate_new_tokens: Count = may_change(64)  # most tokens of an answer
    stop_after: Count | None = may_change(None)  # end cleanly after this many steps in all

    def __post_init__(self) -> None:
        require(
            self.rows_per_step is None or self.accumulate == 1,
            f"rows_per_step={self.rows_per_step} and accumulate={self.accumulate} both say how many rows a step has: "
            "leave out accumulate",
        )

    def micro_batches(self, data_ranks: int) -> int:
        """Packed rows that each data rank reads in a step. ValueError if ``rows_per_step`` cannot be shared evenly."""
        if self.rows_per_step is None:
            return self.accumulate
        each, left = divmod(self.rows_per_step, data_ranks)
        if left:
            fits = " or ".join(str(rows * data_ranks) for rows in (each, each + 1) if rows)
            raise ValueError(
                f"train.rows_per_step={self.rows_per_step} rows cannot be shared evenly by {data_ranks} data ranks "
                f"(parallel.replicate x parallel.shard): take {fits}, or data ranks that divide {self.rows_per_step}"
            )
        return each


@config
class DebugConfig:
    check_collectives: bool = False  # before each step, compare what every rank is about to run
    profile: tuple[Count, Count] | None = None
    # [step, count]: a trace of these steps, counted from 1, in output_dir/profile (avlm.training.profile reads it)
    profile_ranks: Annotated[list[Whole], Field(min_length=1)] = field(default_factory=lambda: [0])  # which write one


@config
class KernelsConfig:
    """Which code computes attention, the loss and the projectors is said by ``python -m kernels.backend``."""

    strict: bool = False  # stop if a kernel disagrees with PyTorch at the start; else another one takes its place
    flash_attention: Literal["FA2", "FA3", "FA4"] = "FA2"  # torch's own; FA3 and FA4 need their packages


@config
class CheckpointConfig:
    every: Count = 500  # steps; the end of every stage is saved too
    keep: Count = 3  # how many of the newest checkpoints stay
    async_save: bool = False  # training continues as soon as what a rank writes is copied into its machine's memory
    best: str | None = None
    # val/NAME/METRIC, as metrics.jsonl calls it: a step with a new best value is saved, and kept until a better one is
    # found (checkpoints/best). Lower is better for loss, wer and cer


@config
class WandbConfig:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "avlm"


@config
class Config:
    output_dir: str = may_change()
    model: ModelConfig
    stages: Annotated[list[StageConfig], Field(max_length=1000)]
    resume: ResumeConfig = may_change(default_factory=ResumeConfig)
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1
    device: Literal["auto", "cpu", "cuda"] = may_change("auto")
    deterministic: bool = False  # deterministic kernels: bit-exact resume on a GPU too
    init_from: InitFrom = field(default_factory=InitFrom)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = may_change(default_factory=ParallelConfig)
    kernels: KernelsConfig = may_change(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = may_change(default_factory=CheckpointConfig)
    wandb: WandbConfig = may_change(default_factory=WandbConfig)
    tensorboard: bool = may_change(False)  # write output_dir/tensorboard, beside metrics.jsonl, which is always written
    debug: DebugConfig = may_change(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(bool(names), "stages is empty: give at least one")
        require(len(set(names)) == len(names), f"stages have the same name twice: {names}")
        _check_columns(self.stages)
        _check_profile(self)
        for stage in self.stages:
            check_duplex(stage.data.duplex, self.model)
            known = [*self.model.modules]
            if self.model.lora:
                known.append("lora")
            for name in [*(stage.train or []), *stage.optimizer.lr_scale]:
                require(name in known, f"stage {stage.name} names {name}, which this model does not have")
            require(
                stage.objective == "answers" or bool(self.model.pools),
                f"stage {stage.name}: objective=contrastive needs model.text and model.contrastive, for a tower",
            )
            length = stage.data.seq_length
            bound = self.model.decoder.max_position
            require(length <= bound, f"data.seq_length={length} exceeds model.decoder.max_position={bound}")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def _check_profile(run: Config) -> None:
    """The steps to be profiled have to be steps of the run, as far as its length is known."""
    if run.debug.profile is None or not all(stage.steps for stage in run.stages):
        return
    first, _ = run.debug.profile
    steps = run.total_steps
    require(first <= steps, f"debug.profile begins at step {first}, and the run has {counted(steps, 'step')}")


def _check_columns(stages: list[StageConfig]) -> None:
    """An entry of data.columns that is the name of no source is a slip if a source has no entry."""
    sources = {source for stage in stages for source in [*shares(stage.data.train), *stage.data.validation.values()]}
    read = {hf_name(source) for source in sources if is_hf(source)}
    named = {name for stage in stages for name in stage.data.columns}
    unused, without = sorted(named - read), sorted(read - named)
    if unused and without:
        raise ValueError(
            f"data.columns names {shown(unused[0])}, which is the NAME of no hf://NAME, and not {shown(without[0])}: "
            "correct the name, or give both an entry"
        )
