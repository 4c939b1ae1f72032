"""The providers of attention that are compared: ours, PyTorch's, and flash_attn packages if they are installed.

A provider takes the inputs of a case and a direction and returns a function from (q_THE, k_SKE, v_SKE) to out_THE, or
raises. Work that should not be timed (masks, compilation) happens there. Batched providers see views of the packed row;
nested ones, too, and repeat the keys of shared heads, which they must have.

T query rows   S key rows   H query heads   K key/value heads   E head dim
N sequences of equal length   Q, L rows of each (queries, keys)
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from kernels import attention_backward, attention_forward, attention_statistics
from kernels.attention import attention
from kernels.benchmark.peers import Unavailable, peer
from kernels.decode import decode_attention
from kernels.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device. q, k and v are leaves that require gradients; grad_THE is that of out."""

    q_THE: Tensor
    k_SKE: Tensor
    v_SKE: Tensor
    grad_THE: Tensor
    segments: Segments
    segments_k: Segments
    causal: bool

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_THE, self.k_SKE, self.v_SKE

    @property
    def equal(self) -> bool:
        """Whether all sequences have the same number of queries and the same number of keys."""
        q_lengths = {length for _, length in self.segments.spans}
        k_lengths = {length for _, length in self.segments_k.spans}
        return len(q_lengths) == len(k_lengths) == 1

    def batched(self, x: Tensor) -> Tensor:
        """(rows, heads, E) as (N, rows of one sequence, heads, E). Raises Unavailable if lengths differ."""
        if not self.equal:
            raise Unavailable("no packed segments")
        return x.unflatten(0, (len(self.segments), -1))


Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Provider = Callable[[Case, str], Run]


def _ours(case: Case, mode: str) -> Run:
    return lambda q, k, v: attention(q, k, v, case.segments, causal=case.causal)


def _ours_deterministic(case: Case, mode: str) -> Run:
    if mode == "fwd":
        raise Unavailable("the forward is always deterministic")
    return lambda q, k, v: attention(q, k, v, case.segments, causal=case.causal, deterministic=True)


class _Triton(torch.autograd.Function):
    """Our kernels themselves, where ``attention`` may run others."""

    @staticmethod
    def forward(ctx, q_THE, k_SKE, v_SKE, case):
        ctx.case, scale = case, q_THE.shape[2] ** -0.5
        both = case.segments, case.segments_k
        out_THE, lse_HT = attention_forward.forward(q_THE, k_SKE, v_SKE, *both, case.causal, scale)
        ctx.save_for_backward(q_THE, k_SKE, v_SKE, out_THE, lse_HT)
        return out_THE

    @staticmethod
    def backward(ctx, dout_THE):
        q_THE, k_SKE, v_SKE, out_THE, lse_HT = ctx.saved_tensors
        statistics = attention_statistics.statistics(out_THE, dout_THE, lse_HT, None)
        options = ctx.case.segments, ctx.case.segments_k, ctx.case.causal, q_THE.shape[2] ** -0.5, False
        return *attention_backward.backward(dout_THE, q_THE, k_SKE, v_SKE, *statistics, *options), None


def _ours_triton(case: Case, mode: str) -> Run:
    _needs_gpu(case)
    return lambda q, k, v: _Triton.apply(q, k, v, case)


def _ours_hopper(case: Case, mode: str) -> Run:
    if mode == "bwd":
        raise Unavailable("forward only")
    _needs_gpu(case)
    hopper = importlib.import_module("kernels.attention_hopper")  # imported here: if that fails, it is a row's reason
    scale = case.q_THE.shape[-1] ** -0.5
    return lambda q, k, v: hopper.forward(q, k, v, case.segments, case.segments_k, case.causal, scale)[0]


def _ours_decode(case: Case, mode: str) -> Run:
    length_N = case.segments_k.cu_seqlens.diff()
    return lambda q, k, v: decode_attention(q, case.batched(k), case.batched(v), length_N)


def _sdpa(backend: SDPBackend, case: Case, mode: str) -> Run:
    shared = case.q_THE.shape[1] != case.k_SKE.shape[1]

    def run(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        q_NHQE, k_NKLE, v_NKLE = (case.batched(x).transpose(1, 2) for x in (q_THE, k_SKE, v_SKE))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q_NHQE, k_NKLE, v_NKLE, is_causal=case.causal, enable_gqa=shared)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def _nested(backend: SDPBackend, case: Case, mode: str) -> Run:
    """scaled_dot_product_attention of nested tensors in the jagged layout."""
    _needs_gpu(case)
    if case.causal and case.segments is not case.segments_k:
        raise Unavailable("self-attention only")
    group_size = case.q_THE.shape[1] // case.k_SKE.shape[1]

    def nested(x: Tensor, segments: Segments) -> Tensor:
        lengths = [length for _, length in segments.spans]
        bounds = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}
        return torch.nested.nested_tensor_from_jagged(x, segments.cu_seqlens, **bounds).transpose(1, 2)

    def run(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        k_SHE, v_SHE = (x.repeat_interleave(group_size, 1) if group_size > 1 else x for x in (k_SKE, v_SKE))
        q, k, v = nested(q_THE, case.segments), nested(k_SHE, case.segments_k), nested(v_SHE, case.segments_k)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2).values()

    return run


def _with_flash(version: str | None, provider: Callable[[Case, str], Run], case: Case, mode: str) -> Run:
    """A provider that may run PyTorch's flash attention op, by the kernels of FA3 or FA4; None: those PyTorch comes
    with. The choice is one for the whole process, so every call makes it, and every backward."""
    if version:
        peer(FLASH_MODULES[version])
    run = provider(case, mode)

    def choose(*_: Tensor) -> None:
        if current_flash_attention_impl() == version:
            return
        if version:
            activate_flash_attention_impl(version)
        else:
            restore_flash_attention_impl()

    def chosen(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        choose()
        out_THE = run(q_THE, k_SKE, v_SKE)
        if out_THE.requires_grad:
            out_THE.register_hook(choose)
        return out_THE

    return chosen


def _varlen(case: Case, mode: str) -> Run:
    _needs_gpu(case)
    cut = (case.segments.cu_seqlens, case.segments_k.cu_seqlens, case.segments.max_length, case.segments_k.max_length)
    window = (-1, 0) if case.causal else (-1, -1)

    def run(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        return varlen_attn(q_THE, k_SKE, v_SKE, *cut, window_size=window)  # pyrefly: ignore[bad-return]

    return run


def _flex(backend: str | None, case: Case, mode: str) -> Run:
    if backend == "FLASH":
        peer("flash_attn.cute")
    _needs_gpu(case)
    torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and stops compiling after a few
    torch._functorch.config.donated_buffer = False  # one graph serves many backwards, which need its buffers again
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = _block_mask(case)
    shared = case.q_THE.shape[1] != case.k_SKE.shape[1]
    batched = case.batched if case.equal else lambda x: x.unsqueeze(0)
    options: dict = {"kernel_options": {"BACKEND": backend}} if backend else {}

    def run(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        q_NHQE, k_NKLE, v_NKLE = (batched(x).transpose(1, 2) for x in (q_THE, k_SKE, v_SKE))
        out = compiled(q_NHQE, k_NKLE, v_NKLE, block_mask=block_mask, enable_gqa=shared, **options)
        return out.transpose(1, 2).flatten(0, 1)  # pyrefly: ignore[missing-attribute]

    return run


def _block_mask(case: Case) -> BlockMask | None:
    """Keys that FlexAttention may skip: future ones, and if lengths differ those of other documents."""
    T, device = case.q_THE.shape[0], case.q_THE.device
    if case.equal and not case.causal:
        return None
    if case.equal:
        Q = case.segments.max_length
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, Q, Q, device)
    document_T = torch.arange(len(case.segments), device=device).repeat_interleave(case.segments.cu_seqlens.diff())

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_document = document_T[i] == document_T[j]
        return same_document & (i >= j) if case.causal else same_document

    return create_block_mask(visible, None, None, T, T, device)


def _flash_attn(module_name: str, case: Case, mode: str) -> Run:
    """flash_attn 2, flash_attn_interface (3) and flash_attn.cute (4) share the names and keywords used here."""
    module = peer(module_name)
    _needs_gpu(case)
    has_cache = case.segments.max_length == 1 and hasattr(module, "flash_attn_with_kvcache")
    cut = {
        "cu_seqlens_q": case.segments.cu_seqlens,
        "cu_seqlens_k": case.segments_k.cu_seqlens,
        "max_seqlen_q": case.segments.max_length,
        "max_seqlen_k": case.segments_k.max_length,
    }
    length_N = case.segments_k.cu_seqlens.diff()

    def run(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
        if not case.equal:
            out = module.flash_attn_varlen_func(q_THE, k_SKE, v_SKE, **cut, causal=case.causal)
        else:
            batch = (case.batched(x) for x in (q_THE, k_SKE, v_SKE))
            if has_cache:
                out = module.flash_attn_with_kvcache(*batch, cache_seqlens=length_N)
            else:
                out = module.flash_attn_func(*batch, causal=case.causal)
        if isinstance(out, tuple):  # version 4, and some of version 3, also return lse
            out = out[0]
        return out.reshape(q_THE.shape)

    return run


def _needs_gpu(case: Case) -> None:
    if not case.q_THE.is_cuda:
        raise Unavailable("needs a GPU")


FLASH_MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
OTHERS: dict[str, Provider] = {
    "sdpa flash": partial(_with_flash, None, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "nested flash": partial(_with_flash, None, partial(_nested, SDPBackend.FLASH_ATTENTION)),
    "nested cudnn": partial(_nested, SDPBackend.CUDNN_ATTENTION),
    "varlen": partial(_with_flash, None, _varlen),
    "varlen FA3": partial(_with_flash, "FA3", _varlen),
    "varlen FA4": partial(_with_flash, "FA4", _varlen),
    "flex": partial(_flex, None),
    "flex FLASH": partial(_flex, "FLASH"),
    "flash_attn 2": partial(_flash_attn, "flash_attn"),
    "flash_attn 3": partial(_flash_attn, "flash_attn_interface"),
    "flash_attn 4": partial(_flash_attn, "flash_attn.cute"),
}
PROVIDERS: dict[str, Provider] = {
    "ours": partial(_with_flash, None, _ours),
    "ours deterministic": partial(_with_flash, None, _ours_deterministic),
    "ours triton": _ours_triton,
    "ours hopper": _ours_hopper,
    **OTHERS,
}
DECODE_PROVIDERS: dict[str, Provider] = {"ours": _ours_decode, **OTHERS}
