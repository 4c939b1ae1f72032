"""What ``aten::_flash_attention_forward`` and its backward compute, exactly and on the CPU, with the conventions of
FlashAttention-2 (flash_api.cpp of torch 2.11). One segment and one head at a time, without our own references."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import backend


@contextlib.contextmanager
def stand_in(arch: int) -> Iterator[list[str]]:
    """The table answers for an architecture, and the two ops run on the CPU. Yields the names of the calls as they
    come."""
    calls = []

    def forward(*inputs, **options):
        calls.append("forward")
        return flash_forward(*inputs, **options)

    def backward(*inputs, **options):
        calls.append("deterministic backward" if torch.are_deterministic_algorithms_enabled() else "backward")
        return flash_backward(*inputs, **options)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    with pretend(arch):
        yield calls
    library._destroy()


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[None]:
    """The table answers for an architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "architecture", lambda cuda: arch)
        backend.trust_all()
        yield
    backend.trust_all()


def checked(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Rows of queries and of keys of each segment, after the checks that torch makes, and those that it should make."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert q.stride(2) == k.stride(2) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) > 1
    assert cu_q.is_contiguous() and cu_k.is_contiguous()
    assert max_q > 1, "torch takes a path for one query a segment, which needs a query in every segment"
    rows = []
    for n in range(len(cu_q) - 1):
        rows.append((slice(*cu_q[n : n + 2].tolist()), slice(*cu_k[n : n + 2].tolist())))
        assert rows[-1][0].stop - rows[-1][0].start <= max_q, "blocks past max_q are not computed"
        assert rows[-1][1].stop - rows[-1][1].start <= max_k, "blocks past max_k are not computed"
    assert rows[-1][0].stop == len(q) and rows[-1][1].stop == len(k)
    return rows


def scores(q_QE: Tensor, k_LE: Tensor, scale: float, causal: bool) -> Tensor:
    s_QL = scale * q_QE.double() @ k_LE.double().T
    if causal:
        Q, L = s_QL.shape
        i_Q1, j_L = torch.arange(Q)[:, None], torch.arange(L)
        s_QL = torch.where(j_L <= i_Q1 + L - Q, s_QL, -torch.inf)
    return s_QL


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug_mask, *, scale=None):
    assert dropout == 0.0 and not debug_mask
    T, H, E = q.shape
    group = H // k.shape[1]
    out = torch.full((T, H, E), torch.nan, dtype=torch.float64)
    lse = torch.full((H, T), torch.nan, dtype=torch.float64)
    for of_q, of_k in checked(q, k, cu_q, cu_k, max_q, max_k):
        for h in range(H):
            s_QL = scores(q[of_q, h], k[of_k, h // group], scale, causal)
            has_keys = (s_QL > -torch.inf).any(1)
            p_QL = torch.where(has_keys[:, None], s_QL.softmax(1) if s_QL.shape[1] else s_QL, 0.0)
            out[of_q, h] = p_QL @ v[of_k, h // group].double()
            lse[h, of_q] = torch.where(has_keys, s_QL.logsumexp(1), torch.inf)
    unused = torch.empty(0)
    return out.to(q.dtype), lse.float(), unused, unused, unused


def flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale):
    assert dropout == 0.0 and dout.dtype == out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and dout.stride(2) == 1
    assert not (lse == -torch.inf).any(), "its own forward gives +inf to a query without keys"
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    for of_q, of_k in checked(q, k, cu_q, cu_k, max_q, max_k):
        if of_q.stop == of_q.start or of_k.stop == of_k.start:
            continue
        for h in range(q.shape[1]):
            kh = h // group
            q_QE, k_LE, v_LE = q[of_q, h].double(), k[of_k, kh].double(), v[of_k, kh].double()
            do_QE = dout[of_q, h].double()
            p_QL = (scores(q_QE, k_LE, scale, causal) - lse[h, of_q, None].double()).exp()
            delta_Q1 = (do_QE * out[of_q, h].double()).sum(1, keepdim=True)
            ds_QL = p_QL * (do_QE @ v_LE.T - delta_Q1)
            dq[of_q, h] = scale * ds_QL @ k_LE
            dk[of_k, kh] += scale * ds_QL.T @ q_QE
            dv[of_k, kh] += p_QL.T @ do_QE
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))
