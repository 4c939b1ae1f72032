"""The part of attention that has no parameters, as a module, so that context parallelism can replace it."""

from typing import Any, NamedTuple

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


class ReadingAttention(nn.Module):
    """Attention of queries to other rows than their own: cross-attention.

    T queries, D wide   S rows that are read, C wide   H query heads   K key/value heads   E head dim
    """

    def __init__(
        self,
        size: int,
        read_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        qk_norm_eps: float | None = None,
    ):
        """``qk_norm_eps``: of RMSNorms on every head of queries and keys; None: there are none."""
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(size, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(read_size, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(read_size, num_kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(num_heads * head_dim, size, bias=bias)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)

    def forward(
        self, x_TD: Tensor, read_SC: Tensor | None, segments: Any, segments_k: Any, cache: Any = None
    ) -> Tensor:
        """Query segment n reads rows segment n; with ``segments.intervals``, those that they say. A query that reads
        nothing gets the bias of ``o``. ``cache`` (generation) holds keys and values of a prompt: later ``read_SC`` is
        None."""
        heads = (-1, self.head_dim)
        q_THE = self.q_norm(self.q(x_TD).unflatten(-1, heads))
        if read_SC is None:
            out_THE = cache.attend(q_THE)
        else:
            k_SKE = self.k_norm(self.k(read_SC).unflatten(-1, heads))
            v_SKE = self.v(read_SC).unflatten(-1, heads)
            if cache is not None:
                cache.hold(k_SKE, v_SKE)
            out_THE = attention(q_THE, k_SKE, v_SKE, segments, causal=False, segments_k=segments_k)
        return self.o(out_THE.flatten(1))
