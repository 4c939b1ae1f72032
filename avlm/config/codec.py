"""What a model says as speech: codes of a neural codec, which others make and turn into sound."""

from functools import cached_property
from typing import Annotated

from pydantic import Field

from avlm.config.decoder import DecoderConfig
from avlm.config.values import Epsilon, Heads, Layers, NonNegative, Width, config, require


@config
class CodecConfig:
    """Codes of each row of 80 ms, and the depth decoder that says them (``avlm.models.depth``)."""

    num_codebooks: Annotated[int, Field(gt=0, le=64)]  # codes of a row
    codebook_size: Annotated[int, Field(gt=0, le=2**20)]  # values of a code, from 0
    hidden_size: Width  # of the depth decoder, as all that follows
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 500_000.0
    norm_eps: Epsilon = 1e-5
    text_weight: NonNegative = 3.0  # of the loss of a row's token; NeMo's weights
    audio_weight: NonNegative = 4.0  # of the mean loss of a row's codes

    def __post_init__(self) -> None:
        require(self.text_weight + self.audio_weight > 0, "text_weight=0 and audio_weight=0 would train nothing")
        _ = self.depth  # checks its sizes

    @cached_property
    def depth(self) -> DecoderConfig:
        """The depth decoder, of whose ids the last one stands before the first row."""
        return DecoderConfig(
            vocab_size=self.codebook_size + 1,
            max_position=self.num_codebooks,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
        )
