"""What a run is: nested dataclasses, read from one YAML file by ``avlm.config.load``. Its model: ``avlm.config.model``.

Fields stand in the order of their importance; every number has its range.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from avlm.config.model import (
    Count,
    Epsilon,
    ModelConfig,
    Module,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    Tokens,
    Whole,
    config,
    require,
)

Ranks = Annotated[int, Field(gt=0, le=2**20)]
RanksOrRest = Annotated[int, Field(ge=-1, le=2**20)]
Frames = Annotated[int, Field(gt=0, le=2**20)]
Part = Literal[Module, "lora"]  # lora: the adapters of all towers
FREEZE_FLAGS = {
    "freeze_language_model": "decoder",
    "freeze_vision_model": "vision",
    "freeze_audio_model": "audio",
    "freeze_vision_projection": "vision_projector",
    "freeze_audio_projection": "audio_projector",
}  # of a stage, as NeMo calls them -> module


@config
class InitFrom:
    """Weights to start from: Hugging Face folders or Hub names, exports, runs or checkpoints of runs,
    and .ckpt, .pt or .pth files. What none of them holds starts from random weights."""

    decoder: str | None = None
    vision: str | None = None
    audio: str | None = None
    all: str | None = None  # every module that it and the model share; a tower's own entry wins
    adapter: str | None = None  # a PEFT folder with the decoder's adapters
    allow_missing: list[str] = field(default_factory=list)  # regular expressions: our parameters that no source needs
    allow_unused: list[str] = field(default_factory=list)  # and tensors of the sources, by their names, to leave out


@config
class VideoConfig:
    num_frames: Frames | None = 8  # frames spread evenly over the clip; give this or fps
    fps: Positive | None = None  # frames per second of video
    max_frames: Frames = 64  # bound for fps
    sound: bool = False  # encode the clip's own sound track after its frames

    def __post_init__(self) -> None:
        require((self.num_frames is None) != (self.fps is None), "give num_frames or fps, and set the other to null")


@config
class DataConfig:
    train: str  # Energon folder or metadataset YAML, .json or .jsonl file, or "synthetic"
    validation: dict[str, str] = field(default_factory=dict)  # name -> source
    metrics: dict[str, list[str]] = field(default_factory=dict)  # of the answers to a validation set, by its name:
    # exact_match, wer, cer, rouge_l, vqa_accuracy, and wer_basic, wer_english, cer_basic, cer_english where the choice
    # by the letters of a set is not wanted (avlm.evaluation.scores); for others exact_match
    tokenizer: str = ""  # folder with tokenizer.json, or the file
    template: Literal["plain", "llava", "llama3", "chatml", "tokenizer"] = "llama3"  # tokenizer: its own Jinja template
    seq_length: Tokens = 8192  # tokens of a packed row
    system: str | None = None  # system prompt of samples that have none
    media_root: str | None = None  # folder that media names of a JSON file are relative to; null: the file's own
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 2  # processes of each rank; 0: the rank's own
    packing: Literal["knapsack", "first_fit"] = "knapsack"
    packing_buffer: Count = 200  # samples that a packer chooses from
    shuffle_buffer: Whole = 1000  # samples
    max_bad_fraction: Share = 0.01  # of the samples read; above it the run stops
    max_media_bytes: Count = 256 * 2**20  # of one picture, clip or film, before it is decoded
    max_image_pixels: Count = 100_000_000
    max_audio_seconds: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    video: VideoConfig = field(default_factory=VideoConfig)


@config
class OptimizerConfig:
    """AdamW with linear warmup and a cosine to min_lr."""

    lr: NonNegative
    min_lr: NonNegative | None = None  # null: lr / 10
    warmup_steps: Whole = 150
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    eps: Epsilon = 1e-5
    weight_decay: NonNegative = 0.1  # not on biases, norms and embeddings of positions
    clip_norm: NonNegative | None = 1.0  # of all gradients; null: no clipping
    lr_scale: dict[Part, NonNegative] = field(default_factory=dict)  # factor on lr and min_lr; lora goes before the
    # tower of an adapter

    def __post_init__(self) -> None:
        require(
            self.min_lr is None or self.min_lr <= self.lr,
            f"min_lr={self.min_lr} is above lr={self.lr}: the learning rate would rise to the end",
        )
        require(self.clip_norm != 0, "clip_norm=0 would train nothing: for no clipping set clip_norm: null")


@config
class StageConfig:
    """A stretch of training. ``optimizer`` and ``data`` hold the keys that differ from the run's own.

    What trains is said by ``train`` or by freeze flags, and then by patterns of parameter names
    (``avlm.models.freezing``).
    """

    name: str
    steps: Count
    optimizer: OptimizerConfig
    data: DataConfig
    train: Annotated[list[Part], Field(min_length=1)] | None = None
    freeze_language_model: bool | None = None  # the decoder
    freeze_vision_model: bool | None = None
    freeze_audio_model: bool | None = None
    freeze_vision_projection: bool | None = None
    freeze_audio_projection: bool | None = None
    freeze_params: list[str] = field(default_factory=list)  # regular expressions; adapters are left alone
    prevent_freeze_params: list[str] = field(default_factory=list)  # regular expressions: these train after all

    def __post_init__(self) -> None:
        flags = [flag for flag in FREEZE_FLAGS if getattr(self, flag) is not None]
        if self.train is not None and flags:
            raise ValueError(f"train and {flags[0]} both say what trains: give one of them")
        if self.train is None and not flags and not self.freeze_params:
            raise ValueError(f"missing key train (or one of {', '.join(FREEZE_FLAGS)}, freeze_params)")


Recompute = Literal["none", "selective", "full"]


@config
class RecomputeConfig:
    """Activation checkpointing: what the backward computes again instead of keeping it, for each tower.

    full keeps the input of a block; selective keeps attention and every second matrix product as well.
    """

    decoder: Recompute = "none"
    vision: Recompute = "none"
    audio: Recompute = "none"


@config
class TrainConfig:
    accumulate: Count = 1  # micro-batches (packed rows) of each data rank in a step
    accumulate_mode: Literal["sharded", "local"] = (
        "sharded"  # reduce gradients each micro-batch; or once, whole, in fp32
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of compute, weights stay fp32; auto: bf16 on GPUs
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    offload_activations: bool = False  # what recompute "full" keeps, block inputs, in host memory; each block waits
    compile: bool = False  # torch.compile, block by block
    log_every: Count = 10  # steps between console lines; metrics.jsonl has every step
    validate_every: Whole = 500  # steps; 0: never
    validate_batches: Count = 20  # packed rows of each set and rank
    validate_answers: Whole = 0  # samples of each set that are answered by generation, for data.metrics
    validate_new_tokens: Count = 64  # most tokens of such an answer
    stop_after: Count | None = None  # end cleanly after so many steps in all


@config
class ParallelConfig:
    """Mesh of ranks: replicate x shard x context x tensor. Rows are loaded for replicate x shard data ranks."""

    shard: RanksOrRest = -1  # ranks that share one copy of weights, gradients and optimizer state; -1: what is left
    replicate: Ranks = 1  # copies
    context: Ranks = 1  # ranks that share the tokens of a row
    tensor: Ranks = 1  # ranks that share the heads, widths and vocabulary of the decoder
    context_mode: Literal["auto", "ring", "allgather", "ulysses"] = "auto"  # auto: ulysses if it divides the heads
    tower_sharding: Literal["unit", "block", "replicate"] = "unit"  # gather a tower whole, by block; or frozen copies
    # of the compute dtype, in checkpoints and exports too
    balance_media: bool = False  # share images and clips of all data ranks evenly; else of a row's own ranks
    reshard: bool = True  # free the gathered weights of a block between forward and backward
    cpu_offload: bool = False  # weights, gradients and optimizer state in host memory

    def __post_init__(self) -> None:
        require(self.shard != 0, "shard=0 is no number of ranks; -1 takes what is left")


@config
class DebugConfig:
    check_collectives: bool = False  # before each step, compare what every rank is about to run


@config
class CheckpointConfig:
    every: Count = 500  # steps; the end of every stage is saved as well
    keep: Count = 3  # newest ones
    best: str | None = None  # val/NAME/METRIC, as metrics.jsonl has it: whenever validation finds it better than ever
    # before, that step is saved too, and is kept until a better one is (checkpoints/best); loss, wer and cer: lower


@config
class WandbConfig:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "avlm"


@config
class Config:
    output_dir: str
    model: ModelConfig
    stages: Annotated[list[StageConfig], Field(max_length=1000)]
    resume: str = "auto"  # auto: the newest complete checkpoint of output_dir; never; or a checkpoint folder
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # deterministic kernels: bit-exact resume on a GPU too
    init_from: InitFrom = field(default_factory=InitFrom)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(bool(names), "stages is empty: give at least one")
        require(len(set(names)) == len(names), f"stages have the same name twice: {names}")
        for stage in self.stages:
            known = [*self.model.modules, *(["lora"] if self.model.lora else [])]
            for name in (*(stage.train or ()), *stage.optimizer.lr_scale):
                require(name in known, f"stage {stage.name} names {name}, which this model does not have")
            length, bound = stage.data.seq_length, self.model.decoder.max_position
            require(length <= bound, f"data.seq_length={length} exceeds model.decoder.max_position={bound}")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)
