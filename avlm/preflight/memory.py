"""What a rank holds in memory, estimated from the config alone: before any process group, weight or device exists.

The resident part is exact: float32 shards of weights, gradients and AdamW's two moments, dim 0 padded by FSDP to a
multiple of its ranks. The transient part is that of the worst of these moments:

    a tower at work    its weights are gathered, its own activations are kept if it trains
    head               all activations are kept; a chunk of logits, the gradient of the head in the making
    decoder block      the first of the backward: all activations are kept; gradients on their way to their shards

A gathered unit counts twice: the all-gather buffer and the unsharded copy (or the prefetched next block).

Activations are what autograd keeps on a GPU, with the Triton kernels: attention keeps q, k, v, out (shared with the
next product) and lse. The plain path keeps a second out. Assumed: every token has a target, and a row is full of the
media of one modality, images or whole windows of audio, whichever takes more. Memory of CUDA, of NCCL and of
fragmentation is not included.

D width   F intermediate width   Q, K width of all query heads, of all key heads   c bytes of a number in compute
"""

import math
from dataclasses import dataclass
from functools import cached_property

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import Config, Recompute, StageConfig
from avlm.models.batch import FRAMES_PER_ROW
from avlm.models.costs import block_products
from avlm.models.freezing import trained_shapes
from avlm.models.lora import frozen_base
from avlm.models.shapes import Shapes
from avlm.parallel.recompute import keeps_product
from avlm.parallel.tensor import tensor_share
from avlm.preflight.layout import Layout, layout_of
from kernels.cross_entropy import chunk_rows

GIB, MIB = 2**30, 2**20
NOTES = {
    "parameters": "float32 (lora.base=bf16: adapted towers in bf16), sharded; replicated towers whole",
    "gradients": "float32, sharded",
    "optimizer state": "two moments, float32, sharded",
    "whole gradients": "train.accumulate_mode=local: float32, not sharded",
    "gathered weights": "in the compute dtype, at the worst moment",
    "gradients in reduction": "those of the last computed unit",
    "activations": "kept between forward and backward, see train.recompute",
    "at work": "one block: recomputed activations, and gradients of activations",
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


@dataclass(frozen=True)
class Case:
    """A stage of a run on a layout of ranks."""

    config: Config
    stage: StageConfig
    layout: Layout
    shapes: Shapes

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def itemsize(self) -> int:
        return self.layout.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens of a row on a rank."""
        return self.stage.data.seq_length // self.layout.context

    @cached_property
    def trained(self) -> Shapes:
        return trained_shapes(self.config, self.stage, self.shapes)

    def numbers(self, prefix: str) -> int:
        """Numbers in the parameters whose names begin so, on a rank of the tensor axis."""
        return _numbers(self.shapes, prefix, self.layout.tensor)

    def trained_numbers(self, prefix: str) -> int:
        return _numbers(self.trained, prefix, self.layout.tensor)


def _numbers(shapes: Shapes, prefix: str, tensor: int) -> int:
    held = [tensor_share(name, shape, tensor) for name, shape in shapes.items() if name.startswith(prefix)]
    return sum(math.prod(shape) for shape in held)


def estimate(config: Config, stage: StageConfig, world_size: int, shapes: Shapes) -> Estimate:
    """What a rank holds at the worst moment of a stage."""
    case = Case(config, stage, layout_of(config, world_size), shapes)
    moments = {f"{tower} tower": _at_tower(tower, case) for tower in config.model.modalities.values()}
    moments["head"] = _at_head(case)
    moments["decoder block"] = _at_block(case)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device = resident(case) | moments[moment]
    host = {}
    if config.parallel.cpu_offload:
        host = {name: device.pop(name) for name in ("parameters", "gradients", "optimizer state")}
    if config.train.offload_activations:
        host["block inputs"] = _kept(case)[1]
    return Estimate(device, host, moment)


# 1. What stays.


def resident(case: Case) -> dict[str, int]:
    """Exact bytes of the rank with the largest shards, without AdamW's step counts (4 bytes a parameter tensor)."""
    found = {"parameters": 0, "gradients": 0, "optimizer state": 0, "whole gradients": 0}
    config, layout = case.config, case.layout
    halved, replicated = set(), set()
    if case.model.lora and case.model.lora.base == "bf16":
        halved = frozen_base(case.shapes)
    if config.parallel.tower_sharding == "replicate":
        replicated = set(case.model.modalities.values())
    is_local = config.train.accumulate_mode == "local" and config.train.accumulate > 1
    for name, shape in case.shapes.items():
        module = name.split(".")[0]
        if module in replicated:
            found["parameters"] += math.prod(shape) * case.itemsize
            continue
        rows, *others = tensor_share(name, shape, layout.tensor)
        local = math.ceil(rows / layout.shards_of(module)) * math.prod(others)
        found["parameters"] += (2 if name in halved else 4) * local
        if name in case.trained:
            found["gradients"] += 4 * local
            found["optimizer state"] += 8 * local
            if is_local:
                found["whole gradients"] += 4 * rows * math.prod(others)
    return found


# 2. What comes and goes.


def _at_block(case: Case) -> dict[str, int]:
    c, layout, decoder = case.itemsize, case.layout, case.model.decoder
    # The head's gradient is still on its way when the last block is done; a tied one waits for the embedding's.
    block_gradient = case.trained_numbers("decoder.blocks.0.")
    waiting = 4 * max(block_gradient, case.trained_numbers("decoder.head."))
    if decoder.tie_embedding:
        waiting += c * case.trained_numbers("decoder.embedding.")
    kept, _ = _kept(case)
    gradients = c * (3 * decoder.intermediate_size // layout.tensor + 2 * decoder.hidden_size)
    return {
        "gathered weights": _held(case) + layout.gathered("decoder") * case.numbers("decoder.blocks.0."),
        "gradients in reduction": c * block_gradient + waiting,
        "activations": kept,
        "at work": case.tokens * (_recomputed("decoder", case) + gradients),
    }


def _at_head(case: Case) -> dict[str, int]:
    """What ``kernels.cross_entropy`` holds: losses, logits a chunk of rows at a time, the gradient of the weight."""
    c, tokens, decoder = case.itemsize, case.tokens, case.model.decoder
    D, V = decoder.hidden_size, decoder.vocab_size // case.layout.tensor
    weight = "decoder.embedding.weight" if decoder.tie_embedding else "decoder.head.weight"
    trains = weight in case.trained
    rows = chunk_rows(V, D, c, trains)
    gradient = copied = 0
    if trains and rows >= tokens:
        gradient = V * D * c
    elif trains:  # it is summed in float32, and copied into its own dtype in the end
        gradient = V * D * 4
        copied = V * D * c if c < 4 else 0
    hidden = tokens * D * (4 + 4 * c)  # x, its float32 copy, the norm's two results, the gradient of hidden
    logits = min(rows, tokens) * V * c
    kept, _ = _kept(case)
    return {
        "gathered weights": _held(case) + case.layout.gathered("decoder") * case.numbers("decoder.head."),
        "activations": kept,
        "head": hidden + gradient + max(logits, copied),
    }


def _at_tower(name: str, case: Case) -> dict[str, int]:
    c, layout, tower = case.itemsize, case.layout, getattr(case.model, name)
    sharding = case.config.parallel.tower_sharding
    whole, block = case.numbers(f"{name}."), case.numbers(f"{name}.blocks.0.")
    gathered = reduction = 0
    if sharding == "unit":
        gathered = layout.gathered(name) * whole
        reduction = max(0, (c + 4) * case.trained_numbers(f"{name}.") - gathered)  # the weights are freed before
    if sharding == "block":
        gathered = layout.gathered(name) * block + c * (whole - block * tower.num_blocks)
        reduction = (c + 4) * case.trained_numbers(f"{name}.blocks.0.")
    work = _recomputed(name, case) + c * (2 * tower.hidden_size + 3 * tower.intermediate_size)
    kept, _ = _kept_by_tower(name, case)
    return {
        "gathered weights": _held(case) + gathered,
        "gradients in reduction": reduction,
        "activations": kept,
        "at work": _media_rows(name, case) * work,
    }


def _held(case: Case) -> int:
    """Weights that stay gathered from their forward to their backward, whatever else is."""
    parallel, towers = case.config.parallel, case.model.modalities.values()
    is_tied = case.model.decoder.tie_embedding  # then the embedding belongs to the root, which stays gathered
    held = [f"{tower}_projector." for tower in towers]
    if is_tied or not parallel.reshard:
        held.append("decoder.embedding.")
    if not parallel.reshard:
        held.append("decoder.blocks.")
    if not parallel.reshard and parallel.tower_sharding != "replicate":
        held += [f"{tower}." for tower in towers]
    return case.itemsize * sum(case.numbers(prefix) for prefix in held)


# 3. Activations.


def _kept(case: Case) -> tuple[int, int]:
    """(device, host) bytes of all that autograd keeps between forward and backward."""
    decoder = case.model.decoder
    device, host = _kept_by_blocks("decoder", case.tokens * decoder.num_layers, case)
    device += case.tokens * decoder.head_dim * 8  # cos and sin of the positions
    by_towers = [_kept_by_tower(tower, case) for tower in case.model.modalities.values()]
    tower_device, tower_host = max(by_towers, key=sum, default=(0, 0))  # a row is full of one modality
    return device + tower_device, host + tower_host


def _kept_by_tower(name: str, case: Case) -> tuple[int, int]:
    """(device, host) bytes of a tower, its input and its projector, for a row full of its media."""
    tower, projector = getattr(case.model, name), getattr(case.model, f"{name}_projector")
    c, rows = case.itemsize, _media_rows(name, case)
    arriving, stem = _stem(tower)
    device, host = arriving * rows, 0
    trains = case.trained_numbers(f"{name}.") > 0
    if trains:
        blocks, host = _kept_by_blocks(name, rows * tower.num_blocks, case)
        device += blocks + c * stem * rows
    if trains or case.trained_numbers(f"{name}_projector.") > 0:
        features = case.stage.data.seq_length // case.layout.row_ranks
        width = tower.rows_per_feature(projector.downsample) * tower.hidden_size
        device += c * features * projector_numbers(projector, width, case.model.decoder)
    return device, host


def _stem(tower: VisionConfig | AudioConfig) -> tuple[int, int]:
    """For each row of a tower: bytes that arrive, and numbers that autograd keeps outside of the blocks."""
    if isinstance(tower, VisionConfig):
        pixels = 3 * tower.patch_size**2  # uint8
        return pixels, pixels + 2 * tower.hidden_size  # patches, and the first norm
    mels = FRAMES_PER_ROW * tower.num_mels  # float32
    return 4 * mels, mels + 6 * tower.hidden_size  # convolutions with their GELUs, and the last norm


def _kept_by_blocks(name: str, rows: int, case: Case) -> tuple[int, int]:
    """(device, host) bytes of the blocks of a module, for the rows of all blocks together."""
    mode = getattr(case.config.train.recompute, name)
    kept = rows * block_bytes(name, case, mode)
    if mode == "full" and case.config.train.offload_activations:
        return 0, kept
    return kept, 0


def _recomputed(name: str, case: Case) -> int:
    """Bytes for each row that come back when the backward recomputes a block."""
    mode = getattr(case.config.train.recompute, name)
    return block_bytes(name, case, "none") - block_bytes(name, case, mode)


def projector_numbers(projector: ProjectorConfig, width: int, decoder: DecoderConfig) -> int:
    """Numbers that a projector keeps for the backward, per feature: the tower rows, ``width``, and its output (linear)
    or the input of its GELU (mlp2x_gelu)."""
    hidden = projector.hidden_size or decoder.hidden_size
    return width + (decoder.hidden_size if projector.type == "linear" else hidden)


def block_bytes(name: str, case: Case, mode: Recompute) -> int:
    """What a block of a module keeps for each row, its adapters included."""
    trains = case.trained_numbers(f"{name}.") > 0
    if mode != "none":
        size = recomputing_block_bytes(name, case, mode)
    elif name == "decoder":
        size = decoder_block_bytes(case.model.decoder, case.layout, trains)
    else:
        size = encoder_block_bytes(getattr(case.model, name), case.layout)
    if name != "decoder" and not trains:  # no graph is built
        return 0
    if mode == "none":
        size += adapter_bytes(f"{name}.blocks.0.", case)
    return size


def adapter_bytes(block: str, case: Case) -> int:
    """What the adapters of a block keep for each row."""
    c, size = case.itemsize, 0
    for name, shape in case.trained.items():
        if not name.startswith(block):
            continue
        if name.endswith("lora_down.weight"):
            size += c * shape[0]  # x @ A.T
            if case.model.lora.dropout > 0:
                size += (c + 1) * shape[1]  # the dropped input, and its mask
        if name.endswith("lora_magnitude"):
            size += c * shape[0]  # the output that it scales
    return size


def recomputing_block_bytes(name: str, case: Case, mode: Recompute) -> int:
    """What a block keeps for each row: full, its input; selective, also attention and every second product."""
    c, module = case.itemsize, getattr(case.model, name)
    t, width = 1, module.hidden_size  # of attention over all heads
    if name == "decoder":
        t, width = case.layout.tensor, module.num_heads * module.head_dim
    size = c * module.hidden_size // t
    if mode == "full":
        return size
    for number, path in enumerate(block_products(name, case.model)):
        if keeps_product(number):
            weight = f"{path}.weight"
            outputs, _ = tensor_share(weight, case.shapes[weight], t)
            size += c * outputs  # a product that the ranks will sum has all of them
    lse = 4 * module.num_heads // t
    return size + c * width // t + lse


def decoder_block_bytes(decoder: DecoderConfig, layout: Layout, trains: bool) -> int:
    """What a block keeps for each token if nothing is recomputed. Frozen weights need no inputs of products."""
    c, t = layout.dtype.itemsize, layout.tensor
    D, F = decoder.hidden_size, decoder.intermediate_size
    Q = decoder.num_heads * decoder.head_dim // t
    K = decoder.num_kv_heads * decoder.head_dim // t
    norms = 2 * (4 * D + c * D * trains) // t  # the float32 copy, and the normed before its scale
    if decoder.qk_norm:
        norms += (4 + c * trains) * (Q + K)
    mode = layout.context_mode if layout.context > 1 else "ring"
    num_keys = layout.context if mode == "allgather" else 1
    num_outs = {"ring": 1, "ulysses": 1 + trains, "allgather": 2 + trains}[mode]
    num_lse = 2 if num_keys > 1 else 1
    lse = 4 * decoder.num_heads // t
    attention = c * (Q + 2 * K * num_keys + Q * num_outs) + lse * num_lse
    products = 2 * D * trains + (3 + trains) * F // t  # inputs of q, k, v and of gate, up; gate, up, silu, product
    return norms + attention + c * products


def encoder_block_bytes(tower: VisionConfig | AudioConfig, layout: Layout) -> int:
    """What a block of a tower that trains keeps for each of its rows if nothing is recomputed."""
    c, D, F = layout.dtype.itemsize, tower.hidden_size, tower.intermediate_size
    activation = tower.activation if isinstance(tower, VisionConfig) else "gelu"
    num_activations = 3 if activation == "quick_gelu" else 2  # quick_gelu is three operations
    return c * (8 * D + num_activations * F) + 4 * tower.num_heads


def _media_rows(name: str, case: Case) -> int:
    """Rows of a tower on the rank with most, for a row full of its media."""
    rows, features = media_rows(name, case.model)
    num_items = math.ceil(case.stage.data.seq_length // features / case.layout.row_ranks)
    return num_items * rows


def media_rows(name: str, model: ModelConfig) -> tuple[int, int]:
    """(rows in the tower, features in the decoder) of an image, or of a whole window of audio."""
    tower, projector = getattr(model, name), getattr(model, f"{name}_projector")
    return tower.num_rows, tower.num_features(projector.downsample)
