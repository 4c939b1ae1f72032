"""A decoder block's work between its matrix products, which is bound by memory: RMSNorm, rotation, SwiGLU.

    rms_norm   y = x / sqrt(mean(x^2) + eps) * w      reads x, writes y       backward: reads x, dy, writes dx
    rotate     y = (a cos - b sin, b cos + a sin)     reads x, writes y       backward: reads dy, writes dx
    swiglu     y = silu(g) * u                        reads g, u, writes y    backward: reads g, u, dy, writes dg, du

Bytes are those that a fused kernel moves: each of these tensors once; a weight of D numbers and the angles' cosines and
sines (T, E) are left out. ``ours`` is what our decoder runs without torch.compile, ``eager`` the formula with float32
inside, as transformers writes it. A backward is timed without its forward. Errors are those of the result or of all
gradients against float64; the error ratio is relative to ``eager`` in the dtype under test.

T tokens   D width   H heads   E head dim
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark import measure, timing
from kernels.benchmark.peers import Unavailable, peer

EPS = 1e-5
TENSORS = {"rms_norm": (2, 3), "rotate": (2, 2), "swiglu": (3, 5)}  # that forward and backward read or write
# Without a GPU:
TINY = 64  # tokens are divided by this
NARROW = 8  # and widths by this


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str = "own shape"
    kernel: str  # of TENSORS
    tokens: int = 8192
    width: int  # of a token: D, or H E
    head_dim: int = 128  # of rotate

    def __post_init__(self) -> None:
        if self.kernel not in TENSORS or min(self.tokens, self.width) < 1 or self.width % self.head_dim:
            raise ValueError(f"kernel must be of {', '.join(TENSORS)}, and head_dim divide width: {self}")

    @property
    def x(self) -> int:
        return self.tokens

    def num_bytes(self, mode: str, dtype: torch.dtype) -> int:
        forward, backward = TENSORS[self.kernel]
        return (forward if mode == "fwd" else backward) * self.tokens * self.width * dtype.itemsize

    def tiny(self) -> "Shape":
        return replace(self, tokens=self.tokens // TINY, width=self.width // NARROW, head_dim=self.head_dim // NARROW)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device: leaves that require gradients, constants, the gradient of the result."""

    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    grad: Tensor


Formula = Callable[..., Tensor]  # of the leaves and constants of a case
Provider = Callable[[str, Case, str], Formula]  # of a kernel's name, a case and a direction


def rms_norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    x_float = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    mean_square = x_float.square().mean(-1, keepdim=True)
    return (x_float * torch.rsqrt(mean_square + EPS)).to(x_TD.dtype) * weight_D


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """The sin of the first half of a head is negated."""
    a, b = x_THE.to(cos_TE.dtype).chunk(2, dim=-1)
    along_THE = torch.cat([a, b], -1) * cos_TE[:, None]
    across_THE = torch.cat([b, a], -1) * sin_TE[:, None]
    return (along_THE + across_THE).to(x_THE.dtype)


def swiglu(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    return F.silu(gate_TD) * up_TD


FORMULAS: dict[str, Formula] = {"rms_norm": rms_norm, "rotate": rotate, "swiglu": swiglu}


def _eager(kernel: str, case: Case, mode: str) -> Formula:
    return FORMULAS[kernel]


def _compiled(kernel: str, case: Case, mode: str) -> Formula:
    if not case.grad.is_cuda:
        raise Unavailable("needs a GPU")
    torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and stops compiling after a few
    torch._functorch.config.donated_buffer = False  # one graph serves many backwards, which need its buffers again
    return torch.compile(FORMULAS[kernel], dynamic=False, fullgraph=True)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THE, cos_TE, sin_TE):
        ctx.save_for_backward(cos_TE, sin_TE)
        return _turned(x_THE, cos_TE, sin_TE, 1)

    @staticmethod
    def backward(ctx, dy_THE):
        return _turned(dy_THE, *ctx.saved_tensors, -1), None, None


def _turned(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, direction: int) -> Tensor:
    y_THE = torch.mul(x_THE, cos_TE[:, None], out=torch.empty_like(x_THE))
    a, b = x_THE.chunk(2, dim=-1)
    y_a, y_b = y_THE.chunk(2, dim=-1)
    sin_a, sin_b = sin_TE[:, None].chunk(2, dim=-1)
    y_a.addcmul_(b, sin_a, value=direction)
    y_b.addcmul_(a, sin_b, value=direction)
    return y_THE


DECODER: dict[str, Formula] = {
    "rms_norm": lambda x_TD, weight_D: F.rms_norm(x_TD, weight_D.shape, weight_D, EPS),
    "rotate": _Rotation.apply,
    "swiglu": swiglu,
}


def _ours(kernel: str, case: Case, mode: str) -> Formula:
    return DECODER[kernel]


def _liger(kernel: str, case: Case, mode: str) -> Formula:
    """Only what leaves its inputs as they are, so that it can be called again."""
    ops = peer("liger_kernel.ops")
    if kernel == "rotate":
        raise Unavailable("rotates its input in place")
    if kernel == "swiglu" and mode == "bwd":
        raise Unavailable("writes gradients over its inputs")
    if not case.grad.is_cuda:
        raise Unavailable("needs a GPU")
    if kernel == "swiglu":
        return ops.LigerSiLUMulFunction.apply
    # offset 0; rounded before the scale, as Llama does; dx not in the place of dy
    return lambda x_TD, weight_D: ops.LigerRMSNormFunction.apply(x_TD, weight_D, EPS, 0.0, "llama", False)


PROVIDERS: dict[str, Provider] = {
    "ours": _ours,
    "eager": _eager,
    "compile": _compiled,
    "liger": _liger,
}


def _blocks(name: str, hidden: int, intermediate: int, heads: int) -> Iterator[Shape]:
    yield Shape(name=name, kernel="rms_norm", width=hidden)
    yield Shape(name=name, kernel="rotate", width=heads * 128)
    yield Shape(name=name, kernel="swiglu", width=intermediate)


SHAPES = {
    "llama": partial(_blocks, "Llama-3-8B", 4096, 14336, 32),
    "qwen": partial(_blocks, "Qwen2.5-7B", 3584, 18944, 28),
}


def run(shapes: Iterable[Shape], modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of each shape and direction in turn."""
    for shape in shapes:
        if session.device != "cuda":
            shape = shape.tiny()
        case = make_case(shape, session)
        for mode in modes:
            yield _rows(shape, case, mode, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    generator = torch.Generator(session.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=session.device, dtype=session.dtype)

    T, D = shape.tokens, shape.width
    if shape.kernel == "rotate":
        E = shape.head_dim
        inverse_E = 10000.0 ** -(torch.arange(0, E, 2, device=session.device) / E)
        angle_TE = (torch.arange(T, device=session.device)[:, None] * inverse_E).repeat(1, 2)
        sin_TE = angle_TE.sin()
        sin_TE.chunk(2, dim=-1)[0].neg_()
        leaves, constants = (normal(T, D // E, E),), (angle_TE.cos(), sin_TE)
    else:
        leaves, constants = (normal(T, D), normal(D) if shape.kernel == "rms_norm" else normal(T, D)), ()
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    return Case(leaves=leaves, constants=constants, grad=normal(*leaves[0].shape))


def _rows(shape: Shape, case: Case, mode: str, session: measure.Session) -> list[dict]:
    exact = _call(FORMULAS[shape.kernel], in_float64(case), mode)()
    baseline = _errors(_call(FORMULAS[shape.kernel], case, mode)(), exact)

    def prepare(provider: Provider):
        call = _call(provider(shape.kernel, case, mode), case, mode)
        columns = measure.error_columns(_errors(call(), exact), baseline)
        return call, {**columns, "peak_mib": timing.peak_mib(call, session.device)}

    common = {"kernel": shape.kernel, "mode": mode, "shape": f"{shape.name}, width {shape.width}", "x": shape.x}
    return measure.compare(PROVIDERS, prepare, common, {"num_bytes": shape.num_bytes(mode, session.dtype)}, session)


def _call(formula: Formula, case: Case, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed: the result, or the gradients of the leaves."""
    if mode == "fwd":
        return torch.no_grad()(lambda: (formula(*case.leaves, *case.constants),))
    out = formula(*case.leaves, *case.constants)
    return lambda: torch.autograd.grad(out, case.leaves, case.grad, retain_graph=True)


def in_float64(case: Case) -> Case:
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in case.leaves)
    return Case(leaves=leaves, constants=tuple(x.double() for x in case.constants), grad=case.grad.double())


def _errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [measure.relative_error(x, y) for x, y in zip(results, exact, strict=True)]
