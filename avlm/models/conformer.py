"""The Conformer block (Gulati et al. 2020) on packed rows, as FastConformer has it (Rekesh et al. 2023).

    x = x + ffn1(norm(x)) / 2
    x = x + attention(norm(x))
    x = x + convolution(norm(x))
    x = x + ffn2(norm(x)) / 2
    y = norm(x)

    s_ij = ((q_i + u) . k_j + (q_i + v) . (W_r r_(i-j))) / sqrt(E)                    (Dai et al. 2019, section 3.3)
    r_n  = sin, cos, sin, cos, ... of n * 10000^(-2m / D)
    convolution(x) = project(silu(depthwise(glu(expand(x))) * scale + shift))

``scale`` and ``shift`` are a batch norm that is frozen: its four tensors come to no more than that. A batch norm that
kept on measuring would see the mean of whatever clips share a row, so that a clip's features would depend on the
packing. Here they are parameters like any others.

Neither attention nor the convolution crosses a segment. Scores have a bias of their own for every pair, which our
attention kernels do not take: this is torch's attention, one segment after the other. It costs a matrix of H L^2
numbers for each segment and layer, which is kept for the backward, and 3/2 of the products of plain attention.

T rows of all segments   L rows of one   D width   F hidden width   H heads   E head dim   N relative positions
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.segments import Segments

ADAPTER = "adapter_"
RELATIVE = ".attention.relative_core"  # ends the path of products of queries and relative positions


class ConformerBlock(nn.Module):
    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, *, kernel: int, bias: bool, conv_bias: bool
    ):
        """``bias``: of the linears of feed-forward parts and attention; ``conv_bias``: of the convolution and of the
        linears around it."""
        super().__init__()
        D = hidden_size
        self.ffn1_norm = nn.LayerNorm(D)
        self.ffn1 = FeedForward(D, intermediate_size, bias)
        self.attention_norm = nn.LayerNorm(D)
        self.attention = RelativeAttention(D, num_heads, bias)
        self.conv_norm = nn.LayerNorm(D)
        self.conv = Convolution(D, kernel, conv_bias)
        self.ffn2_norm = nn.LayerNorm(D)
        self.ffn2 = FeedForward(D, intermediate_size, bias)
        self.norm = nn.LayerNorm(D)

    def forward(self, x_TD: Tensor, segments: Segments, positions_ND: Tensor) -> Tensor:
        """``positions_ND``: of ``relative_positions``."""
        x_TD = x_TD + 0.5 * self.ffn1(self.ffn1_norm(x_TD))
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), segments, positions_ND)
        x_TD = x_TD + self.conv(self.conv_norm(x_TD), segments)
        x_TD = x_TD + 0.5 * self.ffn2(self.ffn2_norm(x_TD))
        return self.norm(x_TD)


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x_TD)))


class RelativeAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, bias: bool):
        super().__init__()
        D = hidden_size
        self.head_dim = D // num_heads
        self.q = nn.Linear(D, D, bias=bias)
        self.k = nn.Linear(D, D, bias=bias)
        self.v = nn.Linear(D, D, bias=bias)
        self.relative = nn.Linear(D, D, bias=False)
        self.o = nn.Linear(D, D, bias=bias)
        self.bias_u = nn.Parameter(torch.empty(num_heads, self.head_dim))  # of contents
        self.bias_v = nn.Parameter(torch.empty(num_heads, self.head_dim))  # of positions
        self.core = RelativeCore()

    def forward(self, x_TD: Tensor, segments: Segments, positions_ND: Tensor) -> Tensor:
        heads = (-1, self.head_dim)
        q_THE = self.q(x_TD).unflatten(-1, heads)
        k_THE = self.k(x_TD).unflatten(-1, heads)
        v_THE = self.v(x_TD).unflatten(-1, heads)
        r_NHE = self.relative(positions_ND).unflatten(-1, heads)
        return self.o(self.core(q_THE + self.bias_u, q_THE + self.bias_v, k_THE, v_THE, r_NHE, segments).flatten(1))


class RelativeCore(nn.Module):
    """The part without parameters."""

    @torch.compiler.disable  # a graph of its own for any lengths of segments
    def forward(
        self, content_THE: Tensor, place_THE: Tensor, k_THE: Tensor, v_THE: Tensor, r_NHE: Tensor, segments: Segments
    ) -> Tensor:
        """``content``: q + u; ``place``: q + v; (T, H, E). A row of no segment at all has one without rows, so that
        every input has a gradient."""
        middle = len(r_NHE) // 2
        found = []
        for start, length in [span for span in segments.spans if span[1]] or [(0, 0)]:
            rows = slice(start, start + length)
            content_HLE, place_HLE, k_HLE, v_HLE = (
                x[rows].transpose(0, 1) for x in (content_THE, place_THE, k_THE, v_THE)
            )
            r_HEN = r_NHE[middle - max(length - 1, 0) : middle + length].permute(1, 2, 0)
            bias_HLL = shifted(place_HLE @ r_HEN) / math.sqrt(content_THE.shape[2])
            out_1HLE = F.scaled_dot_product_attention(content_HLE[None], k_HLE[None], v_HLE[None], bias_HLL[None])
            found.append(out_1HLE[0].transpose(0, 1))
        return torch.cat(found)


def shifted(scores_HLN: Tensor) -> Tensor:
    """Scores of relative positions L - 1 to -(L - 1) as scores of keys 0 to L - 1, (H, L, L): key j of query i is at
    i - j. Rows that are one number longer begin one number later each when they are cut one number shorter (Dai et al.
    2019, appendix B)."""
    H, L, N = scores_HLN.shape
    if L == 0:
        return scores_HLN[..., :0]
    longer_HLN = F.pad(scores_HLN, (1, 0))
    return longer_HLN.reshape(H, N + 1, L)[:, 1:].reshape(H, L, N)[..., :L]


class Convolution(nn.Module):
    def __init__(self, hidden_size: int, kernel: int, bias: bool):
        super().__init__()
        D = hidden_size
        self.gap = kernel // 2
        self.expand = nn.Linear(D, 2 * D, bias=bias)
        self.depthwise = nn.Conv1d(D, D, kernel, padding=self.gap, groups=D, bias=bias)
        self.scale = nn.Parameter(torch.empty(D))
        self.shift = nn.Parameter(torch.empty(D))
        self.project = nn.Linear(D, D, bias=bias)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        x_TD = F.glu(self.expand(x_TD), dim=1)
        place_T, num_places = places_apart(segments, self.gap, len(x_TD))
        apart_PD = x_TD.new_zeros(num_places, x_TD.shape[1]).index_copy(0, place_T, x_TD)
        x_TD = self.depthwise(apart_PD.T[None])[0].T[place_T]
        return self.project(F.silu(x_TD * self.scale + self.shift))


def places_apart(segments: Segments, gap: int, num_rows: int) -> tuple[Tensor, int]:
    """Where each row lies if there is a gap after each segment, int64 (T,), and the number of all places: at least
    one, as a convolution refuses no rows."""
    cu_seqlens = segments.cu_seqlens
    number_T = torch.arange(len(segments), device=cu_seqlens.device)
    number_T = number_T.repeat_interleave(cu_seqlens.diff(), output_size=num_rows)
    place_T = torch.arange(num_rows, device=cu_seqlens.device) + gap * number_T
    return place_T, max(num_rows + gap * max(len(segments), 1), 1)


def relative_positions(segments: Segments, like: Tensor) -> Tensor:
    """r_n for n from L - 1 down to -(L - 1), L the longest segment: (2 L - 1, D) for ``like`` (T, D), in its dtype.
    Made in float32."""
    longest, width = max(segments.max_length, 1), like.shape[1]
    place_N = torch.arange(longest - 1, -longest, -1, device=like.device, dtype=torch.float32)
    even = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle_NM = place_N[:, None] * 10_000 ** (-even / width)
    return torch.stack([angle_NM.sin(), angle_NM.cos()], dim=2).flatten(1).to(like.dtype)


def relative_counts(lengths: list[int], kernel: int, where: str = "") -> dict[str, int]:
    """What the blocks compute for segments of these lengths, by the counts of ``avlm.models.costs``: relative positions
    that are projected, pairs of a query and one of them, and places of the depthwise convolution. ``where``: begins the
    names of counts outside of towers, ADAPTER."""
    return {
        f"{where}relative_rows": 2 * max([1, *lengths]) - 1,
        f"{where}relative_pairs": sum(length * (2 * length - 1) for length in lengths),
        f"{where}conv_places": max(sum(lengths) + kernel // 2 * max(len(lengths), 1), 1),
    }


def conformer_steps(num_blocks: int, rows: str, pairs: str, where: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The steps of ``avlm.models.costs`` of some blocks: counts, and the modules of each."""
    for i in range(num_blocks):
        block, attention, conv = f"blocks.{i}", f"blocks.{i}.attention", f"blocks.{i}.conv"
        yield "", (f"{block}.ffn1_norm",)
        yield rows, (f"{block}.ffn1.up",)
        yield rows, (f"{block}.ffn1.down",)
        yield "", (f"{block}.attention_norm",)
        yield rows, (f"{attention}.q", f"{attention}.k", f"{attention}.v")
        yield f"{where}relative_rows", (f"{attention}.relative",)
        yield "", (f"{attention}.bias_u", f"{attention}.bias_v")
        yield f"{where}relative_pairs", (f"{block}{RELATIVE}",)
        yield pairs, (f"{attention}.core",)
        yield rows, (f"{attention}.o",)
        yield "", (f"{block}.conv_norm",)
        yield rows, (f"{conv}.expand",)
        yield f"{where}conv_places", (f"{conv}.depthwise",)
        yield "", (f"{conv}.scale", f"{conv}.shift")
        yield rows, (f"{conv}.project",)
        yield "", (f"{block}.ffn2_norm",)
        yield rows, (f"{block}.ffn2.up",)
        yield rows, (f"{block}.ffn2.down",)
        yield "", (f"{block}.norm",)


def conformer_init_stats(module: nn.Module) -> dict[str, tuple[float, float]]:
    """(mean, std) of what ``encoder_init_stats`` does not know in a module with Conformer blocks: no bias of contents
    and positions, as in NeMo, and a batch norm that does nothing."""
    endings = {".bias_u": 0.0, ".bias_v": 0.0, ".conv.scale": 1.0, ".conv.shift": 0.0}
    stats = {}
    for name, _ in module.named_parameters():
        for ending, mean in endings.items():
            if name.endswith(ending):
                stats[name] = (mean, 0.0)
    return stats
