"""Cross entropy of a linear head without the full logits; the gradients are computed while the logits are there.

    x = hidden @ weight.T        loss_r, dx from ``cross_entropy_rows``        loss = sum_r loss_r
    dhidden = dx @ weight        dweight = dx.T @ hidden

Rows are processed in chunks: one matrix product computes the logits of a chunk, one pass over them computes the losses
and overwrites the logits with dx, and two products add to the gradients. Nothing is computed twice. The price is that
only the sum is differentiable: factors of single rows have to be known in the forward.

R rows   C rows of a chunk   D hidden   V vocabulary, or this shard of it
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend
from kernels.cross_entropy_rows import IGNORED, Reduce, losses
from kernels.dispatch import Implementation

CHUNK_ROWS = 2048
CHUNK_BYTES = 2**30  # of logits; a larger vocabulary has fewer rows
ROW_MULTIPLE = 16  # elements at whose multiples rows start, so that products and pass read and write whole vectors


def chunk_rows(vocabulary: int, hidden: int, itemsize: int, wants_weight: bool) -> int:
    """Rows of a chunk, for logits of ``itemsize`` bytes; ``vocabulary`` is that of this shard.

    Each chunk reads and writes dweight in float32: 8 V D bytes next to 6 C V D operations, an eighth of an H100's time
    at 2048 rows. So with a dweight a chunk has at least D rows. Their logits take no more memory than the copy of
    dweight in its own dtype, which is made at the end.
    """
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (vocabulary * itemsize)))
    return max(rows, hidden) if wants_weight else rows


def chunk_bytes(rows: int, vocabulary: int, itemsize: int, implementation: Implementation) -> int:
    """Bytes of a chunk's logits. The kernel overwrites them; plain PyTorch computes in a float32 copy."""
    width = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    copy = 4 * vocabulary if implementation == "pytorch" and itemsize < 4 else 0
    return rows * (width * itemsize + copy)


def _loss_and_gradients(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
    first: int = 0,
    reduce: Reduce | None = None,
    factor_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, loss_R, dhidden_RD and dweight_VD. A gradient that is not wanted has no rows."""
    R, D = hidden_RD.shape
    V = len(weight_VD)
    rows = chunk_rows(V, D, weight_VD.element_size(), wants_weight)
    exact = torch.promote_types(hidden_RD.dtype, torch.float32)
    loss_R = hidden_RD.new_empty(R, dtype=exact)
    dhidden_RD = hidden_RD.new_empty((R if wants_hidden else 0, D))
    # dweight is summed over chunks in float32. The product of a single chunk is the whole sum and needs none.
    sum_dtype = exact if rows < R else hidden_RD.dtype
    dweight_VD = hidden_RD.new_empty((V if wants_weight else 0, D), dtype=sum_dtype)
    if R == 0:
        dweight_VD.zero_()
    buffer = hidden_RD.new_empty((min(rows, R), -(-V // ROW_MULTIPLE) * ROW_MULTIPLE))
    for start in range(0, R, rows):
        chunk = slice(start, start + rows)
        hidden_CD = hidden_RD[chunk]
        target_C = target_R[chunk]
        logits_CV = buffer[: len(target_C), :V]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        loss_R[chunk] = losses(logits_CV, target_C, softcap, wants_hidden or wants_weight, first, reduce)
        if factor_R is not None:
            loss_R[chunk] *= factor_R[chunk]
            logits_CV *= factor_R[chunk, None]
        if wants_hidden:
            torch.mm(logits_CV, weight_VD, out=dhidden_RD[chunk])
        if wants_weight:
            _add_product(dweight_VD, logits_CV.T, hidden_CD, overwrite=start == 0)
    buffer = logits_CV = None  # free before dweight is copied
    return loss_R.sum(), loss_R, dhidden_RD, dweight_VD.to(weight_VD.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool) -> None:
    """total += a @ b, or total = a @ b, summed in the dtype of total."""
    beta = 0 if overwrite else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif overwrite:  # products on the CPU have no out_dtype
        total.copy_(a @ b)
    else:
        total += a @ b


def linear_cross_entropy_op(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
    factor_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_loss_and_gradients of a whole vocabulary; an op cannot take a ``reduce``."""
    if backend.DEBUG:
        V = len(weight_VD)
        outside_R = ((target_R < 0) | (target_R >= V)) & (target_R != IGNORED)
        outside = target_R[outside_R].tolist()
        if outside:
            raise ValueError(f"{len(outside)} targets are outside the vocabulary of {V}, the first is {outside[0]}")
    return _loss_and_gradients(hidden_RD, weight_VD, target_R, softcap, wants_hidden, wants_weight, factor_R=factor_R)


def _fake(hidden_RD, weight_VD, target_R, softcap, wants_hidden, wants_weight, factor_R=None):
    R, D = hidden_RD.shape
    loss_R = hidden_RD.new_empty(R, dtype=torch.promote_types(hidden_RD.dtype, torch.float32))
    dhidden_RD = hidden_RD.new_empty((R if wants_hidden else 0, D))
    dweight_VD = hidden_RD.new_empty((len(weight_VD) if wants_weight else 0, D))
    return loss_R.new_empty(()), loss_R, dhidden_RD, dweight_VD


_op = backend.define_op(linear_cross_entropy_op, _fake)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward computes the gradients; the backward scales them."""

    @staticmethod
    def forward(hidden_RD, weight_VD, target_R, softcap, wants_hidden, wants_weight, first, reduce, factor_R):
        whole = hidden_RD, weight_VD, target_R, softcap, wants_hidden, wants_weight
        if reduce is None:
            return _op(*whole, factor_R)
        with torch.cuda.device_of(hidden_RD):
            return _loss_and_gradients(*whole, first, reduce, factor_R)

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
            scale_11 = dloss.reshape(1, 1)  # as a matrix: a scalar would first be rounded to the gradient's dtype
            if torch.compiler.is_compiling():  # may not overwrite saved tensors; it plans memory itself
                gradients[i] = (gradient * scale_11).to(gradient.dtype)
            else:  # in place: a second dweight would be as large as the head
                gradients[i] = gradient.mul_(scale_11)
        return *gradients, *[None] * 7


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    softcap: float | None = None,
    first: int = 0,
    reduce: Reduce | None = None,
    factor_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """loss, the sum over rows, and loss_R, the loss of each row without a gradient; float32 (float64 for float64).

    ``hidden`` and ``weight`` share a floating dtype, in which the logits are computed; all else is float32 inside. A
    row with target (int64) -100 has loss 0 and gradient 0. The caller should drop most such rows first, by an index
    that the data loader made: nothing here waits for the device. A target outside the vocabulary has loss NaN and
    gradient 0; with TRITON_DEBUG=1 it raises ValueError. Inputs that do not fit together raise ValueError as well.

    ``softcap`` c bounds logits by c tanh(logit / c) (Gemma 2). ``factor_R``, float32, multiplies the loss of each row.
    Without rows or targets, loss and gradients are zeros.

    Vocabulary-parallel: ``weight`` holds rows ``first`` to ``first`` + V of the whole, and ``reduce`` combines a small
    float32 tensor over all shards in place, by "max" or "sum". Losses and dweight are then exact on every shard;
    dhidden is this shard's part of a sum over the shards.

    Backward runs once: it scales the gradients in place, and autograd refuses a second call.
    """
    _check(hidden_RD, weight_VD, target_R, softcap, first, reduce)
    if factor_R is not None and (factor_R.shape != target_R.shape or factor_R.dtype != torch.float32):
        raise ValueError(f"factor_R must be float32 {tuple(target_R.shape)}, not {factor_R.dtype} {factor_R.shape}")
    recording = torch.is_grad_enabled()
    wants_hidden = recording and hidden_RD.requires_grad
    wants_weight = recording and weight_VD.requires_grad
    loss, loss_R, *_ = _LinearCrossEntropy.apply(
        hidden_RD, weight_VD, target_R.contiguous(), softcap, wants_hidden, wants_weight, first, reduce, factor_R
    )
    return loss, loss_R


@torch.no_grad()
def linear_argmax(hidden_RD: Tensor, weight_VD: Tensor, *, first: int = 0, reduce: Reduce | None = None) -> Tensor:
    """token_R (int64): the index of the largest logit of each row (the first of equals), without the full logits.

    For validation, on every device; a soft cap would change no result. ``first`` and ``reduce`` as in
    ``linear_cross_entropy``; every shard returns the token of the whole vocabulary.
    """
    R, D = hidden_RD.shape
    token_R = torch.empty(R, dtype=torch.int64, device=hidden_RD.device)
    rows = chunk_rows(len(weight_VD), D, weight_VD.element_size(), wants_weight=False)
    for start in range(0, R, rows):
        chunk = slice(start, start + rows)
        top_C, token_C = torch.max(hidden_RD[chunk] @ weight_VD.T, dim=1)
        if reduce is not None:
            own_C = top_C.to(torch.promote_types(top_C.dtype, torch.float32))
            top_C = own_C.clone()
            reduce(top_C, "max")
            # The first of equals has the largest negative index, which float32 holds exactly below 2^24.
            index_C = -(token_C + first).to(own_C.dtype)
            index_C = torch.where(own_C == top_C, index_C, -torch.inf)
            reduce(index_C, "max")
            token_C = -index_C.long()
        token_R[chunk] = token_C
    return token_R


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None, first: int, reduce: Reduce | None
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}"
    if not (hidden.dim() == weight.dim() == 2 and target.dim() == 1):
        raise ValueError(f"linear_cross_entropy takes hidden_RD, weight_VD and target_R, not {shapes}")
    if hidden.shape != (target.shape[0], weight.shape[1]):
        raise ValueError(f"hidden, weight and target disagree on R or D: {shapes}")
    if weight.shape[0] == 0:
        raise ValueError(f"the vocabulary is empty: {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share one floating dtype, not {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, not {target.dtype}")
    if not hidden.device == weight.device == target.device:
        devices = f"{hidden.device}, {weight.device} and {target.device}"
        raise ValueError(f"hidden, weight and target must be on one device, not {devices}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if first < 0 or (first > 0 and reduce is None):
        raise ValueError(f"first must be the start of a shard, which needs reduce, not {first}")
