"""The projector and its peers: alone ("mlp"), and with its rows placed among token features ("placement").

``fwd`` keeps nothing for a backward. ``full`` is forward and backward of a step that trains the projector of a frozen
tower: gradients of its weights and biases. FLOPs are those of the products, with R rows each:

    fwd = 2 R (C F + F D)        full = fwd + 2 R (C F + 2 F D)

Bytes are the features, the weights and the results, in "full" also the results' gradients and those of the weights.

Placement skips the class token of every image, projects, and writes the rows into a decoder row of 16k tokens or four
times as many; the other tokens need no gradient. Each call writes to new memory, whose contents do not matter.

``saved`` are activations kept for the backward, without the inputs; peak memory is that of one call, including its
results. Errors are those of the written rows and of all gradients against float64; the error ratio is relative to the
eager provider. Each number is the worst of all. ``addmm gelu`` is PyTorch's fused product, forward only; on a GPU its
GELU is the tanh approximation, which shows in its error.

R rows that are projected   I images   C tower width   F hidden   D decoder width   T token rows
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark import measure, timing
from kernels.benchmark.peers import Unavailable
from kernels.projector import place_projected, projector_mlp

PATCHES = 576  # features of an image, after its class token
# Without a GPU:
TINY = 32  # widths are divided by this
FEW = 64  # numbers of patches and tokens are divided by this


@dataclass(frozen=True, kw_only=True)
class Shape:
    images: int
    patches: int = PATCHES
    widths: tuple[int, int, int] = (1024, 4096, 4096)  # C, F, D: CLIP ViT-L to Llama-3-8B
    tokens: int = 0  # of the row that is written to; 0: the projector alone

    def __post_init__(self) -> None:
        if min(self.images, self.patches, *self.widths) < 1 or len(self.widths) != 3 or 0 < self.tokens < self.rows:
            raise ValueError(f"images, patches and three widths must be positive, and fit into tokens: {self}")

    @property
    def x(self) -> int:
        return self.rows

    @property
    def rows(self) -> int:
        return self.images * self.patches

    def flops(self, mode: str) -> float:
        C, hidden, D = self.widths
        up = 2 * self.rows * C * hidden
        down = 2 * self.rows * hidden * D
        return up + down if mode == "fwd" else 2 * up + 3 * down

    def num_bytes(self, mode: str, dtype: torch.dtype) -> int:
        C, hidden, D = self.widths
        weights = C * hidden + hidden + hidden * D + D
        numbers = self.rows * (C + D) + weights
        if mode != "fwd":
            numbers += self.rows * D + weights
        return numbers * dtype.itemsize

    def tiny(self) -> "Shape":
        C, hidden, D = self.widths
        widths = C // TINY, hidden // TINY, D // TINY
        return replace(self, patches=self.patches // FEW, widths=widths, tokens=self.tokens // FEW)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device. The weights are leaves that require gradients."""

    x_PC: Tensor
    weights: tuple[Tensor, ...]  # w1_FC, b1_F, w2_DF, b2_D
    grad: Tensor  # of the result: y_RD, or out_TD
    images: int
    rows_R: Tensor | None  # token rows that are written
    source_RS: Tensor | None  # rows of x that are read

    def new_into(self) -> Tensor:
        return torch.empty_like(self.grad)

    @property
    def features_RC(self) -> Tensor:
        """Rows of x that are projected, selected as eager PyTorch does: a view, which a product copies."""
        if self.rows_R is None:
            return self.x_PC
        return self.x_PC.unflatten(0, (self.images, -1))[:, 1:].flatten(0, 1)


Run = Callable[..., Tensor]  # from the weights to the result
Provider = Callable[[Case, str], Run]


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _ours(case: Case, mode: str) -> Run:
    if case.rows_R is None:
        return lambda *weights: projector_mlp(case.x_PC, *weights)
    return lambda *weights: place_projected(case.new_into(), case.rows_R, case.x_PC, *weights, source_RS=case.source_RS)


def _place(into_TD: Tensor, rows_R: Tensor, x_RC: Tensor, *weights: Tensor) -> Tensor:
    return into_TD.index_copy(0, rows_R, _mlp(x_RC, *weights))


def _eager(case: Case, mode: str) -> Run:
    if case.rows_R is None:
        return lambda *weights: _mlp(case.x_PC, *weights)
    return lambda *weights: _place(case.new_into(), case.rows_R, case.features_RC, *weights)


def _masked_scatter(case: Case, mode: str) -> Run:
    """As LLaVA in transformers: a mask of the placeholders, expanded over the width."""
    if case.rows_R is None:
        raise Unavailable("places nothing")
    mask_TD = torch.zeros_like(case.grad, dtype=torch.bool).index_fill(0, case.rows_R, True)
    return lambda *weights: case.new_into().masked_scatter(mask_TD, _mlp(case.features_RC, *weights))


def _compiled(options: str | None, case: Case, mode: str) -> Run:
    if not case.x_PC.is_cuda:
        raise Unavailable("needs a GPU")
    torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and stops compiling after a few
    rows_R = case.rows_R

    def step(into: Tensor, x_PC: Tensor, *weights: Tensor) -> Tensor:
        if rows_R is None:
            return _mlp(x_PC, *weights)
        x_RC = x_PC.unflatten(0, (case.images, -1))[:, 1:].flatten(0, 1)
        return _place(into, rows_R, x_RC, *weights)

    run = torch.compile(step, mode=options, dynamic=False, fullgraph=True)
    return lambda *weights: run(case.new_into(), case.x_PC, *weights)


def _addmm_activation(case: Case, mode: str) -> Run:
    if mode != "fwd":
        raise Unavailable("forward only")

    def run(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h_RF = torch._addmm_activation(b1, case.features_RC, w1.T, use_gelu=True)
        y_RD = F.linear(h_RF, w2, b2)
        return y_RD if case.rows_R is None else case.new_into().index_copy(0, case.rows_R, y_RD)

    return run


PROVIDERS: dict[str, Provider] = {
    "ours": _ours,
    "eager": _eager,
    "eager masked_scatter": _masked_scatter,
    "compile": partial(_compiled, None),
    # Without CUDA graphs, which would keep the memory of a call for the next one.
    "max-autotune": partial(_compiled, "max-autotune-no-cudagraphs"),
    "addmm gelu": _addmm_activation,
}
SHAPES = {
    "mlp": lambda: [Shape(images=16), Shape(images=64)],
    "placement": lambda: [Shape(images=16, tokens=16384), Shape(images=64, tokens=4 * 16384)],
}


def run(shapes: Iterable[Shape], modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of each shape and direction in turn; "bwd" is the full step."""
    for shape in shapes:
        if session.device != "cuda":
            shape = shape.tiny()
        case = make_case(shape, session)
        exact = exact_values(case)
        for mode in modes:
            yield _rows(shape, case, "fwd" if mode == "fwd" else "full", exact, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random numbers, scaled to keep their size from layer to layer; rows in order, as the loader packs them."""
    generator = torch.Generator(session.device).manual_seed(0)
    options = {"generator": generator, "device": session.device}

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(sizes, dtype=session.dtype, **options)

    C, hidden, D = shape.widths
    w1_FC = normal(hidden, C, scale=C**-0.5)
    b1_F = normal(hidden)
    w2_DF = normal(D, hidden, scale=hidden**-0.5)
    b2_D = normal(D)
    rows_R = source_RS = None
    tower_rows = shape.patches
    if shape.tokens:
        tower_rows += 1
        rows_of_images = torch.arange(shape.images * tower_rows, device=session.device).view(shape.images, -1)
        source_RS = rows_of_images[:, 1:].reshape(-1, 1)
        rows_R = torch.randperm(shape.tokens, **options)[: shape.rows].sort().values
    return Case(
        x_PC=normal(shape.images * tower_rows, C),
        weights=tuple(weight.requires_grad_() for weight in (w1_FC, b1_F, w2_DF, b2_D)),
        grad=normal(shape.tokens or shape.rows, D),
        images=shape.images,
        rows_R=rows_R,
        source_RS=source_RS,
    )


def _rows(shape: Shape, case: Case, mode: str, exact: list[Tensor], session: measure.Session) -> list[dict]:
    eager = _call(_eager(case, mode), case, mode)
    baseline = _errors(case, exact, eager())

    def prepare(provider: Provider):
        run = provider(case, mode)
        call = _call(run, case, mode)
        columns = measure.error_columns(_errors(case, exact, call()), baseline)
        columns["peak_mib"] = timing.peak_mib(call, session.device)
        if mode != "fwd":
            columns["saved_mib"] = saved_mib(lambda: run(*case.weights), [case.x_PC, *case.weights])
        return call, columns

    common = {
        "kernel": "place_projected" if shape.tokens else "projector_mlp",
        "mode": mode,
        "shape": f"{shape.images} images {' -> '.join(map(str, shape.widths))}",
        "x": shape.x,
    }
    amount = {"flops": shape.flops(mode), "num_bytes": shape.num_bytes(mode, session.dtype)}
    return measure.compare(PROVIDERS, prepare, common, amount, session)


def _call(run: Run, case: Case, mode: str) -> Callable[[], list[Tensor]]:
    """The call to be timed: the result and, if ``mode`` is "full", the gradients of the weights."""
    if mode == "fwd":
        return torch.no_grad()(lambda: [run(*case.weights)])

    def full() -> list[Tensor]:
        out = run(*case.weights)
        return [out.detach(), *torch.autograd.grad(out, case.weights, case.grad)]

    return full


def saved_mib(forward: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Memory that autograd saves in a forward: every floating storage once, without those of the inputs."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    saved = {}

    def pack(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()
        if x.is_floating_point() and address not in given:
            saved[address] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(x.nbytes for x in saved.values()) / 2**20


def _written(case: Case, out: Tensor) -> Tensor:
    return out if case.rows_R is None else out[case.rows_R]


def _errors(case: Case, exact: list[Tensor], results: list[Tensor]) -> list[float]:
    out, *gradients = results
    return [measure.relative_error(x, y) for x, y in zip([_written(case, out), *gradients], exact)]


def exact_values(case: Case) -> list[Tensor]:
    """The projected rows and the gradients of the weights in float64."""
    weights = [weight.detach().double().requires_grad_() for weight in case.weights]
    y_RD = _mlp(case.features_RC.double(), *weights)
    dy_RD = _written(case, case.grad).double()
    return [y_RD.detach(), *torch.autograd.grad(y_RD, weights, dy_RD)]
