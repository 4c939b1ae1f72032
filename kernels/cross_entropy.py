"""Cross entropy of a linear head without the full logits.

    logits_RV = hidden_RD @ weight_VD.T        loss_R = logsumexp_v logits_RV - logits_R[target_R]

R rows that carry a target   D hidden   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 1024  # the logits of so many rows exist at a time, forward and backward


def linear_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """Loss of every row, float32 (R,). ``hidden`` and ``weight`` share a dtype, ``target`` is int64 in [0, V).

    The logits are computed in that dtype and reduced in float32. Zero rows are legal and give zero gradients.
    """
    return linear_cross_entropy_reference(hidden_RD, weight_VD, target_R)


def linear_cross_entropy_reference(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """The specification: chunks of rows, each recomputed in the backward when there is more than one."""
    if hidden_RD.shape[0] <= CHUNK_ROWS:
        return _chunk_loss(hidden_RD, weight_VD, target_R)
    chunks = zip(hidden_RD.split(CHUNK_ROWS), target_R.split(CHUNK_ROWS))
    return torch.cat([checkpoint(_chunk_loss, h, weight_VD, t, use_reentrant=False) for h, t in chunks])


def _chunk_loss(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    logits_RV = F.linear(hidden_RD, weight_VD)
    return F.cross_entropy(
        logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)), target_R, reduction="none"
    )
