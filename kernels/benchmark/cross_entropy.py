"""Linear head and cross entropy and their peers, over rows of which only some have a target.

``fwd`` is the loss without gradients, ``full`` the loss and both gradients: ours computes them in its forward, so there
is no backward to time alone. FLOPs are counted for R rows with a target, even if a provider computes more:

    fwd = 2 R D V        full = 3 fwd

and bytes for hidden and weight, in "full" also for their gradients, once each.

Peak memory is that of one call, including the gradients it returns, on top of hidden and weight. Errors are those of
the mean loss, of the gradients of the last rows with a target, and of some rows of the weight, against float64. The
error ratio is relative to F.cross_entropy of logits in the dtype under test. Each number is the worst of the three. In
a mean the errors of R losses cancel by luck; for the ratio, PyTorch's counts as eps / sqrt(R) at least.

T rows   R rows with a target   D hidden   V vocabulary
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.benchmark import measure, timing
from kernels.benchmark.peers import Unavailable, peer
from kernels.cross_entropy import linear_cross_entropy

CHUNK = 256  # rows whose logits are in memory in float64 at a time
SAMPLE = 64  # rows of each gradient whose errors are measured
TINY = 16  # without a GPU, all sizes are divided by this


@dataclass(frozen=True, kw_only=True)
class Shape:
    """``share`` of the rows of a packed row have a target; the others are media, questions and padding."""

    name: str = "own shape"
    rows: int = 8192
    hidden: int
    vocabulary: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if min(self.rows, self.hidden, self.vocabulary) < 1 or not 0 < self.share <= 1:
            raise ValueError(f"rows, hidden and vocabulary must be positive, and share in (0, 1]: {self}")

    @property
    def x(self) -> int:
        return self.rows

    @property
    def num_targets(self) -> int:
        return round(self.rows * self.share)

    def flops(self, mode: str) -> float:
        forward = 2 * self.num_targets * self.hidden * self.vocabulary
        return 3 * forward if mode == "full" else forward

    def num_bytes(self, mode: str, dtype: torch.dtype) -> int:
        once = (self.num_targets + self.vocabulary) * self.hidden * dtype.itemsize
        return 2 * once if mode == "full" else once

    def tiny(self) -> "Shape":
        return replace(self, rows=self.rows // TINY, hidden=self.hidden // TINY, vocabulary=self.vocabulary // TINY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one shape on the device. hidden and weight are leaves that require gradients."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor  # -100 where there is none
    rows_R: Tensor  # rows with a target, as the data loader knows them

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
    """Chunks of 1024 rows, whose logits the backward recomputes."""
    target_R = case.target_R

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = zip(hidden[case.rows_R].split(1024), target_R.split(1024))
        losses = [checkpoint(_loss, chunk, weight, target, use_reentrant=False) for chunk, target in chunks]
        return torch.stack(losses).sum()

    return run


def _compiled(mode: str | None) -> Provider:
    def provider(case: Case) -> Run:
        _needs_gpu(case)
        torch.compiler.reset()  # dynamo counts recompilations over all shapes of a run and stops compiling after a few
        compiled = torch.compile(_loss, mode=mode, dynamic=False, fullgraph=True)
        return lambda hidden, weight: compiled(hidden, weight, case.target_T)

    return provider


def _liger(drops_rows: bool, **options) -> Provider:
    def provider(case: Case) -> Run:
        liger = peer("liger_kernel.transformers")
        _needs_gpu(case)
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", **options)
        target_R = case.target_R
        if drops_rows:
            return lambda hidden, weight: loss(weight, hidden[case.rows_R], target_R)
        return lambda hidden, weight: loss(weight, hidden, case.target_T)

    return provider


def _liger_cute(case: Case) -> Run:
    """Liger 0.8 and later, with a loss kernel in CuTe for Hopper and later."""
    functional = peer("liger_kernel.functional")
    peer("cutlass")
    _needs_gpu(case)
    target_R = case.target_R
    options = {"reduction": "sum", "accum_dtype": torch.float32, "impl": "nvidia-cutedsl"}
    loss = functional.fused_linear_cross_entropy
    return lambda hidden, weight: loss(hidden[case.rows_R], weight, target_R, **options)[0]


def _cut(case: Case) -> Run:
    """Apple's kernels, which never hold logits (Wijmans et al. 2024, arXiv 2411.09009)."""
    cut = peer("cut_cross_entropy")
    _needs_gpu(case)
    target_R = case.target_R
    return lambda hidden, weight: cut.linear_cross_entropy(hidden[case.rows_R], weight, target_R, reduction="sum")


def _needs_gpu(case: Case) -> None:
    if not case.hidden_TD.is_cuda:
        raise Unavailable("needs a GPU")


PROVIDERS: dict[str, Provider] = {
    "ours (rows dropped)": _ours,
    "ours (all rows)": _ours_all,
    "eager (all rows)": _eager_all,
    "eager (rows dropped)": _eager,
    "checkpointed (rows dropped)": _checkpointed,
    "compile (all rows)": _compiled(None),
    # Without CUDA graphs, which would keep the memory of a call for the next one.
    "max-autotune (all rows)": _compiled("max-autotune-no-cudagraphs"),
    "liger (all rows)": _liger(False),
    "liger fp32 (rows dropped)": _liger(True, accum_dtype=torch.float32),
    "liger CuTe fp32 (rows dropped)": _liger_cute,
    "cut_cross_entropy (rows dropped)": _cut,
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


def run(shapes: Iterable[Shape], modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of each shape and direction in turn; "bwd" is the full step."""
    for shape in shapes:
        if session.device != "cuda":
            shape = shape.tiny()
        case = make_case(shape, session)
        exact = formula(case)
        for mode in modes:
            yield _rows(shape, case, "fwd" if mode == "fwd" else "full", exact, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random hidden rows, and a weight for which the logits have standard deviation 2."""
    generator = torch.Generator(session.device).manual_seed(0)
    options = {"generator": generator, "device": session.device}
    hidden = torch.randn(shape.rows, shape.hidden, dtype=session.dtype, **options)
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=session.dtype, **options)
    weight *= 2 * shape.hidden**-0.5
    rows_R = torch.randperm(shape.rows, **options)[: shape.num_targets].sort().values
    target_T = torch.full((shape.rows,), -100, device=session.device)
    target_T[rows_R] = torch.randint(shape.vocabulary, (shape.num_targets,), **options)
    return Case(hidden_TD=hidden.requires_grad_(), weight_VD=weight.requires_grad_(), target_T=target_T, rows_R=rows_R)


def _rows(shape: Shape, case: Case, mode: str, exact: list[Tensor], session: measure.Session) -> list[dict]:
    eager = _call(_eager(case), case, mode)
    of_loss, *of_gradients = _errors(case, exact, eager())
    luck = torch.finfo(session.dtype).eps / math.sqrt(shape.num_targets)
    baseline = [max(of_loss, luck), *of_gradients]

    def prepare(provider: Provider):
        call = _call(provider(case), case, mode)
        columns = measure.error_columns(_errors(case, exact, call()), baseline)
        return call, {**columns, "peak_mib": timing.peak_mib(call, session.device)}

    common = {
        "kernel": "linear_cross_entropy",
        "mode": mode,
        "shape": f"{shape.name} {shape.hidden}x{shape.vocabulary}, {100 * shape.share:.0f} %",
        "x": shape.x,
    }
    amount = {"flops": shape.flops(mode), "num_bytes": shape.num_bytes(mode, session.dtype)}
    return measure.compare(PROVIDERS, prepare, common, amount, session)


def _call(run: Run, case: Case, mode: str) -> Callable[[], list[Tensor]]:
    """The call to be timed: the mean loss and, if ``mode`` is "full", its gradients for hidden and weight."""
    if mode == "fwd":
        return torch.no_grad()(lambda: [run(*case.leaves) / len(case.rows_R)])

    def full() -> list[Tensor]:
        loss = run(*case.leaves) / len(case.rows_R)
        return [loss.detach(), *torch.autograd.grad(loss, case.leaves)]

    return full


def _errors(case: Case, exact: list[Tensor], results: list[Tensor]) -> list[float]:
    """Relative errors of the loss and, if they are there, of the sampled gradients."""
    loss, *gradients = results
    samples = [x[rows] for x, rows in zip(gradients, sample(case))]
    return [measure.relative_error(x, y) for x, y in zip([loss, *samples], exact)]


def sample(case: Case) -> tuple[Tensor, Tensor]:
    """Rows of hidden and of weight whose gradients are compared: of the weight, targets and evenly spaced others."""
    spaced = torch.linspace(0, len(case.weight_VD) - 1, SAMPLE // 2, device=case.rows_R.device).long()
    targets = case.target_R[: SAMPLE // 2]
    return case.rows_R[-SAMPLE:], torch.cat([targets, spaced]).unique()


def formula(case: Case) -> list[Tensor]:
    """Mean loss and the sampled gradients in float64, CHUNK rows at a time."""
    rows, columns = sample(case)
    R = len(case.rows_R)
    hidden_RD = case.hidden_TD.detach()[case.rows_R]
    weight_VD = case.weight_VD.detach().double()
    loss = weight_VD.new_zeros(())
    dweight = torch.zeros_like(weight_VD[columns])
    for hidden_CD, target_C in zip(hidden_RD.split(CHUNK), case.target_R.split(CHUNK)):
        logits_CV = hidden_CD.double() @ weight_VD.T
        loss += F.cross_entropy(logits_CV, target_C, reduction="sum") / R
        dlogits_CV = _dlogits(logits_CV, target_C)
        dweight += dlogits_CV[:, columns].T @ hidden_CD.double() / R
    logits_CV = case.hidden_TD.detach()[rows].double() @ weight_VD.T
    dhidden = _dlogits(logits_CV, case.target_T[rows]) @ weight_VD / R
    return [loss, dhidden, dweight]


def _dlogits(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    dlogits_CV = logits_CV.softmax(-1)
    dlogits_CV[torch.arange(len(target_C)), target_C] -= 1
    return dlogits_CV
