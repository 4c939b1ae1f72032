"""Every knob of a run: nested dataclasses, read from one YAML file by ``avlm.config_file``.

Fields stand in the order of their importance; sizes are whole-model sizes, never per-rank sizes.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

MODULES = ("decoder", "vision", "audio", "vision_projector", "audio_projector")
Module = Literal["decoder", "vision", "audio", "vision_projector", "audio_projector"]
Part = Literal[Module, "lora"]  # lora: the adapters of all towers
FREEZE_FLAGS = {
    "freeze_language_model": "decoder",
    "freeze_vision_model": "vision",
    "freeze_audio_model": "audio",
    "freeze_vision_projection": "vision_projector",
    "freeze_audio_projection": "audio_projector",
}  # of a stage, as NeMo calls them -> module

config = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


@config
class RopeScaling:
    """Llama-3 frequency scaling (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int  # tokens


@config
class DecoderConfig:
    """Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: int = 0  # 0: hidden_size / num_heads
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embedding: bool = False  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on every query and key head
    max_position: int = 8192  # tokens the checkpoint was made for; data.seq_length must not exceed it

    def __post_init__(self) -> None:
        if not self.head_dim:
            _require(
                self.hidden_size % self.num_heads == 0,
                f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary positions")


@config
class VisionConfig:
    """CLIP ViT; SigLIP is the same tower without class token and pre-norm, with a patch bias and another GELU."""

    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    image_size: Count  # pixels, square
    patch_size: Count  # pixels, square
    feature_layer: int = -2  # -1: output of the last layer, -2: of the one before; later layers are not built
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True  # dropped from the features
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: bool = False  # normalise the features; SigLIP does where feature_layer is -1
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # of RGB in 0..1
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    resize: Literal["crop", "stretch"] = "crop"  # shortest side then centre crop (CLIP), or both sides (SigLIP)

    def __post_init__(self) -> None:
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )
        _require(
            -self.num_layers <= self.feature_layer <= -1,
            f"feature_layer={self.feature_layer} must lie in -{self.num_layers}..-1",
        )


@config
class AudioConfig:
    """Whisper encoder."""

    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_mels: Count = 80
    max_positions: Count = 1500  # rows of a full window: 20 ms each
    window: Literal["true", "fixed"] = "true"  # rows of the clip only, or of the whole window whatever the clip holds
    log_mel: Literal["worker", "device"] = "worker"  # where it is made: clip by clip, or of a row at once at the tower

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )


@config
class ProjectorConfig:
    type: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    downsample: Count = 1  # vision: pixel shuffle of n x n patches; audio: n frames stacked; before the projection
    hidden_size: int = 0  # of mlp2x_gelu; 0: the decoder's width
    bias: bool = True  # Voxtral has none
    output_std: Positive = 0.02  # of the features at random start, about; the decoder's token embedding is a good guide


@config
class LoraConfig:
    """Low-rank adapters (``avlm.models.lora``)."""

    rank: Count = 32
    alpha: float = 32.0  # adapters are scaled by alpha / rank
    targets: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: [f"decoder.*.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    )  # linears by their paths from the model; * stands for anything
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the adapters' inputs
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # a magnitude for each output, trained apart from the direction
    base: Literal["fp32", "bf16"] = "fp32"  # how adapted towers are held; bf16: half the memory, no stage trains them

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@config
class ModelConfig:
    decoder: DecoderConfig
    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    vision_projector: ProjectorConfig | None = None
    audio_projector: ProjectorConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for tower in ("vision", "audio"):
            if (getattr(self, tower) is None) != (getattr(self, f"{tower}_projector") is None):
                raise ValueError(f"{tower} and {tower}_projector come together: give both or neither")
        if self.vision:
            side = self.vision.image_size // self.vision.patch_size
            _require(
                side % self.vision_projector.downsample == 0,
                f"vision_projector.downsample={self.vision_projector.downsample} does not divide {side} patches a side",
            )

    @property
    def modules(self) -> list[str]:
        return [name for name in MODULES if getattr(self, name) is not None]


@config
class InitFrom:
    """Weights to start from: Hugging Face folders or Hub names, exports, runs or checkpoints of runs (trusted like
    code), and .ckpt, .pt or .pth files. What none of them holds starts from random weights."""

    decoder: str | None = None
    vision: str | None = None
    audio: str | None = None
    all: str | None = None  # every module that it and the model share; a tower's own entry wins
    adapter: str | None = None  # a PEFT folder with the decoder's adapters
    allow_missing: list[str] = field(default_factory=list)  # regular expressions: our parameters that no source needs
    allow_unused: list[str] = field(default_factory=list)  # and tensors of the sources, by their names, to leave out


@config
class VideoConfig:
    num_frames: int | None = 8  # frames spread evenly over the clip; give this or fps
    fps: float | None = None  # frames per second of video
    max_frames: int = 64  # bound for fps
    sound: bool = False  # encode the clip's own sound track after its frames

    def __post_init__(self) -> None:
        _require((self.num_frames is None) != (self.fps is None), "give num_frames or fps, and set the other to null")


@config
class DataConfig:
    train: str  # Energon folder or metadataset YAML, .json or .jsonl file, or "synthetic"
    validation: dict[str, str] = field(default_factory=dict)  # name -> source
    metrics: dict[str, list[str]] = field(default_factory=dict)  # of the answers to a validation set, by its name:
    # exact_match, wer, cer, rouge_l, vqa_accuracy (avlm.text_metrics); for others exact_match
    tokenizer: str = ""  # folder with tokenizer.json, or the file
    template: Literal["plain", "llava", "llama3", "chatml", "tokenizer"] = "llama3"  # tokenizer: its own Jinja template
    seq_length: Count = 8192  # tokens of a packed row
    system: str | None = None  # system prompt of samples that have none
    media_root: str | None = None  # folder that media names of a JSON file are relative to; null: the file's own
    num_workers: int = 2
    packing: Literal["knapsack", "first_fit"] = "knapsack"
    packing_buffer: Count = 200  # samples that a packer chooses from
    shuffle_buffer: int = 1000  # samples
    max_bad_fraction: float = 0.01  # of the samples read; above it the run stops
    max_media_bytes: int = 256 * 2**20  # of one picture, clip or film, before it is decoded
    max_image_pixels: int = 100_000_000
    max_audio_seconds: float = 600.0
    video: VideoConfig = field(default_factory=VideoConfig)


@config
class OptimizerConfig:
    """AdamW with linear warmup and a cosine to min_lr."""

    lr: float
    min_lr: float | None = None  # null: lr / 10
    warmup_steps: int = 150
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1  # not on biases, norms and embeddings of positions
    clip_norm: float = 1.0
    lr_scale: dict[Part, float] = field(default_factory=dict)  # factor on lr and min_lr; lora before an adapter's tower


@config
class StageConfig:
    """A stretch of training. ``optimizer`` and ``data`` hold the keys that differ from the run's own.

    What trains is said by ``train`` or by freeze flags, and then by patterns of parameter names (``avlm.freezing``).
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
    validate_every: int = 500  # steps; 0: never
    validate_batches: Count = 20  # packed rows of each set and rank
    validate_answers: int = 0  # samples of each set that are answered by generation, for data.metrics
    validate_new_tokens: Count = 64  # most tokens of such an answer
    stop_after: Count | None = None  # end cleanly after so many steps in all


@config
class ParallelConfig:
    """Mesh of ranks: replicate x shard x context x tensor. Rows are loaded for replicate x shard data ranks."""

    shard: int = -1  # ranks that share one copy of weights, gradients and optimizer state; -1: what is left
    replicate: Count = 1  # copies
    context: Count = 1  # ranks that share the tokens of a row
    tensor: Count = 1  # ranks that share the heads, widths and vocabulary of the decoder
    context_mode: Literal["auto", "ring", "allgather", "ulysses"] = "auto"  # auto: ulysses if it divides the heads
    tower_sharding: Literal["unit", "block", "replicate"] = "unit"  # gather a tower whole, by block; or frozen copies
    # of the compute dtype, in checkpoints and exports too
    balance_media: bool = False  # share images and clips of all data ranks evenly; else of a row's own ranks
    reshard: bool = True  # free the gathered weights of a block between forward and backward
    cpu_offload: bool = False  # weights, gradients and optimizer state in host memory


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
    stages: list[StageConfig]
    resume: str = "auto"  # auto: the newest complete checkpoint of output_dir; never; or a checkpoint folder
    seed: int = 1
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
        _require(bool(names), "stages is empty: give at least one")
        _require(len(set(names)) == len(names), f"stages have the same name twice: {names}")
        for stage in self.stages:
            known = [*self.model.modules, *(["lora"] if self.model.lora else [])]
            for name in (*(stage.train or ()), *stage.optimizer.lr_scale):
                _require(name in known, f"stage {stage.name} names {name}, which this model does not have")
            length, bound = stage.data.seq_length, self.model.decoder.max_position
            _require(length <= bound, f"data.seq_length={length} exceeds model.decoder.max_position={bound}")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
