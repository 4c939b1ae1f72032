"""What autograd keeps of a block and of a projector if nothing is recomputed. A new type of either is named here, or
refused.

D width   F intermediate width   Q, K width of all query heads, of all key heads   c bytes of a number in compute
"""

import math

from avlm.config.connector import ResamplerConfig
from avlm.config.decoder import DecoderConfig, ExpertsConfig
from avlm.config.model import AudioConfig, ProjectorConfig, TextConfig, VisionConfig
from avlm.preflight.layout import Layout

# What the MLP of a tower keeps in multiples of its width: inputs and results of the operations.
KEPT_BY_ACTIVATION = {"quick_gelu": 3, "gelu": 2, "gelu_tanh": 2, "silu": 2}


def decoder_block_bytes(
    decoder: DecoderConfig, experts: ExpertsConfig | None, layout: Layout, trains: bool, norms_train: bool
) -> int:
    """What a block, with experts or without, keeps for each token if nothing is recomputed. Frozen weights need no
    inputs of products."""
    c = layout.dtype.itemsize
    t = layout.tensor
    D = decoder.hidden_size
    F = decoder.intermediate_size
    Q = decoder.num_heads * decoder.head_dim // t
    K = decoder.num_kv_heads * decoder.head_dim // t
    of_norm = rms_norm_bytes(layout, norms_train, decoder.norm_offset)
    num_norms = 4 if decoder.post_norms else 2
    norms = num_norms * of_norm * D // t
    if decoder.qk_norm:
        norms += of_norm * (Q + K)
    num_keys = num_outs = num_lse = 1
    mode = layout.context_mode if layout.context > 1 else "none"
    if mode in ("ulysses", "ulysses_ring"):
        num_outs += trains
    if mode == "allgather":
        num_keys = layout.context
        num_outs += 1 + trains
        num_lse = 2
    lse = 4 * decoder.num_heads // t
    attention = c * (Q + 2 * K * num_keys + Q * num_outs) + lse * num_lse
    products = D * trains  # the input of q, k, v
    if experts is None:
        return norms + attention + c * (products + D * trains + (3 + trains) * F // t)  # gate, up, silu, product
    return norms + attention + c * products + experts_bytes(decoder, experts, layout, trains) // t


def cross_block_bytes(
    decoder: DecoderConfig, qk_norm: bool, layout: Layout, trains: bool, norms_train: bool
) -> tuple[int, int]:
    """(for each token, for each feature that it may read) what a layer of cross-attention keeps if nothing is
    recomputed. Gates need what they scale."""
    c, t = layout.dtype.itemsize, layout.tensor
    D, F = decoder.hidden_size, decoder.intermediate_size
    Q, K = (heads * decoder.head_dim // t for heads in (decoder.num_heads, decoder.num_kv_heads))
    of_norm = rms_norm_bytes(layout, norms_train)
    of_token = 2 * of_norm * D // t + of_norm * Q * qk_norm + 4 * decoder.num_heads // t
    of_token += c * (2 * Q + 2 * D * trains + (3 + trains) * F // t + 2 * D * trains // t)
    return of_token, c * 2 * K + of_norm * K * qk_norm


def resampler_bytes(config: ResamplerConfig, tower_size: int, longest: int, layout: Layout) -> tuple[int, int]:
    """(for each query, for each row that it reads) what a resampler that trains keeps. ``longest``: rows of an item."""
    c = layout.dtype.itemsize
    if config.type == "conformer":
        sizes = config.width(tower_size), config.intermediate_size, config.num_heads
        return 0, config.num_layers * conformer_block_bytes(*sizes, longest, layout) + c * tower_size
    D, A = config.width(tower_size), config.attention_size(tower_size)
    K = A * (config.num_kv_heads or config.num_heads) // config.num_heads
    of_norm = rms_norm_bytes(layout, True) if config.norm == "rms" else c  # LayerNorm: its input
    mlp = (2 - (config.activation == "relu") + 2 * config.gated) * config.intermediate_size + D  # ReLU: its result
    reading = 2 * A + D
    if config.type == "qformer":
        num_reading = math.ceil(config.num_layers / config.read_every)
        of_query = config.num_layers * (c * (5 * D + mlp) + 2 * of_norm * D + 4 * config.num_heads)
        of_query += num_reading * (c * reading + of_norm * D + 4 * config.num_heads)
        return of_query, c * 2 * A * num_reading
    joined = D + 2 * K  # normed rows and queries, keys and values of both
    of_query = c * (reading + joined + mlp) + (2 * of_norm) * D + 4 * config.num_heads
    return config.num_layers * of_query + of_norm * D, config.num_layers * (c * joined + of_norm * D)


def experts_bytes(decoder: DecoderConfig, experts: ExpertsConfig, layout: Layout, trains: bool) -> int:
    """What a mixture of experts keeps for each of a rank's own tokens."""
    c = layout.dtype.itemsize
    D, F, N, K = decoder.hidden_size, experts.intermediate_size, experts.num, experts.per_token
    rows, collected = expert_rows(experts, layout)
    routing = 4 * N + (4 + 8) * K + 17 * collected + 8 * rows  # p, w and its index, an order
    in_experts = rows * (D * trains + (3 + trains) * F) + collected * D  # input; gate, up, silu, product; outputs
    shared = 0
    if experts.shared_size:
        S = experts.shared_size
        shared = 2 * (D * trains) + (3 + trains) * S + D + 1 + D
    return routing + c * (D * trains + in_experts + shared)


def expert_rows(experts: ExpertsConfig | None, layout: Layout) -> tuple[int, int]:
    """Rows that a rank has for each of its own tokens: assignments that it makes room for, and outputs that it
    collects, computed or not. With an exchange as many as it has itself, if experts are as busy as each other."""
    if experts is None:
        return 0, 0
    if layout.expert_mode == "gather":
        most = min(experts.per_token, experts.num // layout.expert)
        return layout.expert * most, layout.expert * experts.per_token
    return experts.per_token, experts.per_token


def feed_forward_numbers(decoder: DecoderConfig, experts: ExpertsConfig | None, layout: Layout) -> int:
    """Gradients of activations for each token, while the backward of a feed-forward part is at work: of gate, up and
    their product; of experts also of the copies of tokens, and of outputs."""
    if experts is None:
        return 3 * decoder.intermediate_size // layout.tensor
    rows, collected = expert_rows(experts, layout)
    of_experts = rows * (3 * experts.intermediate_size + decoder.hidden_size) + collected * decoder.hidden_size
    return (of_experts + 3 * experts.shared_size) // layout.tensor


def rms_norm_bytes(layout: Layout, trains: bool, offset: bool = False) -> int:
    """What an RMSNorm keeps of each number: its input, in float32 if 1 is added to the scale (``offset``); on a CPU a
    float32 copy of it, and for the gradient of the scale what is scaled."""
    kept = 4 if offset else layout.dtype.itemsize
    return kept if layout.on_gpu else 4 + 4 * trains


def encoder_block_bytes(
    tower: VisionConfig | AudioConfig | TextConfig, layout: Layout, norms_train: bool, scales_train: bool = False
) -> int:
    """What a block of a tower that trains keeps for each of its rows if nothing is recomputed."""
    is_vision = isinstance(tower, VisionConfig)
    c = layout.dtype.itemsize
    if isinstance(tower, AudioConfig) and tower.block == "conformer":
        sizes = tower.hidden_size, tower.intermediate_size, tower.num_heads
        return conformer_block_bytes(*sizes, tower.num_rows, layout)
    activation = "gelu" if isinstance(tower, AudioConfig) else tower.activation
    if activation not in KEPT_BY_ACTIVATION:
        raise ValueError(f"what the activation {activation} keeps is not written in avlm/preflight/activations.py")
    of_norm = rms_norm_bytes(layout, norms_train) if is_vision and tower.norm == "rms" else c  # LayerNorm: its input
    in_mlp = KEPT_BY_ACTIVATION[activation]
    if is_vision and tower.gated:
        in_mlp += 2  # up, and the product
    in_attention = 6 * tower.hidden_size  # inputs of q, k, v and of the MLP; q, k, v, and the input of o
    if scales_train:
        in_attention += 2 * tower.hidden_size  # what is scaled
    norms = 2 * of_norm
    if is_vision and tower.qk_norm:
        norms += 2 * rms_norm_bytes(layout, norms_train)
    return norms * tower.hidden_size + c * (in_attention + in_mlp * tower.intermediate_size) + 4 * tower.num_heads


def conformer_block_bytes(
    hidden_size: int, intermediate_size: int, num_heads: int, longest: int, layout: Layout
) -> int:
    """The same of a Conformer block, whose segments have ``longest`` rows: a bias for each pair of a segment is kept.

    Each norm keeps its input, each linear its input; attention q with either bias, k, v and lse; the convolution both
    halves of its GLU, its input with the gaps, its result before it is scaled and after, and where each row lies.
    """
    in_attention = 6 * hidden_size + num_heads * longest  # with the inputs of q, k, v and of o
    in_convolution = 7 * hidden_size  # with the inputs of both linears
    in_ffn = hidden_size + 2 * intermediate_size
    numbers = 5 * hidden_size + in_attention + in_convolution + 2 * in_ffn
    return layout.dtype.itemsize * numbers + 4 * num_heads + 8


def stem_kept(tower: VisionConfig | AudioConfig) -> tuple[int, int]:
    """For each row of a tower: bytes that arrive, or are made of what arrives; and numbers that autograd keeps outside
    of the blocks."""
    if isinstance(tower, VisionConfig):
        pixels = tower.patch_numbers  # uint8
        places = 0
        if tower.any_grid:
            places += 2 * 4  # line and column
        if tower.any_grid and tower.num_rows:
            num_taps = 4 if tower.position_table == "bilinear" else 1
            places += num_taps * (8 + 4)  # rows of the position table and their weights
        if tower.axial_rope:
            places += 2 * 4 * tower.head_dim  # cos and sin
        return pixels + places, pixels + 2 * tower.hidden_size  # patches, and the first norm
    mels = math.ceil(tower.num_mels * tower.frames_together / tower.rows_together)  # float32
    if tower.stem == "depthwise":
        written = tower.stem_counts(tower.frames_together)
        per_row = written["halved_1"] + 2 * (written["halved_2"] + written["halved_3"])  # ReLUs, and depthwise ones
        return 4 * mels, mels + tower.stem_width * (per_row + tower.stem_bins)  # and the rows that stem_out takes
    if tower.stem == "conv2d":
        written = tower.stem_counts(tower.frames_together)
        per_piece = 2 * tower.stem_width * sum(written[f"halved_{n}"] for n in (1, 2, 3))  # with their GELUs
        return 4 * mels, mels + math.ceil(per_piece / tower.rows_together) + 2 * tower.hidden_size
    return 4 * mels, mels + 6 * tower.hidden_size  # convolutions with their GELUs, and the last norm


def projector_numbers(
    projector: ProjectorConfig, width: int, tower_size: int, decoder: DecoderConfig, num_deep: int = 0
) -> int:
    """Numbers that a projector keeps for the backward, for each row that it makes: the tower rows of ``tower_size``
    numbers, side by side ``width``; what its type adds; and for each of ``num_deep`` inner layers (DeepStack) the tower
    rows, these side by side and normalised, both sides of a GELU, and the feature itself, which waits for its layer of
    the decoder. ValueError for a type that is not known here."""
    F = projector.hidden_size or decoder.hidden_size
    numbers = {
        "linear": decoder.hidden_size,  # its output
        "mlp2x_gelu": F if projector.is_fused else 2 * F + decoder.hidden_size,  # the input of its GELU; else as below
        "swiglu": 4 * F + decoder.hidden_size,  # gate, its silu, up, their product; the output
    }
    if projector.type not in numbers:
        raise ValueError(
            f"what a projector of type {projector.type} keeps is not written in avlm/preflight/activations.py"
        )
    taken = tower_size if projector.takes_mean or projector.merge else width  # by the first linear of the type
    sizes = {"norm": width, "feature_norm": taken, "hidden_norm": F, "output_norm": decoder.hidden_size}
    normed = sum(size for norm, size in sizes.items() if getattr(projector, norm) != "none")  # the result of each
    before = width * projector.merge  # rows side by side
    return before + taken + normed + numbers[projector.type] + num_deep * (3 * width + 2 * F + decoder.hidden_size)
