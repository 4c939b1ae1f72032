"""What the decoder is: its sizes, positions and attention. Sizes are whole-model sizes, as in ``avlm.config.model``."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from avlm.config.values import (
    Epsilon,
    Heads,
    Layers,
    NonNegative,
    Positive,
    Tokens,
    Whole,
    Width,
    WidthOrDefault,
    config,
    require,
    shown,
)


@config
class RopeScaling:
    """Llama-3 frequency scaling (rope_type "llama3")."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position: Tokens

    def __post_init__(self) -> None:
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} is not below high_freq_factor={self.high_freq_factor}",
        )


@config
class YarnScaling:
    """YaRN frequency scaling (Peng et al. 2023; rope_type "yarn")."""

    factor: Annotated[float, Field(ge=1)]
    original_max_position: Tokens
    beta_fast: Positive = 32.0  # full turns within the original context: pairs that turn more often keep their speed
    beta_slow: Positive = 1.0  # those that turn less often are slowed down by the factor
    attention_factor: Positive = 1.0  # of cos and sin

    def __post_init__(self) -> None:
        require(
            self.beta_slow < self.beta_fast,
            f"beta_slow={self.beta_slow} is not below beta_fast={self.beta_fast}",
        )


@config
class ExpertsConfig:
    """A mixture of experts in place of a block's feed-forward part (``avlm.models.moe``)."""

    num: Annotated[int, Field(gt=1, le=1023)]  # experts of a layer
    per_token: Annotated[int, Field(gt=0, le=2**10)]  # those that a token goes to
    intermediate_size: Width  # of an expert
    normalize: bool = True  # the weights of a token's experts add up to 1
    shared_size: WidthOrDefault = 0
    # intermediate size of one more expert, which takes every token, times a learned gate (Qwen2-MoE); 0: there is none
    dense_layers: list[Whole] = field(default_factory=list)  # with one feed-forward part of decoder.intermediate_size

    def __post_init__(self) -> None:
        require(self.per_token <= self.num, f"per_token={self.per_token} is more than num={self.num} experts")


@config
class DecoderConfig:
    """Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: Tokens
    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: Annotated[int, Field(ge=0, le=2**14)] = 0  # 0: hidden_size / num_heads
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 500_000.0
    rope_scaling: RopeScaling | None = None
    yarn: YarnScaling | None = None  # another scaling; give one of the two
    query_growth: NonNegative = 0.0
    # with yarn: queries grow by 1 + query_growth * ln(1 + floor(position / yarn.original_max_position)) (Llama 4)
    norm_eps: Epsilon = 1e-5
    tie_embedding: bool = False  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on every query and key head
    max_position: Tokens = 8192  # tokens that the checkpoint was trained for; data.seq_length must not exceed it
    sliding_window: Tokens | None = None  # a token sees so many of its document, itself and those before; None: all
    window_layers: Annotated[list[Whole], Field(min_length=1)] | None = None  # that have the window; None: all of them
    mrope_sections: Annotated[list[Whole], Field(min_length=3, max_length=3)] | None = None
    # M-RoPE: how many pairs of dimensions turn with the time, line and column of a token; None: all with its position
    mrope_interleaved: bool = False  # time, line and column take turns (Qwen3-VL), or stand one after the other
    experts: ExpertsConfig | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gate of the feed-forward part
    norm_offset: bool = False  # norms multiply by 1 + weight (Gemma)
    post_norms: bool = False  # what attention and the feed-forward part add is normalised too (Gemma 2, 3)
    embedding_scale: bool = False  # embeddings of tokens are multiplied by sqrt(hidden_size) (Gemma)
    score_size: Positive | None = None  # scores of attention are divided by its square root; None: head_dim
    attention_softcap: Positive | None = None  # scores are bounded: cap * tanh(score / cap) (Gemma 2)
    logit_softcap: Positive | None = None  # so are logits
    rope_stretch: Annotated[float, Field(ge=1)] = 1.0  # positions are divided by it (rope_type "linear")
    window_rope_theta: Annotated[float, Field(gt=0, le=1e15)] | None = None
    # rotary base of layers with a window, whose positions are not scaled (Gemma 3); None: as in the others
    bidirectional: Literal["none", "images", "prefix"] = "none"
    # the features of an image see each other (Gemma 3), as do those of any images or frames that no other token parts;
    # or all that precedes a document's first target (PaliGemma)

    def __post_init__(self) -> None:
        require(self.rope_scaling is None or self.yarn is None, "give rope_scaling or yarn, not both")
        require(self.yarn is not None or not self.query_growth, "query_growth needs yarn")
        require(self.yarn is None or self.rope_theta > 1, f"yarn needs a rope_theta above 1, not {self.rope_theta:g}")
        if self.window_layers is not None:
            require(self.sliding_window is not None, "window_layers needs a sliding_window")
            require(
                self.window_layers == sorted(set(self.window_layers)) and self.window_layers[-1] < self.num_layers,
                f"window_layers={shown(self.window_layers)} must ascend and lie below num_layers={self.num_layers}",
            )
        if self.experts is not None:
            layers = self.experts.dense_layers
            require(
                layers == sorted(set(layers)) and all(layer < self.num_layers for layer in layers),
                f"experts.dense_layers={shown(layers)} must ascend and lie below num_layers={self.num_layers}",
            )
            sizes = {"hidden_size": self.hidden_size, "experts.intermediate_size": self.experts.intermediate_size}
            for name, size in sizes.items():
                require(size % 8 == 0, f"{name}={size} must be a multiple of 8 for products of all experts")
        require(
            self.window_rope_theta is None or self.sliding_window is not None,
            "window_rope_theta needs a sliding_window",
        )
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
        if self.mrope_sections is None:
            require(not self.mrope_interleaved, "mrope_interleaved needs mrope_sections")
        else:
            require(not self.query_growth, "query_growth needs one position for each token, without mrope_sections")
            require(
                sum(self.mrope_sections) == self.head_dim // 2,
                f"mrope_sections={self.mrope_sections} must add up to half of head_dim={self.head_dim}",
            )

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers

    def has_window(self, layer: int) -> bool:
        return self.sliding_window is not None and (self.window_layers is None or layer in self.window_layers)
