"""The inputs on which ``kernels.check`` compares operations with plain PyTorch: one case for each operation with its
gradients, dtype, head dim and kind of mask.

T query rows   S key rows   H query heads   K key/value heads   E head dim   R rows   D width   V vocabulary
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.attention import attention, attention_with_lse, attention_with_lse_reference
from kernels.attention_block import backward_reference, block_backward, block_forward, forward_reference, statistics
from kernels.cross_entropy import linear_cross_entropy
from kernels.decode import decode_attention, decode_attention_reference
from kernels.dispatch import LSE_GRADIENT, MASKED_ATTENTION, OPERATIONS
from kernels.projector import place_projected, place_projected_reference
from kernels.segments import Segments

HEADS, KEY_HEADS = 4, 2
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]  # of segments
    repeats: int  # calls that have to give the same bits

    @property
    def total(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Case:
    """Results by name: of plain PyTorch in a dtype, and of the implementation that the table names, operation by
    operation, where True asks for gradients that repeat. ``operations`` names the operation that computes each result,
    in the same order."""

    name: str
    operations: dict[str, str]
    like: Tensor  # has the device and dtype of the inputs
    head_dim: int | None
    reference: Callable[[torch.dtype], Results]
    ours: Callable[[bool], Iterator[Results]]
    cancelled: float = 0.0  # size of terms that may cancel in dq and dk

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype


def cases(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...],
    sizes: Sizes,
    operations: tuple[str, ...] = OPERATIONS,
) -> Iterator[Case]:
    """Cases that compute one of the operations. They draw from a generator of their own: the run's random numbers stay
    what they are."""
    generator = torch.Generator(device).manual_seed(0)

    for dtype in dtypes:

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        makers = [make_cross_entropy, make_projector]
        of_heads = (make_attention, make_blocks, make_lse_gradient, make_masked, make_decode)
        for head_dim in head_dims:
            makers += [_with(make, head_dim) for make in of_heads]
        for make in makers:
            for case in make(normal, sizes):
                if set(case.operations.values()) & set(operations):
                    yield case


def _with(make: Callable[..., Iterator[Case]], head_dim: int) -> Callable[..., Iterator[Case]]:
    return lambda normal, sizes: make(normal, sizes, head_dim)


def _named(what: str, like: Tensor, head_dim: int | None = None) -> str:
    dims = "" if head_dim is None else f", head dim {head_dim}"
    return f"{what}, {str(like.dtype).removeprefix('torch.')}{dims}"


def _leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype).detach().requires_grad_() for x in tensors]


def _cancelled(v_SKE: Tensor, dout_THE: Tensor, scale: float) -> float:
    """Gradients of probabilities, whose differences may cancel in dq and dk."""
    return (v_SKE.float().norm(dim=-1).max() * dout_THE.float().norm(dim=-1).max()).item() * scale


def make_attention(normal: Callable[..., Tensor], sizes: Sizes, head_dim: int) -> Iterator[Case]:
    q, dout = normal(sizes.total, HEADS, head_dim), normal(sizes.total, HEADS, head_dim)
    k, v = normal(sizes.total, KEY_HEADS, head_dim), normal(sizes.total, KEY_HEADS, head_dim)
    segments = Segments.of(list(sizes.lengths), q.device)
    forward = dict.fromkeys(("out without gradients", "lse", "out"), "attention_forward")
    backward = dict.fromkeys(("dq", "dk", "dv"), "attention_backward")
    for causal in (True, False):

        def reference(dtype: torch.dtype, causal: bool = causal) -> Results:
            leaves = _leaves((q, k, v), dtype)
            out, lse = attention_with_lse_reference(*leaves, segments, causal=causal)
            gradients = torch.autograd.grad(out, leaves, dout.to(dtype))
            return dict(zip((*forward, *backward), (out.detach(), lse.detach(), out.detach(), *gradients)))

        def ours(deterministic: bool, causal: bool = causal) -> Iterator[Results]:
            with torch.no_grad():  # where gradients are recorded, a distrusted backward takes the forward with it
                alone, lse = attention_with_lse(q, k, v, segments, causal=causal)
            leaves = _leaves((q, k, v), q.dtype)
            out = attention(leaves[0], leaves[1], leaves[2], segments, causal=causal, deterministic=deterministic)
            yield dict(zip(forward, (alone, lse, out.detach())))
            yield dict(zip(backward, torch.autograd.grad(out, leaves, dout)))

        name = _named("causal attention" if causal else "attention", q, head_dim)
        cancelled = _cancelled(v, dout, head_dim**-0.5)
        yield Case(name, forward | backward, q, head_dim, reference, ours, cancelled)


def make_lse_gradient(normal: Callable[..., Tensor], sizes: Sizes, head_dim: int) -> Iterator[Case]:
    q = normal(sizes.total, HEADS, head_dim)
    k, v = normal(sizes.total, KEY_HEADS, head_dim), normal(sizes.total, KEY_HEADS, head_dim)
    dlse = normal(HEADS, sizes.total).float()
    segments = Segments.of(list(sizes.lengths), q.device)

    def run(function: Callable, dtype: torch.dtype, **options: bool) -> Results:
        leaves = _leaves((q, k, v), dtype)
        _, lse = function(*leaves, segments, causal=True, **options)
        dq, dk, _ = torch.autograd.grad(lse, leaves, dlse, materialize_grads=True)
        return {"dq": dq, "dk": dk}

    yield Case(
        _named("gradient of lse", q, head_dim),
        dict.fromkeys(("dq", "dk"), LSE_GRADIENT),
        q,
        head_dim,
        lambda dtype: run(attention_with_lse_reference, dtype),
        lambda deterministic: iter([run(attention_with_lse, q.dtype, deterministic=deterministic)]),
        cancelled=dlse.abs().max().item(),
    )


def make_masked(normal: Callable[..., Tensor], sizes: Sizes, head_dim: int) -> Iterator[Case]:
    """A sliding window, with and without a soft cap."""
    q, dout = normal(sizes.total, HEADS, head_dim), normal(sizes.total, HEADS, head_dim)
    k, v = normal(sizes.total, KEY_HEADS, head_dim), normal(sizes.total, KEY_HEADS, head_dim)
    segments = Segments.of(list(sizes.lengths)).within(max(sizes.lengths) // 3).to(q.device)
    names = ("out", "lse", "dq", "dk", "dv")
    for softcap in (None, 2.0):

        def run(function: Callable, dtype: torch.dtype, softcap: float | None = softcap, **options: bool) -> Results:
            leaves = _leaves((q, k, v), dtype)
            out, lse = function(*leaves, segments, causal=True, softcap=softcap, **options)
            gradients = torch.autograd.grad(out, leaves, dout.to(dtype))
            return dict(zip(names, (out.detach(), lse.detach(), *gradients)))

        def ours(deterministic: bool, run: Callable[..., Results] = run) -> Iterator[Results]:
            yield run(attention_with_lse, q.dtype, deterministic=deterministic)

        yield Case(
            _named("window" if softcap is None else "window with a soft cap", q, head_dim),
            dict.fromkeys(names, MASKED_ATTENTION),
            q,
            head_dim,
            functools.partial(run, attention_with_lse_reference),
            ours,
            _cancelled(v, dout, head_dim**-0.5),
        )


def make_blocks(normal: Callable[..., Tensor], sizes: Sizes, head_dim: int) -> Iterator[Case]:
    """Two steps of a ring: keys that every query sees, then the causal block."""
    q, dout = normal(sizes.total, HEADS, head_dim), normal(sizes.total, HEADS, head_dim)
    segments = Segments.of(list(sizes.lengths), q.device)
    blocks = [(normal(sizes.total, KEY_HEADS, head_dim), normal(sizes.total, KEY_HEADS, head_dim)) for _ in range(2)]
    scale = head_dim**-0.5

    def run(dtype: torch.dtype, forward: Callable, of_softmax: Callable, backward: Callable) -> Iterator[Results]:
        given, dgiven = q.to(dtype), dout.to(dtype)
        (k1, v1), (k2, v2) = ((k.to(dtype), v.to(dtype)) for k, v in blocks)
        earlier = forward(given, k1, v1, segments, segments, causal=False, scale=scale)
        out, lse = forward(given, k2, v2, segments, segments, causal=True, scale=scale, earlier=earlier)
        yield {"out": out, "lse": lse}
        whole = of_softmax(out.to(dtype), dgiven, lse)
        dq1, dk1, dv1 = backward(dgiven, given, k1, v1, *whole, segments, segments, causal=False, scale=scale)
        dq2, dk2, dv2 = backward(dgiven, given, k2, v2, *whole, segments, segments, causal=True, scale=scale)
        yield {"dq": dq1 + dq2, "dk": torch.cat([dk1, dk2]), "dv": torch.cat([dv1, dv2])}

    def reference(dtype: torch.dtype) -> Results:
        forward, backward = run(dtype, forward_reference, statistics_reference, backward_reference)
        return forward | backward

    def statistics_reference(out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return lse.nan_to_num(neginf=0.0), (out.to(lse.dtype) * dout).sum(-1).T

    def ours(deterministic: bool) -> Iterator[Results]:
        return run(q.dtype, block_forward, statistics, _repeating if deterministic else block_backward)

    forward = dict.fromkeys(("out", "lse"), "block_forward")
    backward = dict.fromkeys(("dq", "dk", "dv"), "block_backward")
    yield Case(
        _named("blocks of a ring", q, head_dim),
        forward | backward,
        q,
        head_dim,
        reference,
        ours,
        _cancelled(blocks[0][1], dout, scale),
    )


def _repeating(dout: Tensor, q: Tensor, *inputs, **options) -> tuple[Tensor, Tensor, Tensor]:
    """``block_backward`` in torch's deterministic mode, in which cuBLAS, and so plain PyTorch, may refuse to run."""
    before = torch.are_deterministic_algorithms_enabled()
    mode = before or backend.implementation("block_backward", q, q.shape[2]) != "pytorch"
    torch.use_deterministic_algorithms(mode)
    try:
        return block_backward(dout, q, *inputs, **options)
    finally:
        torch.use_deterministic_algorithms(before)


def make_decode(normal: Callable[..., Tensor], sizes: Sizes, head_dim: int) -> Iterator[Case]:
    num_slots = max(sizes.lengths) + 7
    q = normal(len(sizes.lengths), HEADS, head_dim)
    k, v = (normal(len(sizes.lengths), num_slots, KEY_HEADS, head_dim) for _ in range(2))
    length = torch.tensor(sizes.lengths, device=q.device)
    for first in (None, length // 3):

        def reference(dtype: torch.dtype, first: Tensor | None = first) -> Results:
            return {"out": decode_attention_reference(q.to(dtype), k.to(dtype), v.to(dtype), length, first)}

        def ours(deterministic: bool, first: Tensor | None = first) -> Iterator[Results]:
            yield {"out": decode_attention(q, k, v, length, first)}

        name = _named("decode" if first is None else "decode in a window", q, head_dim)
        yield Case(name, {"out": "decode"}, q, head_dim, reference, ours)


def make_cross_entropy(normal: Callable[..., Tensor], sizes: Sizes) -> Iterator[Case]:
    R, D, V = min(sizes.total, 500), 64, 20 * sizes.total
    hidden, weight = normal(R, D), normal(V, D) / 8
    target = torch.arange(R, device=hidden.device) * 17 % V
    target[::5] = -100
    names = ("losses", "dhidden", "dweight")
    for softcap in (None, 20.0):

        def reference(dtype: torch.dtype, softcap: float | None = softcap) -> Results:
            leaves = _leaves((hidden, weight), dtype)
            logits = leaves[0] @ leaves[1].T
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            losses = F.cross_entropy(logits, target, reduction="none")
            return dict(zip(names, (losses.detach(), *torch.autograd.grad(losses.sum(), leaves))))

        def ours(deterministic: bool, softcap: float | None = softcap) -> Iterator[Results]:
            leaves = _leaves((hidden, weight), hidden.dtype)
            loss, losses = linear_cross_entropy(leaves[0], leaves[1], target, softcap=softcap)
            yield dict(zip(names, (losses, *torch.autograd.grad(loss, leaves))))

        name = _named("loss" if softcap is None else "loss with a soft cap", hidden)
        yield Case(name, dict.fromkeys(names, "cross_entropy"), hidden, None, reference, ours)


def make_projector(normal: Callable[..., Tensor], sizes: Sizes) -> Iterator[Case]:
    """Two tower rows side by side in each input row, some of them zeros."""
    R, C, hidden, D = min(sizes.total, 300), 32, 96, 64
    x, into, dout = normal(2 * R, C), normal(2 * R, D), normal(2 * R, D)
    weights = normal(hidden, 2 * C) / 8, normal(hidden), normal(D, hidden) / 8, normal(D)
    source = torch.arange(2 * R, device=x.device).view(R, 2).flip(0)
    source[::3, 1] = -1
    rows = 2 * torch.arange(R, device=x.device)
    names = ("out", "dinto", "dx", "dw1", "db1", "dw2", "db2")

    def run(function: Callable, dtype: torch.dtype) -> Results:
        into_leaf, *leaves = _leaves((into, x, *weights), dtype)
        out = function(into_leaf.clone(), rows, *leaves, source_RS=source)
        gradients = torch.autograd.grad(out, (into_leaf, *leaves), dout.to(dtype))
        return dict(zip(names, (out.detach(), *gradients)))

    yield Case(
        _named("projector", x),
        dict.fromkeys(names, "projector"),
        x,
        None,
        lambda dtype: run(place_projected_reference, dtype),
        lambda deterministic: iter([run(place_projected, x.dtype)]),
    )
