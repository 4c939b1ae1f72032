"""Attention of one new token per sequence against a long key/value cache.

    out_b = softmax over first_b <= j < length_b of s_bj . v_bj        s_bj = scale * q_b . k_bj
    with a soft cap c:  s_bj = c tanh(scale * q_b . k_bj / c)

Flash-decoding (Dao et al. 2023): the visible slots of a sequence are cut into N splits that run in parallel. With the
scores s2 = log2(e) s, split n yields out_n, attention over its slots, and lse_n = log2 sum_j 2^s2_j; then

    lse = log2 sum_n 2^lse_n        out = sum_n 2^(lse_n - lse) out_n

Every visible key and value is read once, 2 * (length - first) * K * E * itemsize bytes per sequence, and little else
moves: the time is at least what a plain copy of as many bytes takes.

B sequences   S slots of the cache   H query heads   K key/value heads (H a multiple of K)   E head dim   N splits
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import capped, check_softcap, score_numbers
from kernels.backend import define_op, implementation, num_processors
from kernels.dispatch import MAX_HEAD_DIM

TILE_BYTES = 16 * 1024  # of keys, and the same of values, that a program loads at a time
PROGRAMS_PER_PROCESSOR = 3  # resident at a time; each has one or two tiles of both in flight, 96 KiB or more in all
MIN_SPLIT = 128  # slots; fewer are not worth a program
MAX_SPLIT = 2048  # slots; with more, long sequences would finish late in a batch that has short ones


def decode_attention_reference(
    q_BHE: Tensor,
    k_cache_BSKE: Tensor,
    v_cache_BSKE: Tensor,
    length_B: Tensor,
    first_B: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The specification, and what runs on the CPU and in float64. Hidden slots are multiplied by 0, so they must be
    finite."""
    slot_S = torch.arange(k_cache_BSKE.shape[1], device=q_BHE.device)
    visible_BS = slot_S < length_B[:, None]
    if first_B is not None:
        visible_BS &= slot_S >= first_B[:, None]
    is_empty_B11 = ~visible_BS.any(1)[:, None, None]
    if softcap is not None:
        scale = q_BHE.shape[2] ** -0.5 if scale is None else scale
        out_BHE = _capped_reference(q_BHE, k_cache_BSKE, v_cache_BSKE, visible_BS, scale, softcap)
        return out_BHE.masked_fill(is_empty_B11, 0.0)
    out_BH1E = F.scaled_dot_product_attention(
        q_BHE.unsqueeze(2),
        k_cache_BSKE.transpose(1, 2),
        v_cache_BSKE.transpose(1, 2),
        attn_mask=visible_BS[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out_BH1E.squeeze(2).masked_fill(is_empty_B11, 0.0)


def _capped_reference(
    q_BHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, visible_BS: Tensor, scale: float, softcap: float
) -> Tensor:
    """By the formula itself, in float32 (float64 stays)."""
    dtype = torch.promote_types(q_BHE.dtype, torch.float32)
    q_BKGE = q_BHE.to(dtype).unflatten(1, (k_cache_BSKE.shape[2], -1))
    s_BKGS = scale * q_BKGE @ k_cache_BSKE.to(dtype).permute(0, 2, 3, 1)
    s_BKGS = (softcap * torch.tanh(s_BKGS / softcap)).masked_fill(~visible_BS[:, None, None], -torch.inf)
    out_BKGE = s_BKGS.softmax(-1) @ v_cache_BSKE.to(dtype).transpose(1, 2)
    return out_BKGE.flatten(1, 2).to(q_BHE.dtype)


@triton.jit
def _share(length_ptr, first_ptr, b, S, num_splits, MIN_SPLIT: tl.constexpr):
    """First visible slot of sequence b, the slot that ends it, and how many a split has: an equal part, but at least
    MIN_SPLIT."""
    length = tl.minimum(tl.load(length_ptr + b), S).to(tl.int32)
    first = length * 0
    if first_ptr is not None:
        first = tl.maximum(tl.load(first_ptr + b), 0).to(tl.int32)
    split_size = tl.maximum(tl.cdiv(length - first, num_splits), MIN_SPLIT)
    return first, length, split_size


@triton.jit(do_not_specialize=["S", "num_splits"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    first_ptr,
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
    cap_scale,
    softcap,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    # One program owns one split of one sequence's slots and one key head, for all GROUP query heads that read it.
    k_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin, length, split_size = _share(length_ptr, first_ptr, b, S, num_splits, MIN_SPLIT)
    start = begin + split * split_size
    if (split > 0) & (start >= length):  # split 0 of an empty sequence continues, to write zeros
        return
    end = tl.minimum(start + split_size, length)
    g = tl.arange(0, ROWS)
    s = tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    inside_q = (g < GROUP)[:, None] & (e < E)[None, :]
    head = (b * tl.num_programs(0) + k_head) * GROUP + g
    q_offset = head[:, None] * E + e[None, :]
    q = tl.load(q_ptr + q_offset, mask=inside_q, other=0.0)
    k_ptr += b * k_stride_b + k_head * k_stride_k + start.to(tl.int64) * k_stride_s
    v_ptr += b * v_stride_b + k_head * v_stride_k + start.to(tl.int64) * v_stride_s
    k_offset = s[:, None] * k_stride_s + e[None, :]
    v_offset = s[:, None] * v_stride_s + e[None, :]

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for first in range(start, end, BLOCK_S):
        used = first + s < end
        inside = used[:, None] & (e < E)[None, :]
        k = tl.load(k_ptr + k_offset, mask=inside, other=0.0)
        scores = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), cap_scale, softcap) * scale_log2
        scores = tl.where(used[None, :], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + v_offset, mask=inside, other=0.0)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        m = m_next
        k_ptr += BLOCK_S * k_stride_s
        v_ptr += BLOCK_S * v_stride_s

    part = head * num_splits + split
    total = tl.where(total == 0.0, 1.0, total)
    out = out / total[:, None]
    out_offset = part[:, None] * E + e[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=inside_q)
    tl.store(lse_ptr + part, m + tl.log2(total), mask=g < GROUP)


@triton.jit(do_not_specialize=["S", "num_splits"])
def _merge_kernel(
    part_ptr,
    lse_ptr,
    length_ptr,
    first_ptr,
    out_ptr,
    S,
    num_splits,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    # One program owns one query head of one sequence, over all splits with slots.
    BLOCK_N: tl.constexpr = 8192 // BLOCK_E
    b = tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + tl.program_id(0)
    begin, length, split_size = _share(length_ptr, first_ptr, b, S, num_splits, MIN_SPLIT)
    used = tl.cdiv(tl.maximum(length - begin, 0), split_size)
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
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
    """Tile sizes and launch options of the split kernel. Its test checks what they compile to."""
    rows = max(16, triton.next_power_of_2(group))  # tl.dot takes at least 16
    block_e = max(16, triton.next_power_of_2(E))
    block_s = min(64, TILE_BYTES // (block_e * itemsize))
    num_stages = 3 if block_s * block_e * itemsize == TILE_BYTES else 5  # small tiles: more of them on their way
    tile = {"ROWS": rows, "BLOCK_S": block_s, "BLOCK_E": block_e, "num_stages": num_stages}
    if rows * block_e * itemsize > 4096:
        return {**tile, "num_warps": 8}
    return {**tile, "num_warps": 4, "maxnreg": 168}  # of 65,536 registers: three programs of 128 threads


def _num_splits(B: int, S: int, K: int, num_processors: int) -> int:
    """Splits of every sequence. They follow from sizes that the host knows; the lengths stay on the device."""
    fills_the_device = PROGRAMS_PER_PROCESSOR * num_processors // (B * K)
    fewest = max(1, triton.cdiv(S, MAX_SPLIT))
    most = max(1, triton.cdiv(S, MIN_SPLIT))
    return min(max(fills_the_device, fewest), most)


def decode_attention_op(
    q_BHE: Tensor,
    k_cache_BSKE: Tensor,
    v_cache_BSKE: Tensor,
    length_B: Tensor,
    first_B: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    B, H, E = q_BHE.shape
    S, K = k_cache_BSKE.shape[1:3]
    q_BHE = q_BHE.contiguous()
    length_B = length_B.contiguous()
    if first_B is not None:
        first_B = first_B.contiguous()
    out_BHE = torch.empty_like(q_BHE)
    if q_BHE.numel() == 0:
        return out_BHE
    config = _config(E, H // K, q_BHE.element_size())
    N = _num_splits(B, S, K, num_processors(q_BHE))
    # A single split is the whole sequence: its (B, H, 1, E) is the result.
    part_BHNE = out_BHE if N == 1 else out_BHE.new_empty((B, H, N, E), dtype=torch.float32)
    lse_BHN = out_BHE.new_empty((B, H, N), dtype=torch.float32)
    # Key heads come first in the launch order, so that programs that run together read neighbouring bytes.
    _split_kernel[(K, N, B)](
        q_BHE,
        k_cache_BSKE,
        v_cache_BSKE,
        length_B,
        first_B,
        part_BHNE,
        lse_BHN,
        *k_cache_BSKE.stride()[:3],
        *v_cache_BSKE.stride()[:3],
        S,
        N,
        *score_numbers(scale, softcap),
        GROUP=H // K,
        E=E,
        MIN_SPLIT=MIN_SPLIT,
        **config,
    )
    if N > 1:
        constants = {"E": E, "BLOCK_E": config["BLOCK_E"], "MIN_SPLIT": MIN_SPLIT}
        _merge_kernel[(H, B)](part_BHNE, lse_BHN, length_B, first_B, out_BHE, S, N, **constants)
    return out_BHE


def _fake(q_BHE, *_):
    return q_BHE.new_empty(q_BHE.shape)


_decode = define_op(decode_attention_op, _fake)


def decode_attention(
    q_BHE: Tensor,
    k_cache_BSKE: Tensor,
    v_cache_BSKE: Tensor,
    length_B: Tensor,
    first_B: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """out_BHE in the dtype of q. ``length_B`` (int32 or int64) counts the used slots, the new token's own included;
    ``first_B`` is the first slot that is visible, 0 by default: the lower end of a sliding window.

    A sequence without visible slots has out 0. The host does not read the numbers: a length above S goes unnoticed and
    counts as S. Hidden slots may hold any finite number; Triton does not read them. The caches may have any strides
    except in the last dim. ``scale`` is 1 / sqrt(E) by default; ``softcap`` bounds the scores. The same call returns
    the same bits; a different B or S is split differently and may round differently. Not differentiable. ValueError for
    inputs that do not fit together.
    """
    _check(q_BHE, k_cache_BSKE, v_cache_BSKE, length_B)
    if first_B is not None and not (
        first_B.shape == length_B.shape and first_B.dtype == length_B.dtype and first_B.device == length_B.device
    ):
        kinds = [f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (length_B, first_B)]
        raise ValueError(f"first_B must be like length_B: {kinds[0]}, not {kinds[1]}")
    check_softcap(softcap)
    inputs = q_BHE, k_cache_BSKE, v_cache_BSKE, length_B, first_B
    if implementation("decode", q_BHE, q_BHE.shape[2]) == "pytorch":
        return decode_attention_reference(*inputs, scale=scale, softcap=softcap)
    scale = q_BHE.shape[2] ** -0.5 if scale is None else scale
    return _decode(*inputs, scale, softcap)


def _check(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v, length)]
    if [len(shape) for shape in shapes] != [3, 4, 4, 1]:
        raise ValueError(f"decode_attention takes q_BHE, k_BSKE, v_BSKE and length_B, not {shapes}")
    B, H, E = q.shape
    if k.shape != v.shape or k.shape[0] != B or length.shape[0] != B or k.shape[3] != E:
        raise ValueError(f"q_BHE, k_BSKE, v_BSKE and length_B disagree on B, S, K or E: {shapes}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"{H} query heads are not a multiple of {k.shape[2]} key heads")
    if not 1 <= E <= MAX_HEAD_DIM:
        raise ValueError(f"head dim {E} is not between 1 and {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if length.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"length_B must be int32 or int64, not {length.dtype}")
    if not q.device == k.device == v.device == length.device:
        devices = f"{q.device}, {k.device}, {v.device} and {length.device}"
        raise ValueError(f"q, k, v and length must be on one device, not {devices}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"the last dim of a cache must be contiguous, not strides {k.stride()} and {v.stride()}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("decode_attention has no gradient: call it under torch.no_grad()")
