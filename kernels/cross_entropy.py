"""Cross entropy of a linear head without the full logits, its gradients made while the logits are at hand.

    x = hidden @ weight.T        loss_r, dx of ``cross_entropy_rows``        loss = sum_r loss_r
    dhidden = dx @ weight        dweight = dx.T @ hidden

A chunk of rows at a time: one matrix product makes its logits, one pass over them takes the losses and overwrites them
with dx, two products add to the gradients. Nothing is computed twice. The price: only the sum can be differentiable,
as weights of rows would have to be known by then.

R rows   C rows of a chunk   D hidden   V vocabulary, or this shard of it
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend
from kernels.cross_entropy_rows import IGNORED, Options, losses

# Each chunk reads and writes dweight in float32, 8 V D bytes, beside products of 6 C V D operations: with 2048 rows
# that is an eighth of an H100's time. D rows are not too many either: their logits are as large as the copy of dweight
# in its own dtype, which has to be made at the end.
CHUNK_ROWS = 2048
CHUNK_BYTES = 2**30  # of logits; a larger vocabulary has fewer rows


def _chunk_rows(weight_VD: Tensor) -> int:
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // (len(weight_VD) * weight_VD.element_size())))


def _loss_and_gradients(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, options: Options, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, loss_R, dhidden_RD and dweight_VD. A gradient that is not wanted has no rows."""
    (R, D), V = hidden_RD.shape, weight_VD.shape[0]
    wants_hidden, wants_weight = wanted
    rows = max(_chunk_rows(weight_VD), D) if wants_weight else _chunk_rows(weight_VD)
    exact = torch.promote_types(hidden_RD.dtype, torch.float32)
    loss_R = hidden_RD.new_empty(R, dtype=exact)
    dhidden_RD = hidden_RD.new_empty((R if wants_hidden else 0, D))
    # The product of an only chunk is the whole sum: it needs no float32 to add to.
    dweight_VD = hidden_RD.new_empty((V if wants_weight else 0, D), dtype=exact if rows < R else hidden_RD.dtype)
    if R == 0:
        dweight_VD.zero_()
    # Rows a multiple of 16 apart begin at whole vectors of memory, for the products as for the pass.
    buffer = hidden_RD.new_empty((min(rows, R), -(-V // 16) * 16))
    for start in range(0, R, rows):
        hidden_CD, target_C, loss_C = (x[start : start + rows] for x in (hidden_RD, target_R, loss_R))
        logits_CV = buffer[: len(target_C), :V]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        loss_C.copy_(losses(logits_CV, target_C, options, gradient=wants_hidden or wants_weight))
        if wants_hidden:
            torch.mm(logits_CV, weight_VD, out=dhidden_RD[start : start + rows])
        if wants_weight:
            _add_product(dweight_VD, logits_CV.T, hidden_CD, first=start == 0)
    buffer = logits_CV = None  # free before dweight is copied
    return loss_R.sum(), loss_R, dhidden_RD, dweight_VD.to(weight_VD.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, summed in the dtype of total; ``first`` overwrites it."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif first:  # the CPU's products have one dtype
        total.copy_(a @ b)
    else:
        total += a @ b


def linear_cross_entropy_op(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_loss_and_gradients of a whole vocabulary. Its numbers come one by one, which is all that an op may take."""
    if backend.DEBUG:
        V = weight_VD.shape[0]
        outside = target_R[((target_R < 0) | (target_R >= V)) & (target_R != IGNORED)].tolist()
        if outside:
            raise ValueError(f"{len(outside)} targets are outside the vocabulary of {V}, the first is {outside[0]}")
    options = Options(label_smoothing, z_loss, softcap)
    return _loss_and_gradients(hidden_RD, weight_VD, target_R, options, (wants_hidden, wants_weight))


def _fake(hidden_RD, weight_VD, target_R, label_smoothing, z_loss, softcap, wants_hidden, wants_weight):
    (R, D), V = hidden_RD.shape, weight_VD.shape[0]
    loss_R = hidden_RD.new_empty(R, dtype=torch.promote_types(hidden_RD.dtype, torch.float32))
    gradients = (hidden_RD.new_empty((n, D)) for n in (R if wants_hidden else 0, V if wants_weight else 0))
    return loss_R.new_empty(()), loss_R, *gradients


_op = backend.define_op(linear_cross_entropy_op, _fake)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward has made the gradients; the backward scales them."""

    @staticmethod
    def forward(hidden_RD, weight_VD, target_R, options, wants_hidden, wants_weight):
        if options.reduce is None:
            return _op(hidden_RD, weight_VD, target_R, *options[:3], wants_hidden, wants_weight)
        with torch.cuda.device_of(hidden_RD):
            return _loss_and_gradients(hidden_RD, weight_VD, target_R, options, (wants_hidden, wants_weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        gradients = [None, None]
        for i, gradient in enumerate(ctx.saved_tensors):
            if dloss is None or not ctx.needs_input_grad[i]:
                continue
            scale_11 = dloss.reshape(1, 1)  # a matrix: a lone number would first be rounded to the gradient's dtype
            if torch.compiler.is_compiling():  # may not overwrite what the forward saved, and finds its memory itself
                gradients[i] = (gradient * scale_11).to(gradient.dtype)
            else:  # in place: a second dweight would be as large as the head
                gradients[i] = gradient.mul_(scale_11)
        return *gradients, None, None, None, None


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    first: int = 0,
    reduce: Callable[[Tensor, str], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """loss, the sum over rows, and loss_R, the loss of each row without a gradient; float32 (float64 of float64).

    ``hidden`` and ``weight`` share a floating dtype, in which the logits are computed; all else is float32 inside.
    A target (int64) of -100 asks for nothing: loss 0, gradient 0. The caller drops most such rows before, by an index
    that the data loader made, so nothing here waits for the device. A target outside the vocabulary has loss NaN and
    gradient 0; with TRITON_DEBUG=1 it raises ValueError.

    ``label_smoothing`` is that of F.cross_entropy, ``z_loss`` the weight of lse^2 (PaLM), ``softcap`` c bounds logits
    by c tanh(logit / c) (Gemma 2). Without rows, or without targets, the loss is 0 and its gradients are zeros.

    Vocabulary-parallel: ``weight`` holds rows ``first`` to ``first`` + V of the whole, and ``reduce`` combines a small
    float32 tensor of all shards in place, by "max" or by "sum". Losses and dweight are then exact on every shard;
    dhidden is this shard's part of a sum over the shards.

    The backward may be taken once, as it scales in place what the forward made: autograd refuses a second time.
    """
    _check(hidden_RD, weight_VD, target_R, label_smoothing, z_loss, softcap, first, reduce)
    options = Options(label_smoothing, z_loss, softcap, first, reduce)
    wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_RD, weight_VD))
    loss, loss_R, *_ = _LinearCrossEntropy.apply(hidden_RD, weight_VD, target_R.contiguous(), options, *wanted)
    return loss, loss_R


@torch.no_grad()
def linear_argmax(
    hidden_RD: Tensor, weight_VD: Tensor, *, first: int = 0, reduce: Callable[[Tensor, str], object] | None = None
) -> Tensor:
    """token_R (int64): where the logit of each row is the largest, the first such place, without the full logits.

    For validation, on every device: a soft cap would change nothing, and nothing is learned here. ``first`` and
    ``reduce`` as in ``linear_cross_entropy``; every shard gets the token of the whole vocabulary.
    """
    token_R = torch.empty(len(hidden_RD), dtype=torch.int64, device=hidden_RD.device)
    rows = _chunk_rows(weight_VD)
    for start in range(0, len(hidden_RD), rows):
        top_C, token_C = torch.max(hidden_RD[start : start + rows] @ weight_VD.T, dim=1)
        if reduce is not None:
            own_C = top_C.to(torch.promote_types(top_C.dtype, torch.float32))
            top_C = own_C.clone()
            reduce(top_C, "max")
            # The first of equals is the largest of the negative numbers, which float32 holds exactly below 2^24.
            rank_C = torch.where(own_C == top_C, -(token_C + first).to(own_C.dtype), -torch.inf)
            reduce(rank_C, "max")
            token_C = -rank_C.long()
        token_R[start : start + rows] = token_C
    return token_R


def _check(hidden, weight, target, label_smoothing, z_loss, softcap, first, reduce) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}"
    if not (hidden.dim() == weight.dim() == 2 and target.dim() == 1):
        raise ValueError(f"linear_cross_entropy wants hidden_RD, weight_VD and target_R, not {shapes}")
    if hidden.shape != (target.shape[0], weight.shape[1]):
        raise ValueError(f"hidden, weight and target disagree on R or D: {shapes}")
    if weight.shape[0] == 0:
        raise ValueError(f"a vocabulary has rows: {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share one floating dtype, not {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, not {target.dtype}")
    if not hidden.device == weight.device == target.device:
        raise ValueError(f"one device for all, not {hidden.device}, {weight.device} and {target.device}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, not {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if first < 0 or (first > 0 and reduce is None):
        raise ValueError(f"first {first} must be the start of a shard, which needs reduce")
