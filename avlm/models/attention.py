"""The part of attention that has no parameters, as a module, so that context parallelism can replace it."""

from typing import NamedTuple

from torch import Tensor, nn

from avlm.config.decoder import DecoderConfig
from kernels.attention import attention
from kernels.segments import Segments


class Scores(NamedTuple):
    """How scores are made of products of queries and keys, see ``kernels.attention``."""

    scale: float | None = None  # None: 1 / sqrt(head dim)
    softcap: float | None = None

    @staticmethod
    def of(config: DecoderConfig) -> "Scores":
        scale = None if config.score_size is None else config.score_size**-0.5
        return Scores(scale, config.attention_softcap)


class AttentionCore(nn.Module):
    """Attention within the segments of a packed row; see ``kernels.attention`` for shapes."""

    def __init__(self, causal: bool, scores: Scores = Scores()):
        super().__init__()
        self.causal = causal
        self.scores = scores

    def forward(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> Tensor:
        scale, softcap = self.scores
        return attention(q_THE, k_TKE, v_TKE, segments, causal=self.causal, scale=scale, softcap=softcap)
