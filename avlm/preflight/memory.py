"""What a rank holds in memory, estimated from the config alone: before any process group, weight or device is there.

What stays is exact: float32 shards of weights, gradients and AdamW's two moments, dim 0 padded by FSDP to a multiple of
its ranks. What comes and goes is taken at the worst of these moments, of which only one can be:

    a tower at work    its weights are gathered, its own activations are kept if it trains
    head               all activations are kept; a chunk of logits, the gradient of the head in the making
    decoder block      the first of the backward: all activations are kept; gradients on their way to their shards

A unit that is gathered is there twice: as it arrives and as it is used, or with the block that is fetched ahead.

Activations are what autograd keeps on a GPU, with the Triton kernels: attention keeps q, k, v, out (shared with the
product behind it) and lse. The plain path keeps a second out. Assumed: every token has a target, and a row is full of
images or of whole windows of sound, whichever takes more. Memory of CUDA, NCCL and of fragmentation is not in it.

D width   F intermediate width   Q, K width of all query heads, of all key heads   c bytes of a number in compute
"""

import math
from dataclasses import dataclass

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import Config, Recompute, StageConfig
from avlm.models.freezing import trained_names, trained_shapes
from avlm.models.log_mel import window_rows
from avlm.models.lora import frozen_base
from avlm.models.shapes import Shapes
from avlm.parallel.tensor import tensor_share
from avlm.preflight.layout import Layout, layout_of
from kernels.cross_entropy import CHUNK_BYTES, CHUNK_ROWS

GIB, MIB = 2**30, 2**20
NOTES = {
    "parameters": "float32 (lora.base=bf16: adapted towers in bf16), sharded; replicated towers whole",
    "gradients": "float32, sharded",
    "optimizer state": "two moments, float32, sharded",
    "whole gradients": "train.accumulate_mode=local: float32, not sharded",
    "gathered weights": "in the compute dtype, at the worst moment",
    "gradients in reduction": "of what was just computed",
    "activations": "what train.recompute keeps",
    "at work": "one block: activations made again, and gradients of activations",
    "head": "hidden rows, a chunk of logits, gradient of the head",
    "block inputs": "train.offload_activations",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes of the rank that holds most. ``moment`` says when."""

    device: dict[str, int]
    host: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.device.values())


def estimate(config: Config, stage: StageConfig, world_size: int, shapes: Shapes) -> Estimate:
    """What a rank holds at the worst moment of a stage."""
    layout = layout_of(config, world_size)
    stays = resident(config, stage, layout, shapes)
    moments = {
        f"{name} tower": _at_tower(name, config, stage, layout, shapes)
        for name in ("vision", "audio")
        if getattr(config.model, name) is not None
    }
    moments |= {
        "head": _at_head(config, stage, layout, shapes),
        "decoder block": _at_block(config, stage, layout, shapes),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device, host = {**stays, **moments[moment]}, {}
    if config.parallel.cpu_offload:
        host = {name: device.pop(name) for name in ("parameters", "gradients", "optimizer state")}
    if config.train.offload_activations:
        host["block inputs"] = _kept(config, stage, layout, shapes)[1]
    return Estimate(device, host, moment)


# 1. What stays.


def resident(config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> dict[str, int]:
    """Exact bytes of the rank with the largest shards, without AdamW's step counts (4 bytes a parameter tensor)."""
    found = {"parameters": 0, "gradients": 0, "optimizer state": 0, "whole gradients": 0}
    trained = trained_names(stage, config.model, shapes)
    halved = frozen_base(shapes) if config.model.lora and config.model.lora.base == "bf16" else ()
    is_local = config.train.accumulate_mode == "local" and config.train.accumulate > 1
    for name, shape in shapes.items():
        part = name.split(".")[0]
        rows, *others = tensor_share(name, shape, layout.tensor)
        if part in ("vision", "audio") and config.parallel.tower_sharding == "replicate":
            found["parameters"] += math.prod(shape) * layout.dtype.itemsize
            continue
        local = -(-rows // layout.shards_of(part)) * math.prod(others)
        found["parameters"] += (2 if name in halved else 4) * local
        if name in trained:
            found["gradients"] += 4 * local
            found["optimizer state"] += 8 * local
            found["whole gradients"] += 4 * rows * math.prod(others) * is_local
    return found


def _count(shapes: Shapes, prefix: str, tensor: int = 1) -> int:
    """Numbers in the parameters whose names begin so."""
    return sum(math.prod(tensor_share(name, s, tensor)) for name, s in shapes.items() if name.startswith(prefix))


# 2. What comes and goes.


def _at_block(config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> dict[str, int]:
    c, decoder = layout.dtype.itemsize, config.model.decoder
    block = _count(shapes, "decoder.blocks.0.", layout.tensor)
    head = _count(shapes, "decoder.head.", layout.tensor)
    kept, _ = _kept(config, stage, layout, shapes)
    trained = trained_shapes(config, stage, shapes)
    learned = lambda prefix: _count(trained, f"decoder.{prefix}.", layout.tensor)
    # The head's gradient is still on its way when the last block is done; a tied one waits for the embedding's.
    waiting = 4 * max(learned("blocks.0"), learned("head")) + (c * learned("embedding") if not head else 0)
    tokens = stage.data.seq_length // layout.context
    of_block = lambda mode: block_bytes("decoder", config, layout, mode, trained)
    again = of_block("none") - of_block(config.train.recompute.decoder)
    gradients = c * (3 * decoder.intermediate_size // layout.tensor + 2 * decoder.hidden_size)
    return {
        "gathered weights": _held(config, layout, shapes) + layout.gathered("decoder") * block,
        "gradients in reduction": c * learned("blocks.0") + waiting,
        "activations": kept,
        "at work": tokens * (again + gradients),
    }


def _at_head(config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> dict[str, int]:
    """As ``kernels.cross_entropy`` keeps it: losses, logits a chunk of rows at a time, the gradient of the weight."""
    c, decoder = layout.dtype.itemsize, config.model.decoder
    tokens, D, V = stage.data.seq_length // layout.context, decoder.hidden_size, decoder.vocab_size // layout.tensor
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (V * c)))
    weight = 0
    if f"decoder.{'embedding' if decoder.tie_embedding else 'head'}.weight" in trained_shapes(config, stage, shapes):
        rows = max(rows, D)
        weight = V * D * (4 if rows < tokens else c)  # as it is summed
    copied = V * D * c if rows < tokens and weight and c < 4 else 0
    hidden = tokens * D * (4 + 4 * c)  # x, its float32 copy, the norm's two results, the gradient of hidden
    kept, _ = _kept(config, stage, layout, shapes)
    unit = _count(shapes, "decoder.head.", layout.tensor)
    return {
        "gathered weights": _held(config, layout, shapes) + layout.gathered("decoder") * unit,
        "activations": kept,
        "head": hidden + weight + max(min(rows, tokens) * V * c, copied),
    }


def _at_tower(name: str, config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> dict[str, int]:
    c, tower, sharding = layout.dtype.itemsize, getattr(config.model, name), config.parallel.tower_sharding
    whole, block = _count(shapes, f"{name}."), _count(shapes, f"{name}.blocks.0.")
    trained = trained_shapes(config, stage, shapes)
    gathered = reduction = 0
    if sharding == "unit":
        gathered = layout.gathered(name) * whole
        reduction = max(0, (c + 4) * _count(trained, f"{name}.") - gathered)  # the weights are freed before
    if sharding == "block":
        gathered = layout.gathered(name) * block + c * (whole - block * _num_blocks(tower))
        reduction = (c + 4) * _count(trained, f"{name}.blocks.0.")
    D, F = tower.hidden_size, tower.intermediate_size
    of_block = lambda mode: block_bytes(name, config, layout, mode, trained)
    again = of_block("none") - of_block(getattr(config.train.recompute, name))
    work = again + c * (2 * D + 3 * F)
    tokens = _media_tokens(name, config.model, stage, layout)
    return {
        "gathered weights": _held(config, layout, shapes) + gathered,
        "gradients in reduction": reduction,
        "activations": _kept_by_tower(name, config, stage, layout, shapes)[0],
        "at work": tokens * work,
    }


def _held(config: Config, layout: Layout, shapes: Shapes) -> int:
    """Weights that stay gathered from their forward to their backward, whatever else is."""
    numbers = _count(shapes, "vision_projector.") + _count(shapes, "audio_projector.")
    if config.model.decoder.tie_embedding:  # the root's own
        numbers += _count(shapes, "decoder.embedding.", layout.tensor)
    if not config.parallel.reshard:
        numbers += _count(shapes, "decoder.blocks.", layout.tensor)
        if not config.model.decoder.tie_embedding:
            numbers += _count(shapes, "decoder.embedding.", layout.tensor)
        if config.parallel.tower_sharding != "replicate":
            numbers += _count(shapes, "vision.") + _count(shapes, "audio.")
    return layout.dtype.itemsize * numbers


# 3. Activations.


def _kept(config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> tuple[int, int]:
    """(device, host) bytes of all that autograd keeps between forward and backward."""
    decoder, mode = config.model.decoder, config.train.recompute.decoder
    tokens = stage.data.seq_length // layout.context
    of_block = block_bytes("decoder", config, layout, mode, trained_shapes(config, stage, shapes))
    blocks = tokens * decoder.num_layers * of_block
    offloaded = mode == "full" and config.train.offload_activations
    host, device = (blocks, 0) if offloaded else (0, blocks)
    device += tokens * decoder.head_dim * 8  # cos and sin of the positions
    towers = [_kept_by_tower(name, config, stage, layout, shapes) for name in ("vision", "audio")]
    tower_device, tower_host = max(towers, key=sum)  # a row is full of the one or of the other
    return device + tower_device, host + tower_host


def _kept_by_tower(name: str, config: Config, stage: StageConfig, layout: Layout, shapes: Shapes) -> tuple[int, int]:
    """(device, host) bytes of a tower, its input and its projector, for a row full of its media."""
    tower, projector = getattr(config.model, name), getattr(config.model, f"{name}_projector")
    if tower is None:
        return 0, 0
    c, tokens = layout.dtype.itemsize, _media_tokens(name, config.model, stage, layout)
    is_vision = isinstance(tower, VisionConfig)
    inputs = 3 * tower.patch_size**2 if is_vision else 2 * tower.num_mels  # numbers for each row of the tower
    arrived = inputs if is_vision else 2 * window_rows(tower)
    device, host = 4 * arrived * tokens, 0
    trained = trained_shapes(config, stage, shapes)
    trains, projector_trains = (_count(trained, f"{part}.") > 0 for part in (name, f"{name}_projector"))
    if trains:
        mode = getattr(config.train.recompute, name)
        stem = 2 if is_vision else 6  # patches and first norm; convolutions with their GELUs, and last norm
        blocks = tokens * _num_blocks(tower) * block_bytes(name, config, layout, mode, trained)
        offloaded = mode == "full" and config.train.offload_activations
        host, blocks = (blocks, 0) if offloaded else (0, blocks)
        device += blocks + c * tokens * (inputs + stem * tower.hidden_size)
    if trains or projector_trains:
        features = stage.data.seq_length // layout.row_ranks
        gathered = projector.downsample ** (2 if is_vision else 1)
        device += c * features * projector_numbers(projector, gathered * tower.hidden_size, config.model.decoder)
    return device, host


def projector_numbers(projector: ProjectorConfig, width: int, decoder: DecoderConfig) -> int:
    """Numbers that a projector keeps for the backward, per feature: the tower rows, ``width``, and its output (linear)
    or the input of its GELU (mlp2x_gelu)."""
    hidden = projector.hidden_size or decoder.hidden_size
    return width + {"linear": decoder.hidden_size, "mlp2x_gelu": hidden}[projector.type]


def block_bytes(name: str, config: Config, layout: Layout, mode: Recompute, trained: Shapes) -> int:
    """What a block of a tower keeps for each row, its adapters included."""
    c, tower, lora = layout.dtype.itemsize, getattr(config.model, name), config.model.lora
    trains = _count(trained, f"{name}.") > 0
    if name == "decoder":
        size = decoder_block_bytes(tower, layout, mode, trains)
    else:
        size = encoder_block_bytes(tower, layout, mode) * trains
    for parameter, shape in trained.items() if mode == "none" else ():
        if parameter.startswith(f"{name}.blocks.0.") and parameter.endswith("lora_down.weight"):
            size += c * shape[0] + (lora.dropout > 0) * (c + 1) * shape[1]  # x @ A.T; what was dropped, and where
        if parameter.startswith(f"{name}.blocks.0.") and parameter.endswith("lora_magnitude"):
            size += c * shape[0]  # what it scales
    return size


def decoder_block_bytes(decoder: DecoderConfig, layout: Layout, mode: Recompute, trains: bool) -> int:
    """What a block keeps for each token of the rank's part of a row. Frozen weights need no inputs of products."""
    c, t = layout.dtype.itemsize, layout.tensor
    D, F = decoder.hidden_size, decoder.intermediate_size
    Q, K = decoder.num_heads * decoder.head_dim // t, decoder.num_kv_heads * decoder.head_dim // t
    if mode == "full":
        return c * D // t
    lse = 4 * decoder.num_heads // t
    if mode == "selective":  # input, products q, v, gate and (whole rows, before their sum over t) down; attention
        return c * (D // t + Q + K + F // t + D + Q) + lse
    norms = 2 * (4 * D + c * D * trains) // t  # the float32 copy, and the normed before its scale
    if decoder.qk_norm:
        norms += (4 + c * trains) * (Q + K)
    out, keys = {"ring": (1, 1), "ulysses": (1 + trains, 1), "allgather": (2 + trains, layout.context)}[
        layout.context_mode if layout.context > 1 else "ring"
    ]
    attention = c * (Q + 2 * K * keys + Q * out) + lse * (2 if keys > 1 else 1)
    products = 2 * D * trains + (3 + trains) * F // t  # inputs of q, k, v and of gate, up; gate, up, silu, product
    return norms + attention + c * products


def encoder_block_bytes(tower: VisionConfig | AudioConfig, layout: Layout, mode: Recompute) -> int:
    """What a block of a tower that trains keeps for each of its rows."""
    c, D, F = layout.dtype.itemsize, tower.hidden_size, tower.intermediate_size
    if mode == "full":
        return c * D
    if mode == "selective":  # input, products q, v and up; attention
        return c * (4 * D + F) + 4 * tower.num_heads
    gelu = 3 if getattr(tower, "activation", "gelu") == "quick_gelu" else 2  # it is three operations
    return c * (8 * D + gelu * F) + 4 * tower.num_heads


def _num_blocks(tower: VisionConfig | AudioConfig) -> int:
    return tower.num_layers + (1 + tower.feature_layer if isinstance(tower, VisionConfig) else 0)


def _media_tokens(name: str, model: ModelConfig, stage: StageConfig, layout: Layout) -> int:
    """Rows of a tower on the rank with most, of a row full of its media."""
    rows, features = media_rows(name, model)
    return -(-(stage.data.seq_length // features) // layout.row_ranks) * rows


def media_rows(name: str, model: ModelConfig) -> tuple[int, int]:
    """(rows in the tower, rows in the decoder) of an image, or of a whole window of sound."""
    if name == "vision":
        side = model.vision.patches_per_side // model.vision_projector.downsample
        return model.vision.num_patches + model.vision.class_token, side**2
    rows = model.audio.max_positions
    return rows, -(-rows // model.audio_projector.downsample)
