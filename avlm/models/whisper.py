"""Audio tower: the Whisper encoder (Radford et al. 2022), all windows in one packed row, without padding.

Its stem is Whisper's, two convolutions over frames; or Qwen3-Omni's, three over frames and mel bins, each of which
halves both; or FastConformer's, where the second and the third are a depthwise and a pointwise one. The second kind
reads pieces of 100 frames apart from each other, and positions begin again in each. Blocks are Whisper's, or those of
``avlm.models.conformer``, which know relative positions.

C windows   M mel bins   W frames of 10 ms   W / 2 rows after the stride-2 convolution   K rows kept   D width
N pieces   L frames of a piece   R rows of a piece   S channels
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import AudioConfig
from avlm.models.batch import Media
from avlm.models.conformer import ConformerBlock, conformer_init_stats, relative_positions
from avlm.models.encoder import EncoderBlock, encoder_init_stats

PIECES = 64  # that the convolutions of a conv2d stem read at once: their outputs are far larger than its rows


class AudioTower(nn.Module):
    def __init__(self, config: AudioConfig):
        super().__init__()
        self.config = config
        D, S = config.hidden_size, config.stem_width
        halve = {"kernel_size": 3, "stride": 2, "padding": 1}
        if config.stem == "conv1d":
            self.conv1 = nn.Conv1d(config.num_mels, D, kernel_size=3, padding=1)
            self.conv2 = nn.Conv1d(D, D, **halve)
        else:
            groups = S if config.stem == "depthwise" else 1
            self.conv1 = nn.Conv2d(1, S, **halve)
            self.conv2 = nn.Conv2d(S, S, groups=groups, **halve)
            self.conv3 = nn.Conv2d(S, S, groups=groups, **halve)
            self.stem_out = nn.Linear(S * config.stem_bins, D, bias=config.stem == "depthwise")
        if config.stem == "depthwise":
            self.point2 = nn.Conv2d(S, S, kernel_size=1)
            self.point3 = nn.Conv2d(S, S, kernel_size=1)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(D) if config.block == "whisper" else nn.Identity()  # a conformer's blocks end with one

    def forward(self, windows: Media) -> Tensor:
        """Features of the kept rows, (K, D) in the weights' dtype, or of the means of neighbours. Rows past a clip are
        dropped before any attention. Zero windows are legal."""
        rows = windows.windows
        assert rows is not None
        x_KD, position_K = self._stem(windows)
        if self.config.scale_input:
            x_KD = x_KD * math.sqrt(self.config.hidden_size)
        positions: tuple[Tensor, ...] = ()
        if self.config.block == "conformer":
            positions = (relative_positions(windows.segments, x_KD),)
        else:
            x_KD = x_KD + sinusoids(position_K, self.config.hidden_size).to(x_KD.dtype)
        for block in self.blocks:
            x_KD = block(x_KD, windows.segments, *positions)
        if rows.pooled is not None:
            x_KD = (x_KD[rows.pooled] + x_KD[rows.pooled + 1]) / 2
        return self.norm(x_KD)

    def _stem(self, windows: Media) -> tuple[Tensor, Tensor]:
        """The kept rows (K, D), and the position of each in its window or piece, (K,)."""
        rows = windows.windows
        assert rows is not None
        values_CMW = windows.values.to(self.conv1.weight.dtype)
        kept_K = rows.kept
        if self.config.stem == "depthwise":
            return self._rows_of_clips(values_CMW, windows.sizes), torch.remainder(kept_K, values_CMW.shape[2] // 8)
        if self.config.stem == "conv2d":
            return self._rows_of_pieces(values_CMW)[kept_K], torch.remainder(kept_K, self.config.rows_together)
        x_CDW = F.gelu(self.conv1(values_CMW))
        if rows.live is not None:
            x_CDW = x_CDW * rows.live[:, None].to(x_CDW.dtype)
        x_CDW = F.gelu(self.conv2(x_CDW))
        return x_CDW.transpose(1, 2).flatten(0, 1)[kept_K], torch.remainder(kept_K, max(x_CDW.shape[2], 1))

    def _rows_of_clips(self, values_CMW: Tensor, sizes: Sequence) -> Tensor:
        """The kept rows, (K, D). Each window is convolved without what fills it up, so that every convolution pads its
        clip with zeros. ``sizes``: frames of the clip in each. A row's inputs to ``stem_out`` stand channel by
        channel."""
        alone = [values_1MW[None, :, :size] for values_1MW, size in zip(values_CMW, sizes)]
        found = []
        for clip_1MW in alone or [values_CMW]:
            x = F.relu(self.conv1(clip_1MW.mT[:, None]))
            x = F.relu(self.point2(self.conv2(x)))
            x = F.relu(self.point3(self.conv3(x)))
            found.append(self.stem_out(x.transpose(1, 2).flatten(2)).flatten(0, 1))
        return torch.cat(found)

    def _rows_of_pieces(self, values_CMW: Tensor) -> Tensor:
        """All rows of all pieces, (N * R, D). A row's inputs to ``stem_out`` stand channel by channel."""
        pieces_NML = values_CMW.unflatten(2, (-1, self.config.stem_frames)).transpose(1, 2).flatten(0, 1)
        found = []
        for some_NML in pieces_NML.split(PIECES):
            x = some_NML[:, None]
            for convolution in (self.conv1, self.conv2, self.conv3):
                x = F.gelu(convolution(x))
            found.append(self.stem_out(x.permute(0, 3, 1, 2).flatten(2)))
        return torch.cat(found).flatten(0, 1)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn."""
        return encoder_init_stats(self, self.config.num_layers) | conformer_init_stats(self)


def _block(config: AudioConfig) -> nn.Module:
    if config.block == "whisper":
        return EncoderBlock(config, key_bias=config.key_bias)
    sizes = config.hidden_size, config.intermediate_size, config.num_heads
    return ConformerBlock(*sizes, kernel=config.conv_kernel, bias=config.bias, conv_bias=config.conv_bias)


def sinusoids(position_K: Tensor, width: int) -> Tensor:
    """Whisper's fixed positions, float32 (K, width): sin then cos of position * 10000^(-i / (width / 2 - 1))."""
    num_angles = width // 2
    step = math.log(10_000) / (num_angles - 1)
    index = torch.arange(num_angles, device=position_K.device, dtype=torch.float32)
    angle = position_K[:, None] * torch.exp(-step * index)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
