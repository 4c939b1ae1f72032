"""Attention of one new token per sequence against a long key/value cache.

    out_b = softmax over j < length_b of (scale * q_b . k_bj) . v_bj

Flash-decoding (Dao et al. 2023): the used slots of a sequence are cut into N splits that run at the same time. With the
scores s2 = scale * log2(e) * q . k, split n leaves out_n, its own softmax(s2) . v, and lse_n = log2 sum_j 2^s2_j; then

    lse = log2 sum_n 2^lse_n        out = sum_n 2^(lse_n - lse) out_n

Every key and value is read once, length * K * E * 2 * itemsize bytes per sequence, and little else moves: that traffic
at the speed of a plain copy is the floor of the time.

B sequences   S slots of the cache   H query heads   K key/value heads (H a multiple of K)   E head dim   N splits
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import LOG2_E, MAX_HEAD_DIM, define_op, runs_triton

TILE_BYTES = 16 * 1024  # of keys, and again of values, that a program asks for at a time
PROGRAMS_PER_PROCESSOR = 3  # that fit at a time: each waits for one or two tiles of both, together 96 KiB or more
MIN_SPLIT = 128  # slots that are worth a program
MAX_SPLIT = 2048  # slots after which the long sequences of a batch with short ones would end too late


def decode_attention_reference(
    q_BHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, length_B: Tensor, *, scale: float | None = None
) -> Tensor:
    """The specification, and the path of the CPU and of float64. Spare slots are multiplied by 0: finite, please."""
    S = k_cache_BSKE.shape[1]
    visible_B11S = (torch.arange(S, device=q_BHE.device) < length_B[:, None])[:, None, None, :]
    out_BH1E = F.scaled_dot_product_attention(
        q_BHE.unsqueeze(2),
        k_cache_BSKE.transpose(1, 2),
        v_cache_BSKE.transpose(1, 2),
        attn_mask=visible_B11S,
        scale=scale,
        enable_gqa=True,
    )
    return out_BH1E.squeeze(2).masked_fill((length_B <= 0)[:, None, None], 0.0)


@triton.jit
def _share(length_ptr, b, S, num_splits, MIN_SPLIT: tl.constexpr):
    """Used slots of sequence b, and how many of them each split takes: an equal part, but MIN_SPLIT at least."""
    length = tl.minimum(tl.load(length_ptr + b), S).to(tl.int32)
    return length, tl.maximum(tl.cdiv(length, num_splits), MIN_SPLIT)


@triton.jit(do_not_specialize=["S", "num_splits"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    k_stride_b,
    k_stride_s,
    k_stride_k,
    v_stride_b,
    v_stride_s,
    v_stride_k,
    S,
    num_splits,
    scale_log2,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    # One program owns one split of one sequence's slots and one key head, for all GROUP query heads that read it.
    k_head, split, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length, split_size = _share(length_ptr, b, S, num_splits, MIN_SPLIT)
    start = split * split_size
    if (split > 0) & (start >= length):  # split 0 of an empty sequence goes on, to write zeros
        return
    end = tl.minimum(start + split_size, length)
    g, s, e = tl.arange(0, ROWS), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    inside_q = (g < GROUP)[:, None] & (e < E)[None, :]
    head = (b * tl.num_programs(0) + k_head) * GROUP + g
    q = tl.load(q_ptr + head[:, None] * E + e[None, :], mask=inside_q, other=0.0)
    k_ptr += b * k_stride_b + k_head * k_stride_k + start.to(tl.int64) * k_stride_s
    v_ptr += b * v_stride_b + k_head * v_stride_k + start.to(tl.int64) * v_stride_s
    k_offset, v_offset = s[:, None] * k_stride_s + e[None, :], s[:, None] * v_stride_s + e[None, :]

    m, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for first in range(start, end, BLOCK_S):
        used = first + s < end
        inside = used[:, None] & (e < E)[None, :]
        k = tl.load(k_ptr + k_offset, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(used[None, :], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + v_offset, mask=inside, other=0.0)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        m = m_next
        k_ptr, v_ptr = k_ptr + BLOCK_S * k_stride_s, v_ptr + BLOCK_S * v_stride_s

    part = head * num_splits + split
    total = tl.where(total == 0.0, 1.0, total)
    out = out / total[:, None]
    tl.store(out_ptr + part[:, None] * E + e[None, :], out.to(out_ptr.dtype.element_ty), mask=inside_q)
    tl.store(lse_ptr + part, m + tl.log2(total), mask=g < GROUP)


@triton.jit(do_not_specialize=["S", "num_splits"])
def _merge_kernel(
    part_ptr,
    lse_ptr,
    length_ptr,
    out_ptr,
    S,
    num_splits,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    # One program owns one query head of one sequence, over all splits that had slots to read.
    BLOCK_N: tl.constexpr = 8192 // BLOCK_E
    b = tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + tl.program_id(0)
    length, split_size = _share(length_ptr, b, S, num_splits, MIN_SPLIT)
    used = tl.cdiv(length, split_size)
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    m = float("-inf")
    total = 0.0
    out = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, used, BLOCK_N):
        split = first + n
        row = head * num_splits + split
        lse = tl.load(lse_ptr + row, mask=split < used, other=float("-inf"))
        inside = (split < used)[:, None] & (e < E)[None, :]
        part = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=inside, other=0.0)
        m_next = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_next)
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(weight[:, None] * part, 0)
        m = m_next
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


def _config(E: int, group: int, itemsize: int) -> dict[str, int]:
    """Tile and launch options of the split kernel. What the compiler makes of them is held by its test."""
    rows, block_e = (max(16, triton.next_power_of_2(n)) for n in (group, E))  # the least that tl.dot takes
    tile = {"ROWS": rows, "BLOCK_S": min(128, TILE_BYTES // (block_e * itemsize)), "BLOCK_E": block_e, "num_stages": 3}
    if rows * block_e * itemsize > 4096:
        return {**tile, "num_warps": 8}
    return {**tile, "num_warps": 4, "maxnreg": 168}  # of 65,536 registers, for three programs of 128 threads


def _num_splits(B: int, S: int, K: int, processors: int) -> int:
    """Of every sequence, from what the host knows: the lengths stay on the device."""
    fill = PROGRAMS_PER_PROCESSOR * processors // (B * K)
    return max(1, min(max(fill, triton.cdiv(S, MAX_SPLIT)), triton.cdiv(S, MIN_SPLIT)))


def decode_attention_op(
    q_BHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, length_B: Tensor, scale: float
) -> Tensor:
    B, H, E = q_BHE.shape
    S, K = k_cache_BSKE.shape[1:3]
    q_BHE, length_B = q_BHE.contiguous(), length_B.contiguous()
    out_BHE = torch.empty_like(q_BHE)
    if q_BHE.numel() == 0:
        return out_BHE
    config = _config(E, H // K, q_BHE.element_size())
    processors = 16  # in the interpreter, to have splits to merge
    if q_BHE.is_cuda:
        processors = torch.cuda.get_device_properties(q_BHE.device).multi_processor_count
    N = _num_splits(B, S, K, processors)
    # One split is the whole sequence, and its (B, H, 1, E) is the result.
    part_BHNE = out_BHE if N == 1 else out_BHE.new_empty((B, H, N, E), dtype=torch.float32)
    lse_BHN = out_BHE.new_empty((B, H, N), dtype=torch.float32)
    # Key heads come first in the launch order: programs that run together read neighbouring bytes.
    _split_kernel[(K, N, B)](
        q_BHE,
        k_cache_BSKE,
        v_cache_BSKE,
        length_B,
        part_BHNE,
        lse_BHN,
        *k_cache_BSKE.stride()[:3],
        *v_cache_BSKE.stride()[:3],
        S,
        N,
        scale * LOG2_E,
        GROUP=H // K,
        E=E,
        MIN_SPLIT=MIN_SPLIT,
        **config,
    )
    if N > 1:
        constants = {"E": E, "BLOCK_E": config["BLOCK_E"], "MIN_SPLIT": MIN_SPLIT}
        _merge_kernel[(H, B)](part_BHNE, lse_BHN, length_B, out_BHE, S, N, **constants)
    return out_BHE


_decode = define_op(decode_attention_op, lambda q_BHE, *_: q_BHE.new_empty(q_BHE.shape))


def decode_attention(
    q_BHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, length_B: Tensor, *, scale: float | None = None
) -> Tensor:
    """out_BHE in the dtype of q. ``length_B`` (int32 or int64) counts the used slots, the new token's own included.

    A sequence of length 0 gives 0. The host does not read lengths: one over S goes unnoticed and counts as S. Slots
    past the length may hold any finite number; Triton does not read them at all. The caches may be strided, but for
    their last dim. ``scale`` is 1 / sqrt(E) by default. Equal calls give equal bits; another B or S may round
    differently, being split differently. For generation: not differentiable. ValueError for what does not fit together.
    """
    _check(q_BHE, k_cache_BSKE, v_cache_BSKE, length_B)
    if not runs_triton(q_BHE):
        return decode_attention_reference(q_BHE, k_cache_BSKE, v_cache_BSKE, length_B, scale=scale)
    return _decode(q_BHE, k_cache_BSKE, v_cache_BSKE, length_B, q_BHE.shape[2] ** -0.5 if scale is None else scale)


def _check(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v, length)]
    if [len(shape) for shape in shapes] != [3, 4, 4, 1]:
        raise ValueError(f"decode_attention wants q_BHE, k_BSKE, v_BSKE and length_B, got shapes {shapes}")
    B, H, E = q.shape
    if k.shape != v.shape or k.shape[0] != B or length.shape[0] != B or k.shape[3] != E:
        raise ValueError(f"q_BHE, k_BSKE, v_BSKE and length_B disagree on B, S, K or E: {shapes}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"{H} query heads are not a multiple of {k.shape[2]} key heads")
    if not 1 <= E <= MAX_HEAD_DIM:
        raise ValueError(f"head dim {E} is not between 1 and {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if length.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"length_B must be int32 or int64, got {length.dtype}")
    if not q.device == k.device == v.device == length.device:
        raise ValueError(f"one device for all, got q {q.device}, k {k.device}, v {v.device}, length {length.device}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"the last dim of a cache must be contiguous, got strides {k.stride()} and {v.stride()}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("decode_attention has no gradient: call it under torch.no_grad()")
