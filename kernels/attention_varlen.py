"""Packed attention by torch's own kernels, those behind ``torch.nn.attention.varlen``: FlashAttention-2 (2307.08691),
or 3 or 4 if activated in torch's registry.

Their conventions are ours (causal masks are aligned at the bottom right, lse_HT is natural and float32, a backward for
some of the keys takes out and lse of all keys), with these differences:
    lse of a query without keys      +inf there, -inf here
    spare room at the end of slots   unknown there: a slot becomes three segments, see ``boundaries``
    gradient of lse                  none there; ``kernels.dispatch`` sends such calls elsewhere
    dtype of results                 that of q, always: blocks of a ring are rounded once each

T query rows   S key rows   H query heads   K key/value heads   E head dim   N segments
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention_tiles import loadable
from kernels.segments import Segments


def covers(segments: Segments, segments_k: Segments, T: int, S: int) -> bool:
    """Whether the segments cut all rows: torch's kernels write nothing to rows past the last segment."""
    return segments.num_rows == T and segments_k.num_rows == S


def boundaries(segments: Segments, segments_k: Segments) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and of keys without spare room.

    With slots on either side, segment n becomes three: the used queries with the used keys, the spare queries without
    keys (out and gradient are 0), the spare keys without queries (gradients are 0).
    """
    assert segments.intervals is None, "these kernels know no masks but the causal one"
    if segments.lengths is None and segments_k.lengths is None:
        return segments.cu_seqlens.contiguous(), segments_k.cu_seqlens.contiguous()
    used_N, end_N = _ends(segments)
    used_k_N, end_k_N = _ends(segments_k)
    cu_q = torch.stack([used_N, end_N, end_N], dim=1).flatten()
    cu_k = torch.stack([used_k_N, used_k_N, end_k_N], dim=1).flatten()
    zero = segments.cu_seqlens[:1]
    return torch.cat([zero, cu_q]), torch.cat([zero, cu_k])


def _ends(segments: Segments) -> tuple[Tensor, Tensor]:
    """Where the used part of each slot ends, and the slot itself."""
    end_N = segments.cu_seqlens[1:]
    if segments.lengths is None:
        return end_N, end_N
    return segments.cu_seqlens[:-1] + segments.lengths, end_N


def _longest(segments: Segments) -> int:
    """At least 2: for 1 torch takes a special path, which requires a query in every segment."""
    return max(segments.max_length, 2)


def forward(
    q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, segments: Segments, segments_k: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out_THE in the dtype of q and lse_HT in float32, as ``kernels.attention`` defines them."""
    T, H, E = q_THE.shape
    if T == 0 or k_SKE.shape[0] == 0:
        return q_THE.new_zeros(q_THE.shape), q_THE.new_full((H, T), -torch.inf, dtype=torch.float32)
    out_THE, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        loadable(q_THE, E),
        loadable(k_SKE, E),
        loadable(v_SKE, E),
        *boundaries(segments, segments_k),
        _longest(segments),
        _longest(segments_k),
        0.0,  # dropout
        causal,
        False,  # no debug mask
        scale=scale,
    )
    return out_THE.contiguous(), lse_HT.masked_fill_(lse_HT == torch.inf, -torch.inf)


def backward(
    dout_THE: Tensor,
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_THE, dk_SKE and dv_SKE in the dtype of q, contiguous. k and v may be only some of the keys of the softmax that
    ``out`` and ``lse`` belong to; the results are then the shares of these keys."""
    E = q_THE.shape[2]
    if q_THE.shape[0] == 0 or k_SKE.shape[0] == 0:
        return q_THE.new_zeros(q_THE.shape), k_SKE.new_zeros(k_SKE.shape), v_SKE.new_zeros(v_SKE.shape)
    with _deterministic(deterministic):
        dq_THE, dk_SKE, dv_SKE = torch.ops.aten._flash_attention_backward(
            loadable(dout_THE, E),
            loadable(q_THE, E),
            loadable(k_SKE, E),
            loadable(v_SKE, E),
            out_THE.contiguous(),
            lse_HT.masked_fill(lse_HT == -torch.inf, torch.inf),
            *boundaries(segments, segments_k),
            _longest(segments),
            _longest(segments_k),
            0.0,  # dropout, and so no random state
            causal,
            torch.zeros(2, dtype=torch.uint64, device=q_THE.device),
            torch.empty(0, device=q_THE.device),
            scale=scale,
        )
    return dq_THE.contiguous(), dk_SKE.contiguous(), dv_SKE.contiguous()


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """These kernels ask torch whether gradients have to repeat bit for bit, and refuse where it only warns."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted == enabled and not warn_only:
        yield
        return
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
