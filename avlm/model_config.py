"""What a model is: towers, projectors and adapters, with their sizes.

Fields stand in the order of their importance; sizes are whole-model sizes, never per-rank sizes.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

MODULES = ("decoder", "vision", "audio", "vision_projector", "audio_projector")
Module = Literal["decoder", "vision", "audio", "vision_projector", "audio_projector"]

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
            require(
                self.hidden_size % self.num_heads == 0,
                f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary positions")


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
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # SigLIP 2 is bilinear

    def __post_init__(self) -> None:
        require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )
        require(
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
        require(
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
            require(
                side % self.vision_projector.downsample == 0,
                f"vision_projector.downsample={self.vision_projector.downsample} does not divide {side} patches a side",
            )

    @property
    def modules(self) -> list[str]:
        return [name for name in MODULES if getattr(self, name) is not None]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
