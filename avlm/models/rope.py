"""Rotary positions (Su et al. 2021): each pair of dimensions of a head turns with a token's position, at its own speed.

With M-RoPE (Qwen2-VL, Wang et al. 2024) a token of the decoder has three positions, its time, line and column, and each
pair turns with one of them. Those of text are equal, which makes its rotation the plain one.

YaRN's factor and the growth of queries depend on nothing but a token's position, so they are factors of cos and sin:
the tables are made once for all layers, and the rotation itself stays what it is.

T tokens   H heads   E head dim
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avlm.config.decoder import DecoderConfig, YarnScaling
from kernels.backend import apply

Rope = tuple[Tensor, ...]  # cos and sin, float32 (T, E); then those of queries, where they differ


def decoder_rope(config: DecoderConfig, position: Tensor) -> Rope:
    """What the attention of a decoder turns keys and queries with, of positions (T,) or (3, T)."""
    of_pairs = positions_of_pairs(config, position)
    cos_TE, sin_TE = rope_table(rope_frequencies(config, position.device), of_pairs)
    if config.yarn is None:
        return cos_TE, sin_TE
    cos_TE, sin_TE = cos_TE * config.yarn.attention_factor, sin_TE * config.yarn.attention_factor
    if not config.query_growth:
        return cos_TE, sin_TE
    contexts_T = position.double().div(config.yarn.original_max_position).floor()
    growth_T1 = (1 + config.query_growth * contexts_T.log1p()).float()[:, None]
    return cos_TE, sin_TE, cos_TE * growth_T1, sin_TE * growth_T1


def window_rope(config: DecoderConfig, position: Tensor) -> Rope | None:
    """That of layers with a sliding window, if it is another one: plain frequencies of a base of their own."""
    if config.window_rope_theta is None:
        return None
    frequency = _plain_frequencies(config, config.window_rope_theta, position.device)
    return rope_table(frequency, positions_of_pairs(config, position))


def rope_frequencies(config: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of dimensions, radians, float64 (E / 2,).

    theta^(-2i / E); with Llama-3 scaling wavelengths longer than original / low are stretched by ``factor``, those
    shorter than original / high are kept, and those between are blended (Llama 3.1, reference implementation). YaRN
    blends by the number of a pair instead of its wavelength (Peng et al. 2023, section 3.2). ``rope_stretch`` divides
    all of them.
    """
    frequency = _plain_frequencies(config, config.rope_theta, device) / config.rope_stretch
    if config.yarn is not None:
        return _mixed(frequency, config.yarn.factor, _kept_by_yarn(config, config.yarn, frequency))
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # full turns within the original context
    width = scaling.high_freq_factor - scaling.low_freq_factor
    return _mixed(frequency, scaling.factor, ((turns - scaling.low_freq_factor) / width).clamp(0, 1))


def _plain_frequencies(config: DecoderConfig, theta: float, device: torch.device | None) -> Tensor:
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    return theta**-exponent


def _mixed(frequency: Tensor, factor: float, kept: Tensor) -> Tensor:
    return kept * frequency + (1 - kept) * frequency / factor


def _kept_by_yarn(config: DecoderConfig, yarn: YarnScaling, frequency: Tensor) -> Tensor:
    """How much of each pair's frequency is kept: 1 up to the last pair that turns ``beta_fast`` times within the
    original context, 0 from the first on that turns ``beta_slow`` times, falling evenly between."""

    def pair_of(turns: float) -> float:
        wavelength = yarn.original_max_position / turns
        return config.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_of(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_of(yarn.beta_slow)), config.head_dim - 1)
    pair = torch.arange(len(frequency), device=frequency.device)
    return 1 - ((pair - first) / (last - first or 1e-3)).clamp(0, 1)


def positions_of_pairs(config: DecoderConfig, position: Tensor) -> Tensor:
    """The position that each pair of dimensions turns with, (T, E / 2), of positions (3, T); positions (T,), with which
    all of them turn, stay as they are.

    With sections [a, b, c] the first a pairs turn with the time, the next b with the line, the last c with the column.
    Interleaved (Qwen3-VL), of every three pairs the second turns with the line, in b of them, and the third with the
    column, in c of them; all others turn with the time.
    """
    if position.ndim == 1:
        return position
    assert config.mrope_sections is not None, "positions on three axes need a decoder with mrope_sections"
    of_time, of_line, of_column = config.mrope_sections
    pair = torch.arange(config.head_dim // 2, device=position.device)
    if config.mrope_interleaved:
        turn = pair % 3
        axis = turn.where(pair < 3 * torch.where(turn == 1, of_line, of_column), 0)
    else:
        axis = (pair >= of_time).long() + (pair >= of_time + of_line)
    return position.index_select(0, axis).T


def rope_table(frequency: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, float32 (T, E), of positions (T,) or (T, E / 2): both halves of a head share
    the angles, and the sin of the first half is negated, as ``rotate`` needs it."""
    position = position[:, None] if position.ndim == 1 else position
    angle_TE = (position.double() * frequency).repeat(1, 2)
    sin_TE = angle_TE.sin().float()
    sin_TE.chunk(2, dim=-1)[0].neg_()
    return angle_TE.cos().float(), sin_TE


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary positions, "rotate half" layout of Hugging Face checkpoints: (a, b) -> (a cos - b sin, b cos + a sin).
    The products are float32; eager PyTorch rounds the first of them before it adds the second."""
    if not torch.compiler.is_compiling():
        return apply(_Rotation, x_THE, cos_TE, sin_TE)
    # The formula itself: a compiler makes one pass of it, and (torch 2.11) loses the gradient of the Function.
    ab_THE = x_THE.to(cos_TE.dtype)
    ba_THE = ab_THE.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (ab_THE * cos_TE[:, None] + ba_THE * sin_TE[:, None]).to(x_THE.dtype)


class _Rotation(torch.autograd.Function):
    """The same in few passes: the second product is added to the first, which lies in the dtype of x. Nothing of x is
    kept for the gradient, which is turned back by the same angle."""

    @staticmethod
    def forward(x_THE, cos_TE, sin_TE):
        return _turned(x_THE, cos_TE, sin_TE, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_THE):
        return _turned(dy_THE, *ctx.saved_tensors, -1), None, None


def _turned(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, direction: int) -> Tensor:
    y_THE = torch.mul(x_THE, cos_TE[:, None], out=torch.empty_like(x_THE))
    a, b = x_THE.chunk(2, dim=-1)
    y_a, y_b = y_THE.chunk(2, dim=-1)
    sin_a, sin_b = sin_TE[:, None].chunk(2, dim=-1)
    y_a.addcmul_(b, sin_a, value=direction)
    y_b.addcmul_(a, sin_b, value=direction)
    return y_THE
