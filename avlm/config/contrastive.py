"""What a stage with ``objective: contrastive`` needs beside the towers: a text tower, and how pairs are compared."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from avlm.config.values import Epsilon, Heads, Layers, Positive, Tokens, Width, config, require

ALIGNMENT = ("text", "contrastive")  # modules that run in contrastive stages alone
AlignmentModule = Literal["text", "contrastive"]
Objective = Literal["answers", "contrastive"]


@config
class TextConfig:
    """A text tower. The defaults are CLIP's; SigLIP's is bidirectional, and fills captions to one length."""

    vocab_size: Width  # of the tokenizer of contrastive stages
    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    max_position: Tokens = 77  # tokens of a caption at most, those of the next three keys included
    start_token: str = ""  # control token before a caption; "": none
    end_token: str = ""  # and after it
    fill_token: str = ""  # captions are filled to max_position with this control token, which is read like any other
    causal: bool = True
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    norm_eps: Epsilon = 1e-5

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )

    @property
    def num_blocks(self) -> int:
        return self.num_layers


@config
class PoolConfig:
    """How the rows of a tower become an embedding.

    class      the class token of an image; of several views or frames their mean
    mean       of all rows of a medium, class tokens left out
    attention  a learned query attends to those rows, then an MLP (SigLIP's head), as wide as those of the tower
    """

    pool: Literal["class", "mean", "attention"]
    projection: Literal["linear", "none"] = "linear"  # linear has no bias

    def check(self, tower: str, width: int, has_class_token: bool, size: int) -> None:
        """ValueError if it does not fit the tower, or an embedding of ``size``."""
        require(
            self.pool != "class" or has_class_token,
            f"contrastive.{tower}.pool=class needs a tower with a class token: take mean or attention",
        )
        require(
            self.projection != "none" or width == size,
            f"contrastive.{tower}.projection=none needs contrastive.size={width}, the width of the tower",
        )


@config
class ContrastiveConfig:
    """Embeddings x of media and y of captions, of length 1, are compared by s x . y + b.

    softmax  each medium has to find its caption among all of the step, and each caption its medium (CLIP)
    sigmoid  each pair of a medium and a caption is a question of its own: do they belong together? (SigLIP)
    """

    size: Width  # of an embedding
    loss: Literal["softmax", "sigmoid"] = "softmax"
    vision: PoolConfig | None = field(default_factory=lambda: PoolConfig(pool="class"))
    audio: PoolConfig | None = field(default_factory=lambda: PoolConfig(pool="mean"))
    # of the modalities that a model has no tower for they say nothing; null: its media are not aligned
    text_bias: bool = False  # of the projection of captions (SigLIP)
    initial_scale: Annotated[float, Field(gt=0, le=1e4)] = 1 / 0.07  # s at first; SigLIP: 10
    initial_bias: Annotated[float, Field(ge=-1e4, le=1e4)] = -10.0  # b at first; softmax has none
    max_scale: Positive | None = 100.0  # no step raises s above it, as CLIP was trained; null: no bound (SigLIP)

    def __post_init__(self) -> None:
        require(
            self.max_scale is None or self.initial_scale <= self.max_scale,
            f"initial_scale={self.initial_scale} is above max_scale={self.max_scale}",
        )
