"""The two-layer projector and its placement among the decoder's token features.

    y_RD = gelu(x_RC @ w1_FC.T + b1_F) @ w2_DF.T + b2_D        gelu(z) = z / 2 * (1 + erf(z / sqrt 2))

R feature rows   C tower width   F hidden   D decoder width   T token rows
"""

import torch.nn.functional as F
from torch import Tensor


def projector_mlp(x_RC: Tensor, w1_FC: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor) -> Tensor:
    """Project tower features to decoder width: (R, D) in the dtype of x. Zero rows are legal."""
    return F.linear(F.gelu(F.linear(x_RC, w1_FC, b1_F)), w2_DF, b2_D)


def place_projected(
    into_TD: Tensor, rows_R: Tensor, x_RC: Tensor, w1_FC: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor
) -> Tensor:
    """``into`` with row rows_R[i] replaced by projected row i. rows are int64 and distinct; ``into`` is not changed."""
    return into_TD.index_copy(0, rows_R, projector_mlp(x_RC, w1_FC, b1_F, w2_DF, b2_D).to(into_TD.dtype))
