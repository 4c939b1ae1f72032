"""Vision tower: CLIP ViT (Radford et al. 2021) and SigLIP (Zhai et al. 2023), all images in one packed row.

I images   S image side   P patch side   N patches of an image   C class tokens (0 or 1)   L = C + N rows of an image
T = I * L rows   D width
"""

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from avlm.config.model import VisionConfig
from avlm.models.batch import Media
from avlm.models.encoder import EncoderBlock, encoder_init_stats


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        # The patch convolution, written as a matrix product.
        self.patch = nn.Linear(3 * config.patch_size**2, D, bias=config.patch_bias)
        self.class_token = None
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, D))
        self.position = nn.Parameter(torch.empty(config.num_rows, D))
        self.pre_norm = nn.LayerNorm(D, config.norm_eps) if config.pre_norm else nn.Identity()
        blocks = [EncoderBlock(config, config.activation, eps=config.norm_eps) for _ in range(config.num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.post_norm = nn.LayerNorm(D, config.norm_eps) if config.post_norm else nn.Identity()

    def forward(self, images: Media) -> Tensor:
        """Features of every row, the class token of an image first: (T, D) in the weights' dtype. Zero images are
        legal."""
        pixels_I3SS = normalise(images.values, self.config).to(self.patch.weight.dtype)
        x_IND = self.patch(self.cut_into_patches(pixels_I3SS))
        if self.class_token is not None:
            class_I1D = self.class_token.expand(x_IND.shape[0], 1, -1)
            x_IND = torch.cat([class_I1D, x_IND], dim=1)
        x_TD = self.pre_norm(x_IND + self.position).flatten(0, 1)
        for block in self.blocks:
            x_TD = block(x_TD, images.segments)
        return self.post_norm(x_TD)

    def cut_into_patches(self, pixels_I3SS: Tensor) -> Tensor:
        """(I, N, 3 * P * P), line by line. Pixels past the last whole patch are dropped, as a convolution does."""
        P, side = self.config.patch_size, self.config.patches_per_side
        end = side * P
        whole_I3SS = pixels_I3SS[:, :, :end, :end]
        return rearrange(whole_I3SS, "i c (line y) (column x) -> i (line column) (c y x)", y=P, x=P)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn; positions and the class token have std 0.02."""
        stats = encoder_init_stats(self, self.config.num_layers)
        stats["position"] = (0.0, 0.02)
        stats["class_token"] = (0.0, 0.02)
        return stats


def normalise(pixels_I3SS: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 -> float32: zero mean and unit variance over the images that the tower was trained on."""
    device = pixels_I3SS.device
    mean = _by_channel(tuple(vision.mean), device)
    std = _by_channel(tuple(vision.std), device)
    return (pixels_I3SS.float() - mean) / std


@lru_cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 (3, 1, 1), scaled to pixel values of 0..255. Cached, because a copy to a GPU makes the host wait."""
    return 255 * torch.tensor(values, device=device).view(3, 1, 1)
