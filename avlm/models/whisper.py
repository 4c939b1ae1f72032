"""Audio tower: the Whisper encoder (Radford et al. 2022), all windows in one packed row, without padding.

C windows   M mel bins   W frames of 10 ms   W / 2 rows after the stride-2 convolution   K rows kept   D width
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import AudioConfig
from avlm.models.batch import Media
from avlm.models.encoder import EncoderBlock, encoder_init_stats


class AudioTower(nn.Module):
    def __init__(self, config: AudioConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mels, D, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(D, D, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(config, key_bias=config.key_bias) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(D)

    def forward(self, windows: Media) -> Tensor:
        """Features of the kept rows, (K, D) in the weights' dtype, or of the means of neighbours. Rows past a clip are
        dropped before any attention. Zero windows are legal."""
        rows = windows.windows
        assert rows is not None
        x_CDW = F.gelu(self.conv1(windows.values.to(self.conv1.weight.dtype)))
        if rows.live is not None:
            x_CDW = x_CDW * rows.live[:, None].to(x_CDW.dtype)
        x_CDW = F.gelu(self.conv2(x_CDW))
        rows_per_window = max(x_CDW.shape[2], 1)
        kept_K = rows.kept
        x_KD = x_CDW.transpose(1, 2).flatten(0, 1)[kept_K]
        positions_KD = sinusoids(torch.remainder(kept_K, rows_per_window), self.config.hidden_size)
        x_KD = x_KD + positions_KD.to(x_KD.dtype)
        for block in self.blocks:
            x_KD = block(x_KD, windows.segments)
        if rows.pooled is not None:
            x_KD = (x_KD[rows.pooled] + x_KD[rows.pooled + 1]) / 2
        return self.norm(x_KD)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn."""
        return encoder_init_stats(self, self.config.num_layers)


def sinusoids(position_K: Tensor, width: int) -> Tensor:
    """Whisper's fixed positions, float32 (K, width): sin then cos of position * 10000^(-i / (width / 2 - 1))."""
    num_angles = width // 2
    step = math.log(10_000) / (num_angles - 1)
    index = torch.arange(num_angles, device=position_K.device, dtype=torch.float32)
    angle = position_K[:, None] * torch.exp(-step * index)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
