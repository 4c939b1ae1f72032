"""Attention of one new token per sequence against a long key/value cache.

    out_b = softmax over j < length_b of (scale * q_b . k_bj) . v_bj

B sequences   S slots of the cache   H query heads   K key/value heads (H a multiple of K)   E head dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q_BHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, length_B: Tensor, *, scale: float | None = None
) -> Tensor:
    """out_BHE in the dtype of q. ``length_B`` (int) counts the used slots, the new token's own included.

    ``scale`` is 1 / sqrt(E) by default. A sequence of length 0 gives 0. Not differentiable in use: for generation.
    """
    S = k_cache_BSKE.shape[1]
    visible_B11S = (torch.arange(S, device=q_BHE.device) < length_B[:, None])[:, None, None, :]
    out_BH1E = F.scaled_dot_product_attention(
        q_BHE.unsqueeze(2),
        k_cache_BSKE.transpose(1, 2),
        v_cache_BSKE.transpose(1, 2),
        attn_mask=visible_B11S,
        scale=scale,
        enable_gqa=q_BHE.shape[1] != k_cache_BSKE.shape[2],
    )
    return out_BH1E.squeeze(2).masked_fill((length_B == 0)[:, None, None], 0.0)
