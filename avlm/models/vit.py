"""Vision tower: CLIP ViT (Radford et al. 2021), SigLIP (Zhai et al. 2023), InternViT (Chen et al. 2024), and those of
Qwen-VL and Pixtral, which take images of any grid of patches (Dehghani et al. 2023). All stand in one packed row.

I images   P patches of all images, N numbers each   C class tokens (0 or 1)   T = P + I * C rows   D width   E head dim
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import VisionConfig
from avlm.models.batch import Media
from avlm.models.encoder import NORMS, EncoderBlock, Rope, encoder_init_stats
from avlm.models.patches import PatchPlaces
from avlm.models.rope import rope_table

AXIAL_THETA = 10_000.0


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        norm = NORMS[config.norm]
        # The patch convolution, written as a matrix product.
        self.patch = nn.Linear(config.patch_numbers, D, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(1, D)) if config.class_token else None
        self.position = nn.Parameter(torch.empty(config.num_rows, D)) if config.num_rows else None
        self.pre_norm = norm(D, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config,
                activation=config.activation,
                gated=config.gated,
                norm=config.norm,
                norm_eps=config.norm_eps,
                bias=config.bias,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                layer_scale=config.layer_scale,
            )
            for _ in range(config.num_blocks)
        )
        self.post_norm = norm(D, config.norm_eps) if config.post_norm else nn.Identity()

    def forward(self, images: Media) -> Tensor:
        """Features of every row, the class token of an image first: (T, D) in the weights' dtype; with DeepStack those
        of its layers beside them, (T, D * (1 + layers)). Zero images are legal."""
        x_PD = self.patch(normalise(images.values, self.config).to(self.patch.weight.dtype))
        rope = windows = None
        if images.places is None:
            x_TD = self._on_a_square(x_PD)
        else:
            x_TD = x_PD if self.position is None else x_PD + stretched(self.position, images.places)
            windows = images.places.windows
            if self.config.axial_rope:
                rope = axial_table(images.places.yx, self.config)
        x_TD = self.pre_norm(x_TD)
        inner = []
        for i, block in enumerate(self.blocks):
            x_TD = block(x_TD, windows if self.config.has_window(i) else images.segments, rope)
            if i in self.config.deepstack_layers:
                inner.append(x_TD)
        x_TD = self.post_norm(x_TD)
        return torch.cat([x_TD, *inner], 1) if inner else x_TD

    def _on_a_square(self, x_PD: Tensor) -> Tensor:
        """(T, D): the class token before the patches of each image, and its positions, a row for each."""
        x_IND = x_PD.unflatten(0, (-1, self.config.num_patches))
        if self.class_token is not None:
            class_I1D = self.class_token.expand(x_IND.shape[0], 1, -1)
            x_IND = torch.cat([class_I1D, x_IND], dim=1)
        return (x_IND + self.position).flatten(0, 1)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn; positions and the class token have std 0.02."""
        stats = encoder_init_stats(self, self.config.num_layers)
        stats["position"] = (0.0, 0.02)
        stats["class_token"] = (0.0, 0.02)
        return stats


def normalise(patches_PN: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 -> float32: zero mean and unit variance over the images that the tower was trained on."""
    device, of_channel = patches_PN.device, vision.patch_numbers // 3
    mean_N = _by_channel(tuple(vision.mean), of_channel, device)
    std_N = _by_channel(tuple(vision.std), of_channel, device)
    return (patches_PN.float() - mean_N) / std_N


@lru_cache
def _by_channel(values: tuple[float, ...], of_channel: int, device: torch.device) -> Tensor:
    """float32 (N,), scaled to pixel values of 0..255. Cached, because a copy to a GPU makes the host wait."""
    return 255 * torch.tensor(values, device=device).repeat_interleave(of_channel)


def stretched(position_RD: Tensor, places: PatchPlaces) -> Tensor:
    """Positions (P, D): weighted sums of the rows of a table."""
    assert places.tap_rows is not None
    # In float32: the gradient of a row of the table is a sum over many patches, which bf16 would cut off on a CPU.
    taps_PD = F.embedding_bag(places.tap_rows, position_RD.float(), mode="sum", per_sample_weights=places.tap_weights)
    return taps_PD.to(position_RD.dtype)


def axial_table(yx_P2: Tensor, vision: VisionConfig) -> Rope:
    """cos and sin for ``rotate``, float32 (P, E). Of the E / 2 pairs of dimensions of a head, the first half turns with
    a patch's line and the second with its column, by theta^(-2i / (E / 2)) with i < E / 4. With ``axial_offset`` the
    E / 2 speeds theta^(-2i / E) are dealt to them in turns: the even ones to lines, the odd ones to columns."""
    num_each = vision.head_dim // 4
    place = torch.arange(num_each, dtype=torch.float64, device=yx_P2.device) / num_each
    frequency = AXIAL_THETA**-place
    of_columns = frequency * AXIAL_THETA ** (-2 / vision.head_dim) if vision.axial_offset else frequency
    return rope_table(torch.cat([frequency, of_columns]), yx_P2.repeat_interleave(num_each, dim=1))
