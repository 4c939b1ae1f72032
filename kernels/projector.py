"""The two-layer projector and its placement among the decoder's token features.

    z_RF = x[source] @ w1.T + b1        y_RD = gelu(z) @ w2.T + b2        gelu(z) = z / 2 * (1 + erf(z / sqrt 2))

    dh = dy @ w2    dz = dh gelu'(z)    dw2 = dy.T @ gelu(z)    db2 = sum dy    dw1 = dz.T @ x[source]    db1 = sum dz
    dx[source] = dz @ w1                d into = d out, 0 at rows            dy = d out[rows]

Input row i consists of S tower rows side by side, x[source[i, 0]] to x[source[i, S - 1]]; -1 stands for zeros. This
skips the class token (S = 1), shuffles pixels (S = 4 for 2 x 2) and stacks frames, all without a copy of x.

P tower rows   C tower width   S tower rows of an input row   R input rows   K = S * C   F hidden   D decoder width
T token rows
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, projector_gemm, projector_rows


def side_by_side(x_PC: Tensor, source_RS: Tensor) -> Tensor:
    """Input rows (R, S * C): the tower rows source_RS[i] side by side, zeros where the source is -1."""
    padded = torch.cat([x_PC, x_PC.new_zeros(1, x_PC.shape[1])])
    source_RS = torch.where(source_RS == -1, x_PC.shape[0], source_RS)
    return padded.index_select(0, source_RS.flatten()).view(-1, source_RS.shape[1] * x_PC.shape[1])


def projector_mlp_reference(x_PC, w1_FK, b1_F, w2_DF, b2_D, *, source_RS=None):
    """The specification in plain PyTorch."""
    x_RK = x_PC if source_RS is None else side_by_side(x_PC, source_RS)
    return F.linear(F.gelu(F.linear(x_RK, w1_FK, b1_F)), w2_DF, b2_D)


def place_projected_reference(into_TD, rows_R, x_PC, w1_FK, b1_F, w2_DF, b2_D, *, source_RS=None):
    """The specification in plain PyTorch. Writes to ``into`` and returns it."""
    y_RD = projector_mlp_reference(x_PC, w1_FK, b1_F, w2_DF, b2_D, source_RS=source_RS)
    return into_TD.index_copy_(0, rows_R, y_RD.to(into_TD.dtype))


class _Projector(torch.autograd.Function):
    """Both public functions: writes to ``into`` at ``rows`` and returns it, or a new tensor without them."""

    @staticmethod
    def forward(into_TD, rows_R, x_PC, source_RS, w1_FK, b1_F, w2_DF, b2_D, save_z):
        h_RF, z_RF = projector_gemm.up(x_PC, source_RS, w1_FK, b1_F, save_z)
        if into_TD is not None and into_TD.element_size() <= h_RF.element_size():
            projector_gemm.down(into_TD, rows_R, h_RF, w2_DF, b2_D)
            return into_TD, z_RF
        y_RD = h_RF.new_empty(h_RF.shape[0], w2_DF.shape[0])
        projector_gemm.down(y_RD, None, h_RF, w2_DF, b2_D)
        if into_TD is None:
            return y_RD, z_RF
        projector_rows.scatter_rows(into_TD, rows_R, y_RD)  # tiles of a wider dtype would not fit into shared memory
        return into_TD, z_RF

    @staticmethod
    def setup_context(ctx, inputs, output):
        into_TD, rows_R, x_PC, source_RS, w1_FK, _, w2_DF, _, save_z = inputs
        if into_TD is not None:
            ctx.mark_dirty(into_TD)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        if save_z:
            ctx.save_for_backward(rows_R, source_RS, x_PC, w1_FK, w2_DF, output[1])
        else:
            ctx.save_for_backward(rows_R, source_RS)
        ctx.hidden = w1_FK.shape[0]
        ctx.dtype = w2_DF.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        rows_R, source_RS, *saved = ctx.saved_tensors
        into_needs, _, x_needs, _, w1_needs, b1_needs, w2_needs, b2_needs, _ = ctx.needs_input_grad
        dinto = dx = dw1 = db1 = dw2 = db2 = None
        if into_needs:
            dinto = dout.clone(memory_format=torch.contiguous_format)
            projector_rows.scatter_rows(dinto, rows_R, None)
        if not (saved or b2_needs):
            return dinto, *[None] * 8
        dy_RD, db2 = _dy_and_db2(dout, rows_R, ctx.dtype, b2_needs)
        if saved:
            x_PC, w1_FK, w2_DF, z_RF = saved
            if x_needs or w1_needs or b1_needs:
                dz_RF, h_RF, db1 = projector_gemm.dgelu(dy_RD, w2_DF, z_RF, w2_needs)
                db1 = db1[: ctx.hidden].to(ctx.dtype)
            else:
                h_RF = F.gelu(z_RF)
            if w2_needs:
                dw2 = (dy_RD.T @ h_RF)[:, : ctx.hidden]
            del dy_RD, h_RF  # their memory is free for the products below
            if w1_needs:
                dw1 = (dz_RF.T @ _input_rows(x_PC, source_RS))[: ctx.hidden]
            if x_needs:
                dx = _dx(dz_RF[:, : ctx.hidden] @ w1_FK, x_PC, source_RS)
        if not b1_needs:
            db1 = None
        return dinto, None, dx, None, dw1, db1, dw2, db2, None


def _dy_and_db2(
    dout: Tensor, rows_R: Tensor | None, dtype: torch.dtype, want_db2: bool
) -> tuple[Tensor, Tensor | None]:
    """dy as contiguous rows: cuBLAS cannot gather, so dw2 needs a copy of these rows, and dh then reuses it."""
    if rows_R is None:
        return dout, dout.sum(0) if want_db2 else None
    dy_RD, db2 = projector_rows.gather_rows(dout, rows_R, dtype, want_db2)
    return dy_RD, db2.to(dtype) if want_db2 else None


def _input_rows(x_PC: Tensor, source_RS: Tensor | None) -> Tensor:
    if source_RS is None:
        return x_PC
    R, S = source_RS.shape
    rows, _ = projector_rows.gather_rows(x_PC, source_RS.flatten(), x_PC.dtype, False)
    return rows.view(R, S * x_PC.shape[1])


def _dx(dx_RK: Tensor, x_PC: Tensor, source_RS: Tensor | None) -> Tensor:
    if source_RS is None:
        return dx_RK
    dx_PC = torch.zeros_like(x_PC, memory_format=torch.contiguous_format)
    projector_rows.scatter_rows(dx_PC, source_RS.flatten(), dx_RK.view(-1, x_PC.shape[1]))
    return dx_PC


def projector_mlp(
    x_PC: Tensor, w1_FK: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor, *, source_RS: Tensor | None = None
) -> Tensor:
    """Project tower features to decoder width: y_RD in the dtype of x, which the weights share. R may be 0.

    ``source_RS`` (int64) names the tower rows of each input row, each at most once, or -1 for zeros; by default input
    row i is tower row i. A source out of range reads zeros; with TRITON_DEBUG=1 it raises ValueError.

    Triton where ``kernels.dispatch`` says so, the reference elsewhere. The same call returns the same bits.
    ValueError for inputs that do not fit together.
    """
    _check(x_PC, w1_FK, b1_F, w2_DF, b2_D, source_RS)
    if backend.implementation("projector", x_PC) == "pytorch":
        return projector_mlp_reference(x_PC, w1_FK, b1_F, w2_DF, b2_D, source_RS=source_RS)
    return _apply(None, None, x_PC, source_RS, w1_FK, b1_F, w2_DF, b2_D)


def place_projected(
    into_TD: Tensor,
    rows_R: Tensor,
    x_PC: Tensor,
    w1_FK: Tensor,
    b1_F: Tensor,
    w2_DF: Tensor,
    b2_D: Tensor,
    *,
    source_RS: Tensor | None = None,
) -> Tensor:
    """``into`` with row rows_R[i] replaced by projected row i, cast to its dtype. Otherwise like ``projector_mlp``.

    ``into`` is consumed: the result reuses its memory, so that no row is copied, and nobody may read it afterwards.
    With gradients enabled, two kinds are copied instead: views, because autograd forbids writing to some of them, and
    leaves that require a gradient. The last dim of ``into`` must be contiguous. ``rows`` (int64) are distinct. On a GPU
    a row out of range is not written; with TRITON_DEBUG=1 it raises ValueError, and so does a repeated row.
    """
    _check(x_PC, w1_FK, b1_F, w2_DF, b2_D, source_RS)
    num_rows = len(x_PC) if source_RS is None else len(source_RS)
    _check_placement(into_TD, rows_R, num_rows, w2_DF)
    if torch.is_grad_enabled() and _must_be_kept(into_TD):
        into_TD = into_TD.clone(memory_format=torch.contiguous_format)
    if backend.implementation("projector", x_PC) == "pytorch":
        return place_projected_reference(into_TD, rows_R, x_PC, w1_FK, b1_F, w2_DF, b2_D, source_RS=source_RS)
    return _apply(into_TD, rows_R, x_PC, source_RS, w1_FK, b1_F, w2_DF, b2_D)


def _must_be_kept(into: Tensor) -> bool:
    """Whether autograd would refuse to overwrite it. torch.compile handles writes to views itself."""
    if into.is_leaf and into.requires_grad:
        return True
    return not torch.compiler.is_compiling() and into._is_view()


def _apply(into_TD, rows_R, x_PC, source_RS, w1_FK, b1_F, w2_DF, b2_D) -> Tensor:
    save_z = backend.needs_graph(x_PC, w1_FK, b1_F, w2_DF)
    # Views: torch.compile (2.11) loses a gradient of a tensor that a Function is given twice.
    w2_DF = w2_DF.view_as(w2_DF)
    b2_D = b2_D.view_as(b2_D)
    out, _ = _Projector.apply(into_TD, rows_R, x_PC, source_RS, w1_FK, b1_F, w2_DF, b2_D, save_z)
    return out


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, source: Tensor | None) -> None:
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    if [t.dim() for t in tensors.values()] != [2, 2, 1, 2, 1]:
        raise ValueError(f"a projector takes x_PC, w1_FK, b1_F, w2_DF and b2_D, not {shapes}")
    if source is not None and (source.dtype != torch.int64 or source.dim() != 2 or source.shape[1] == 0):
        raise ValueError(f"source_RS must be an int64 matrix, not {source.dtype} {tuple(source.shape)}")
    S = 1 if source is None else source.shape[1]
    if w1.shape != (b1.shape[0], S * x.shape[1]) or w2.shape != (b2.shape[0], w1.shape[0]):
        raise ValueError(f"widths disagree, with {S} tower rows to an input row: {shapes}")
    dtypes = [t.dtype for t in tensors.values()]
    if set(dtypes) != {x.dtype} or not x.is_floating_point():
        raise ValueError(f"x, w1, b1, w2 and b2 must share one floating dtype, not {dtypes}")
    if source is not None:
        tensors["source"] = source
    devices = [str(t.device) for t in tensors.values()]
    if set(devices) != {str(x.device)}:
        raise ValueError(f"x, w1, b1, w2, b2 and the source must be on one device, not {devices}")


def _check_placement(into: Tensor, rows: Tensor, num_rows: int, w2: Tensor) -> None:
    if into.dim() != 2 or into.shape[1] != w2.shape[0] or not into.is_floating_point():
        raise ValueError(f"into must be floating rows of {w2.shape[0]}, not {into.dtype} {tuple(into.shape)}")
    if into.stride(1) != 1:
        raise ValueError(f"the last dim of into must be contiguous, not strides {into.stride()}")
    if rows.dtype != torch.int64 or rows.shape != (num_rows,):
        raise ValueError(
            f"{num_rows} input rows need {num_rows} int64 rows of into, not {rows.dtype} {tuple(rows.shape)}"
        )
    if not into.device == rows.device == w2.device:
        raise ValueError(f"into, rows and features must be on one device: {into.device}, {rows.device}, {w2.device}")
