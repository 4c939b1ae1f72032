"""The projector against what else computes it: alone ("mlp"), and with its rows placed among token features.

``fwd`` keeps nothing for a backward. ``full`` is forward and backward of a step that trains the projector behind a
frozen tower: gradients of its weights and biases. Arithmetic is counted for the products, R rows to each:

    fwd = 2 R (C F + F D)        full = fwd + 2 R (C F + 2 F D)

Placement leaves out the class token of every image, projects, and writes the rows into a decoder row of 16k tokens or
four of them; nobody asks for a gradient of the other tokens. Each call writes to new memory, whatever that holds.

``saved`` are activations kept for the backward, inputs not counted; peak memory is that of one call, with what it
returns. Errors are those of the written rows and of all gradients against float64; the ratio is to the eager provider.
Of all the worst counts, for each number. ``addmm gelu`` is PyTorch's fused product, forward only, and on a GPU its GELU
is the tanh approximation, which shows in its error.

R rows that are projected   I images   C tower width   F hidden   D decoder width   T token rows
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark import measure
from kernels.projector import place_projected, projector_mlp

PATCHES = 576  # features of an image, after its class token
# On a machine without a GPU:
TINY = 32  # widths become so many times smaller
FEW = 64  # patches and tokens become so many times fewer


@dataclass(frozen=True, kw_only=True)
class Shape:
    images: int
    patches: int = PATCHES
    widths: tuple[int, int, int] = (1024, 4096, 4096)  # C, F, D: CLIP ViT-L to Llama-3-8B
    tokens: int = 0  # of the row to write to; none: the projector alone

    @property
    def rows(self) -> int:
        return self.images * self.patches

    def flops(self, mode: str) -> float:
        C, hidden, D = self.widths
        up, down = (2 * self.rows * hidden * width for width in (C, D))
        return up + down if mode == "fwd" else 2 * up + 3 * down

    def tiny(self) -> "Shape":
        widths = tuple(width // TINY for width in self.widths)
        return replace(self, patches=self.patches // FEW, widths=widths, tokens=self.tokens // FEW)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device. The weights are leaves that want gradients."""

    x_PC: Tensor
    weights: tuple[Tensor, ...]  # w1_FC, b1_F, w2_DF, b2_D
    grad: Tensor  # of what is returned: y_RD, or out_TD
    images: int
    rows_R: Tensor | None  # to write to
    source_RS: Tensor | None  # rows of x to read

    def new_into(self) -> Tensor:
        return torch.empty_like(self.grad)

    @property
    def features_RC(self) -> Tensor:
        """Rows of x that are projected, as eager PyTorch leaves out the others: a view, which a product copies."""
        if self.rows_R is None:
            return self.x_PC
        return self.x_PC.unflatten(0, (self.images, -1))[:, 1:].flatten(0, 1)


Run = Callable[..., Tensor]  # the weights to what is returned
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
    """What LLaVA in transformers does: a mask of the placeholders, made whole."""
    if case.rows_R is None:
        raise measure.Unavailable("places nothing")
    mask_TD = torch.zeros_like(case.grad, dtype=torch.bool).index_fill(0, case.rows_R, True)
    return lambda *weights: case.new_into().masked_scatter(mask_TD, _mlp(case.features_RC, *weights))


def _compiled(options: str | None, case: Case, mode: str) -> Run:
    if not case.x_PC.is_cuda:
        raise measure.Unavailable("needs a GPU")
    torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and gives up after some

    def alone(into: Tensor, x_PC: Tensor, *weights: Tensor) -> Tensor:
        return _mlp(x_PC, *weights)

    def placed(into: Tensor, x_PC: Tensor, *weights: Tensor) -> Tensor:
        return _place(into, case.rows_R, x_PC.unflatten(0, (case.images, -1))[:, 1:].flatten(0, 1), *weights)

    run = torch.compile(alone if case.rows_R is None else placed, mode=options, dynamic=False, fullgraph=True)
    return lambda *weights: run(case.new_into(), case.x_PC, *weights)


def _addmm_activation(case: Case, mode: str) -> Run:
    if mode != "fwd":
        raise measure.Unavailable("forward only")

    def run(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y_RD = F.linear(torch._addmm_activation(b1, case.features_RC, w1.T, use_gelu=True), w2, b2)
        return y_RD if case.rows_R is None else case.new_into().index_copy(0, case.rows_R, y_RD)

    return run


def _liger(case: Case, mode: str) -> Run:
    importlib.import_module("liger_kernel.ops")
    raise measure.Unavailable("its MLPs are gated: none is two layers with a GELU")


PROVIDERS: dict[str, Provider] = {
    "ours": _ours,
    "eager": _eager,
    "eager masked_scatter": _masked_scatter,
    "compile": partial(_compiled, None),
    # Its CUDA graphs would keep the memory of a call for the next one.
    "max-autotune": partial(_compiled, "max-autotune-no-cudagraphs"),
    "addmm gelu": _addmm_activation,
    "liger": _liger,
}
SHAPES = {
    "mlp": lambda: [Shape(images=16), Shape(images=64)],
    "placement": lambda: [Shape(images=16, tokens=16384), Shape(images=64, tokens=4 * 16384)],
}
FORWARD_ONLY = ()


def run(shapes: str, modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of one shape and direction after the other; "bwd" asks for the full step."""
    for shape in SHAPES[shapes]():
        shape = shape if session.device == "cuda" else shape.tiny()
        case = make_case(shape, session)
        exact = exact_values(case)
        for mode in modes:
            yield _rows(shape, case, "fwd" if mode == "fwd" else "full", exact, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random numbers, scaled to keep their size from layer to layer; places in order, as data packs them."""
    generator = torch.Generator(session.device).manual_seed(0)
    options = {"generator": generator, "device": session.device}
    normal = lambda *sizes, scale=1.0: scale * torch.randn(sizes, dtype=session.dtype, **options)
    C, hidden, D = shape.widths
    weights = normal(hidden, C, scale=C**-0.5), normal(hidden), normal(D, hidden, scale=hidden**-0.5), normal(D)
    rows_R = source_RS = None
    tower_rows = shape.patches
    if shape.tokens:
        tower_rows += 1
        source_RS = torch.arange(shape.images * tower_rows, device=session.device).unflatten(0, (shape.images, -1))
        source_RS = source_RS[:, 1:].reshape(-1, 1)
        rows_R = torch.randperm(shape.tokens, **options)[: shape.rows].sort().values
    return Case(
        x_PC=normal(shape.images * tower_rows, C),
        weights=tuple(weight.requires_grad_() for weight in weights),
        grad=normal(shape.tokens or shape.rows, D),
        images=shape.images,
        rows_R=rows_R,
        source_RS=source_RS,
    )


def _rows(shape: Shape, case: Case, mode: str, exact: list[Tensor], session: measure.Session) -> list[dict]:
    what = {
        "kernel": "place_projected" if shape.tokens else "projector_mlp",
        "mode": mode,
        "metric": "speed",
        "shape": f"{shape.images} images {' -> '.join(map(str, shape.widths))}",
        "x": shape.rows,
        "dtype": str(session.dtype).removeprefix("torch."),
        **measure.environment(session),
    }
    baseline = _errors(case, exact, _call(_eager(case, mode), case, mode)())

    def prepare(provider: Provider):
        run = provider(case, mode)
        call = _call(run, case, mode)
        errors = _errors(case, exact, call())
        ratios = [x / y for x, y in zip(errors, baseline)]
        columns = {"error": max(errors), "error_ratio": max(ratios), "peak_mib": measure.peak_mib(call, session.device)}
        if mode != "fwd":
            columns["saved_mib"] = saved_mib(lambda: run(*case.weights), [case.x_PC, *case.weights])
        return call, columns

    prepared = {name: partial(prepare, provider) for name, provider in PROVIDERS.items()}
    return measure.compare(prepared, what, {"flops": shape.flops(mode)}, session)


def _call(run: Run, case: Case, mode: str) -> Callable[[], list[Tensor]]:
    """The call to be timed: what is returned and, in full, the gradients of the weights."""
    if mode == "fwd":
        return torch.no_grad()(lambda: [run(*case.weights)])

    def full() -> list[Tensor]:
        out = run(*case.weights)
        return [out.detach(), *torch.autograd.grad(out, case.weights, case.grad)]

    return full


def saved_mib(forward: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """What autograd keeps of a forward: every piece of floating memory once, but for that of the inputs."""
    kept, held = {}, {x.untyped_storage().data_ptr() for x in inputs}

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in held:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = forward()
    del out
    return sum(x.nbytes for x in kept.values()) / 2**20


def _written(case: Case, out: Tensor) -> Tensor:
    return out if case.rows_R is None else out[case.rows_R]


def _errors(case: Case, exact: list[Tensor], results: list[Tensor]) -> list[float]:
    results = [_written(case, results[0]), *results[1:]]
    return [measure.relative_error(x, y) for x, y in zip(results, exact)]


def exact_values(case: Case) -> list[Tensor]:
    """The projected rows and the gradients of the weights in float64."""
    weights = [weight.detach().double().requires_grad_() for weight in case.weights]
    y_RD = _mlp(case.features_RC.double(), *weights)
    return [y_RD.detach(), *torch.autograd.grad(y_RD, weights, _written(case, case.grad).double())]
