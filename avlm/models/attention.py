"""The part of attention that has no parameters, as a module, so that context parallelism can replace it."""

from torch import Tensor, nn

from kernels.attention import attention
from kernels.segments import Segments


class AttentionCore(nn.Module):
    """Attention within the segments of a packed row; see ``kernels.attention`` for shapes."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> Tensor:
        return attention(q_THE, k_TKE, v_TKE, segments, causal=self.causal)
