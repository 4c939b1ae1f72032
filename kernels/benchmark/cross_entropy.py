"""Linear head and cross entropy against what else computes them, over rows of which some have a target.

``fwd`` is the loss without gradients, ``full`` the loss and both gradients: ours makes them in its forward, so there is
no backward to time alone. Arithmetic is counted for the rows with a target, whatever a provider computes besides:

    fwd = 2 rows D V        full = 3 fwd

Peak memory is that of one call, with the gradients it returns, on top of hidden and weight. Errors are those of the
mean loss, of the gradients of the last rows with a target and of some rows of the weight, against float64; the ratio is
to F.cross_entropy of the logits in the dtype under test. Of the three the worst counts, for each number.

T rows   R rows with a target   D hidden   V vocabulary
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.benchmark import measure
from kernels.cross_entropy import linear_cross_entropy

CHUNK = 256  # rows whose logits in float64 exist at a time
SAMPLE = 64  # rows of each gradient whose errors are measured
TINY = 16  # all sizes become so many times smaller on a machine without a GPU


@dataclass(frozen=True, kw_only=True)
class Shape:
    """``share`` of the rows of a packed row have a target; the others are media, questions and padding."""

    name: str
    rows: int = 8192
    hidden: int
    vocabulary: int
    share: float

    @property
    def num_targets(self) -> int:
        return round(self.rows * self.share)

    def flops(self, mode: str) -> float:
        return 2 * self.num_targets * self.hidden * self.vocabulary * (3 if mode == "full" else 1)

    def tiny(self) -> "Shape":
        sizes = {name: getattr(self, name) // TINY for name in ("rows", "hidden", "vocabulary")}
        return replace(self, **sizes)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device. hidden and weight are leaves that want gradients."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor  # -100 where there is none
    rows_R: Tensor  # rows with a target, which a data loader knows

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_TD, self.weight_VD

    @property
    def target_R(self) -> Tensor:
        return self.target_T[self.rows_R]


Run = Callable[[Tensor, Tensor], Tensor]  # hidden_TD and weight_VD to the sum of the losses
Provider = Callable[[Case], Run]


def _loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")


def _ours(case: Case) -> Run:
    target_R = case.target_R
    return lambda hidden, weight: linear_cross_entropy(hidden[case.rows_R], weight, target_R)[0]


def _ours_all(case: Case) -> Run:
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, case.target_T)[0]


def _eager_all(case: Case) -> Run:
    return lambda hidden, weight: _loss(hidden, weight, case.target_T)


def _eager(case: Case) -> Run:
    target_R = case.target_R
    return lambda hidden, weight: _loss(hidden[case.rows_R], weight, target_R)


def _checkpointed(case: Case) -> Run:
    """Chunks of 1024 rows, whose logits the backward computes again."""
    target_R = case.target_R

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = zip(hidden[case.rows_R].split(1024), target_R.split(1024))
        return sum(checkpoint(_loss, chunk, weight, target, use_reentrant=False) for chunk, target in chunks)

    return run


def _compiled(mode: str | None) -> Provider:
    def provider(case: Case) -> Run:
        if not case.hidden_TD.is_cuda:
            raise measure.Unavailable("needs a GPU")
        torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and gives up after some
        compiled = torch.compile(_loss, mode=mode, dynamic=False, fullgraph=True)
        return lambda hidden, weight: compiled(hidden, weight, case.target_T)

    return provider


def _liger(drops_rows: bool, **options) -> Provider:
    def provider(case: Case) -> Run:
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
        if not case.hidden_TD.is_cuda:
            raise measure.Unavailable("needs a GPU")
        loss, target_R = loss(reduction="sum", **options), case.target_R
        if drops_rows:
            return lambda hidden, weight: loss(weight, hidden[case.rows_R], target_R)
        return lambda hidden, weight: loss(weight, hidden, case.target_T)

    return provider


PROVIDERS: dict[str, Provider] = {
    "ours (rows dropped)": _ours,
    "ours (all rows)": _ours_all,
    "eager (all rows)": _eager_all,
    "eager (rows dropped)": _eager,
    "checkpointed (rows dropped)": _checkpointed,
    "compile (all rows)": _compiled(None),
    # CUDA graphs would keep the memory of a call for the next one.
    "max-autotune (all rows)": _compiled("max-autotune-no-cudagraphs"),
    "liger (all rows)": _liger(False),
    "liger fp32 (rows dropped)": _liger(True, accum_dtype=torch.float32),
}


def _llama() -> Iterator[Shape]:
    for share in (0.3, 1.0):
        yield Shape(name="Llama-3-8B", hidden=4096, vocabulary=128256, share=share)


def _others() -> Iterator[Shape]:
    for share in (0.3, 1.0):
        yield Shape(name="Llama-2-7B", hidden=4096, vocabulary=32000, share=share)
        yield Shape(name="Qwen2-7B", hidden=3584, vocabulary=152064, share=share)
        yield Shape(name="SmolLM2-135M", hidden=576, vocabulary=49152, share=share)


SHAPES = {"llama": _llama, "others": _others}
FORWARD_ONLY = ()


def run(shapes: str, modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of one shape and direction after the other; "bwd" asks for the full step."""
    for shape in SHAPES[shapes]():
        shape = shape if session.device == "cuda" else shape.tiny()
        case = make_case(shape, session)
        exact = formula(case)
        for mode in modes:
            yield _rows(shape, case, "fwd" if mode == "fwd" else "full", exact, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random hidden rows, and a weight that makes of them logits of deviation 2."""
    generator = torch.Generator(session.device).manual_seed(0)
    options = {"generator": generator, "device": session.device}
    hidden = torch.randn(shape.rows, shape.hidden, dtype=session.dtype, **options)
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=session.dtype, **options) * (2 * shape.hidden**-0.5)
    rows_R = torch.randperm(shape.rows, **options)[: shape.num_targets].sort().values
    target_T = torch.full((shape.rows,), -100, device=session.device)
    target_T[rows_R] = torch.randint(shape.vocabulary, (shape.num_targets,), **options)
    leaves = {"hidden_TD": hidden.requires_grad_(), "weight_VD": weight.requires_grad_()}
    return Case(**leaves, target_T=target_T, rows_R=rows_R)


def _rows(shape: Shape, case: Case, mode: str, exact: list[Tensor], session: measure.Session) -> list[dict]:
    what = {
        "kernel": "linear_cross_entropy",
        "mode": mode,
        "metric": "speed",
        "shape": f"{shape.name} {shape.hidden}x{shape.vocabulary}, {100 * shape.share:.0f} %",
        "x": shape.rows,
        "dtype": str(session.dtype).removeprefix("torch."),
        **measure.environment(session),
    }
    baseline = _errors(case, exact, _call(_eager(case), case, mode)())

    def prepare(provider: Provider):
        call = _call(provider(case), case, mode)
        errors = _errors(case, exact, call())
        ratios = [x / max(y, torch.finfo(torch.float32).eps) for x, y in zip(errors, baseline)]  # below it is luck
        numbers = {"error": max(errors), "error_ratio": max(ratios)}
        return call, numbers | {"peak_mib": measure.peak_mib(call, session.device)}

    prepared = {name: partial(prepare, provider) for name, provider in PROVIDERS.items()}
    return measure.compare(prepared, what, {"flops": shape.flops(mode)}, session)


def _call(run: Run, case: Case, mode: str) -> Callable[[], list[Tensor]]:
    """The call to be timed: the mean loss and, in full, its gradients by hidden and weight."""
    if mode == "fwd":
        return torch.no_grad()(lambda: [run(*case.leaves) / len(case.rows_R)])

    def full() -> list[Tensor]:
        loss = run(*case.leaves) / len(case.rows_R)
        return [loss.detach(), *torch.autograd.grad(loss, case.leaves)]

    return full


def _errors(case: Case, exact: list[Tensor], results: list[Tensor]) -> list[float]:
    samples = [x if of is None else x[of] for x, of in zip(results, (None, *sample(case)))]
    return [measure.relative_error(x, y) for x, y in zip(samples, exact)]


def sample(case: Case) -> tuple[Tensor, Tensor]:
    """Rows of hidden and of weight whose gradients are looked at: of the latter, targets and evenly spread others."""
    spread = torch.linspace(0, len(case.weight_VD) - 1, SAMPLE // 2, device=case.rows_R.device).long()
    return case.rows_R[-SAMPLE:], torch.cat([case.target_R[: SAMPLE // 2], spread]).unique()


def formula(case: Case) -> list[Tensor]:
    """Mean loss and the sampled gradients in float64, CHUNK rows at a time."""
    (rows, columns), R = sample(case), len(case.rows_R)
    weight_VD = case.weight_VD.detach().double()
    loss, dweight = weight_VD.new_zeros(()), torch.zeros_like(weight_VD[columns])
    for hidden_CD, target_C in zip(case.hidden_TD.detach()[case.rows_R].split(CHUNK), case.target_R.split(CHUNK)):
        logits_CV = hidden_CD.double() @ weight_VD.T
        loss += F.cross_entropy(logits_CV, target_C, reduction="sum") / R
        dlogits_CV = logits_CV.softmax(-1)
        dlogits_CV[torch.arange(len(target_C)), target_C] -= 1
        dweight += dlogits_CV[:, columns].T @ hidden_CD.double() / R
    dlogits_CV = (case.hidden_TD.detach()[rows].double() @ weight_VD.T).softmax(-1)
    dlogits_CV[torch.arange(len(rows)), case.target_T[rows]] -= 1
    return [loss, dlogits_CV @ weight_VD / R, dweight]
