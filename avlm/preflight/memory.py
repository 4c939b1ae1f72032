"""What a rank holds in memory, estimated from the config alone: before any process group, weight or device exists.

The resident part is exact: float32 shards of weights, gradients and AdamW's two moments, dim 0 padded by FSDP to a
multiple of its ranks. The transient part is that of the worst of these moments:

    a tower at work    its weights are gathered, its own activations are kept if it trains
    pairs              of a contrastive stage: all activations are kept; embeddings and logits (avlm/preflight/pairs.py)
    head               all activations are kept; a chunk of logits, the gradient of the head in the making
    decoder block      the first of the backward: all activations are kept; gradients on their way to their shards

A gathered unit counts twice: the all-gather buffer and the unsharded copy (or the prefetched next block).

Activations are what autograd keeps on a GPU: attention keeps q, k, v, out (shared with the next product) and lse, by
our kernels and by torch's. The plain path keeps a second out. The loss is counted as ``kernels.dispatch`` says that it
runs. Assumed: every token has a target, and a row is full of the media of one modality, whichever takes more. Memory
of CUDA, of NCCL and of fragmentation is not included.

c bytes of a number in compute
"""

import math
from dataclasses import dataclass

from avlm.config.model import AudioConfig
from avlm.config.run import Config, Recompute, StageConfig
from avlm.models.costs import block_products, kinds_of_blocks, largest_block
from avlm.models.lora import frozen_base
from avlm.models.shapes import Shapes
from avlm.parallel.recompute import keeps_product
from avlm.preflight import pairs
from avlm.preflight.activations import (
    cross_block_bytes,
    decoder_block_bytes,
    encoder_block_bytes,
    expert_rows,
    feed_forward_numbers,
    projector_numbers,
    resampler_bytes,
    stem_kept,
)
from avlm.preflight.case import Case
from avlm.preflight.codes import codes_kept
from avlm.preflight.layout import layout_of
from avlm.preflight.media_rows import media_rows
from kernels import backend
from kernels.cross_entropy import chunk_bytes, chunk_rows

GIB, MIB = 2**30, 2**20
NOTES = {
    "parameters": "float32 (lora.base=bf16: adapted towers in bf16), sharded; replicated towers whole",
    "gradients": "float32, sharded",
    "optimizer state": "two moments, float32 (optimizer.moments=bf16: half), sharded",
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


def estimate(config: Config, stage: StageConfig, world_size: int, shapes: Shapes) -> Estimate:
    """What a rank holds at the worst moment of a stage."""
    case = Case(config, stage, layout_of(config, world_size), shapes)
    moments = {f"{tower} tower": _at_tower(tower, case) for tower in config.model.modalities.values()}
    if stage.objective == "contrastive":
        moments["pairs"] = _at_pairs(case)
    else:
        moments["head"] = _at_head(case)
        moments["decoder block"] = _at_block(case)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device = resident(case) | moments[moment]
    host = {}
    if config.checkpoint.async_save:  # copies of the model share it; pinned memory is allocated in powers of two
        host["staged checkpoint"] = (device["parameters"] + device["optimizer state"]) // case.layout.replicate
    if config.parallel.cpu_offload:
        host |= {name: device.pop(name) for name in ("parameters", "gradients", "optimizer state")}
    if config.train.offload_activations:
        host["block inputs"] = _kept(case)[1]
    return Estimate(device, host, moment)


# 1. What stays.


def resident(case: Case) -> dict[str, int]:
    """Exact bytes of the rank with the largest shards, without AdamW's step counts (4 bytes a parameter tensor)."""
    model = case.model
    config = case.config
    halved = set()
    replicated = set()
    if model.lora and model.lora.base == "bf16":
        halved = frozen_base(case.shapes)
    if config.parallel.tower_sharding == "replicate":
        replicated = set(model.modalities.values())
    parameters = gradients = whole = 0
    for name, shape in case.shapes.items():
        module, *_ = name.split(".")
        if module in replicated:
            parameters += case.itemsize * math.prod(shape)
            continue
        local = case.layout.largest_shard(name, shape)
        parameters += 2 * local if name in halved else 4 * local
        if name in case.trained:
            gradients += 4 * local
            whole += 4 * math.prod(case.layout.share(name, shape))
    is_local = config.train.accumulate_mode == "local" and config.train.micro_batches(case.layout.data_ranks) > 1
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer state": gradients if case.stage.optimizer.moments == "bf16" else 2 * gradients,
        "whole gradients": whole if is_local else 0,
    }


# 2. What comes and goes.


def _at_block(case: Case) -> dict[str, int]:
    c = case.itemsize
    decoder = case.model.decoder
    # The head's gradient is still on its way when the last block is done; a tied one waits for the embedding's.
    block = case.largest_block("decoder")
    block_gradient = case.trained_numbers(block)
    waiting = 4 * max(block_gradient, case.trained_numbers("decoder.head."))
    if decoder.tie_embedding:
        waiting += c * case.trained_numbers("decoder.embedding.")
    kept, _ = _kept(case)
    work = []
    for each in kinds_of_blocks("decoder", case.model):
        gradients = c * (feed_forward_numbers(decoder, case.experts_of(each), case.layout) + 2 * decoder.hidden_size)
        work.append(_recomputed(each, case) + gradients)
    return {
        "gathered weights": _held(case) + case.gathered_bytes(block),
        "gradients in reduction": c * block_gradient + waiting,
        "activations": kept,
        "at work": case.tokens * max(work),
    }


def _at_head(case: Case) -> dict[str, int]:
    """What ``kernels.cross_entropy`` holds: losses, logits a chunk of rows at a time, the gradient of the weight."""
    c = case.itemsize
    decoder = case.model.decoder
    D = decoder.hidden_size
    V = decoder.vocab_size // case.layout.tensor
    weight = "decoder.embedding.weight" if decoder.tie_embedding else "decoder.head.weight"
    trains = weight in case.trained
    rows = chunk_rows(V, D, c, trains)
    gradient = copied = 0
    if trains and rows >= case.tokens:
        gradient = V * D * c
    elif trains:  # it is summed in float32, and copied into its own dtype in the end
        gradient = V * D * 4
        copied = V * D * c if c < 4 else 0
    hidden = case.tokens * D * (4 + 4 * c)  # x, its float32 copy, the norm's two results, the gradient of hidden
    runs = backend.row("cross_entropy", case.layout.architecture, case.layout.dtype).implementation
    logits = chunk_bytes(min(rows, case.tokens), V, c, runs)
    kept, _ = _kept(case)
    return {
        "gathered weights": _held(case) + case.gathered_bytes("decoder.head."),
        "activations": kept,
        "head": hidden + gradient + max(logits, copied),
    }


def _at_pairs(case: Case) -> dict[str, int]:
    gathered = case.gathered_bytes("contrastive.")
    if case.config.parallel.tower_sharding == "unit":
        gathered += case.gathered_bytes("text.")  # the first whose backward runs
    reduction = (case.itemsize + 4) * case.trained_numbers("text.")
    kept, _ = _kept(case)
    return {
        "gathered weights": _held(case) + gathered,
        "gradients in reduction": reduction,
        "activations": kept,
        "head": pairs.loss_bytes(case),
    }


def _at_tower(name: str, case: Case) -> dict[str, int]:
    c = case.itemsize
    tower = getattr(case.model, name)
    sharding = case.config.parallel.tower_sharding
    whole = case.numbers(f"{name}.")
    block = case.numbers(case.largest_block(name))
    gathered = reduction = 0
    if sharding == "unit":
        gathered = case.layout.gathered(name) * whole
        reduction = max(0, (c + 4) * case.trained_numbers(f"{name}.") - gathered)  # the weights are freed before
    if sharding == "block":
        gathered = case.layout.gathered(name) * block + c * (whole - block * tower.num_blocks)
        reduction = (c + 4) * case.trained_numbers(case.largest_block(name))
    work = _recomputed(largest_block(name, case.model), case) + c * (
        2 * tower.hidden_size + 3 * tower.intermediate_size
    )
    kept, _ = _kept(case) if case.stage.objective == "contrastive" else _kept_by_tower(name, case)
    scores = 0
    if isinstance(tower, AudioConfig) and tower.block == "conformer":  # those of a window, shifted and scaled
        scores = 4 * c * tower.num_heads * tower.num_rows**2
    return {
        "gathered weights": _held(case) + gathered,
        "gradients in reduction": reduction,
        "activations": kept,
        "at work": _media_rows(name, case)[0] * work + scores,
    }


def _held(case: Case) -> int:
    """Weights that stay gathered from their forward to their backward, in every moment."""
    parallel = case.config.parallel
    towers = case.model.modalities.values()
    held = [f"{tower}_projector." for tower in towers]
    if case.stage.objective == "contrastive":
        held = ["contrastive."]
    held += ["codec."] if case.model.codec else []  # it belongs to the root as well
    if case.model.decoder.tie_embedding or not parallel.reshard:  # tied, it belongs to the root, which stays gathered
        held.append("decoder.embedding.")
    if not parallel.reshard:
        held.append("decoder.blocks.")
        if parallel.tower_sharding != "replicate":
            held += [f"{tower}." for tower in towers]
    return case.itemsize * sum(case.numbers(prefix) for prefix in held)


# 3. Activations.


def _kept(case: Case) -> tuple[int, int]:
    """(device, host) bytes of all that autograd keeps between forward and backward."""
    if case.stage.objective == "contrastive":
        rows = pairs.text_rows(case)
        device, host = _kept_by_blocks("text", rows, case)
        by_towers = [_kept_by_tower(tower, case) for tower in case.model.pools]
        device += 2 * case.itemsize * case.model.text.hidden_size * rows
        tower_device, tower_host = max(by_towers, key=sum)  # a row is full of one modality
        return device + tower_device, host + tower_host
    decoder = case.model.decoder
    device, host = _kept_by_blocks("decoder", case.tokens, case)
    rope = (16 if decoder.query_growth else 8) * case.tokens * decoder.head_dim  # cos and sin of the positions
    if case.model.cross is not None:  # a row of features is as long as one of tokens, and all ranks of a row read it
        of_cross, host_of_cross = _kept_by_blocks("cross", case.tokens, case)
        features = case.stage.data.seq_length * case.itemsize * decoder.hidden_size
        device, host = device + of_cross + features, host + host_of_cross
    by_towers = [_kept_by_tower(tower, case) for tower in case.model.modalities.values()]
    tower_device, tower_host = max(by_towers, key=sum, default=(0, 0))  # a row is full of one modality
    return device + rope + tower_device + codes_kept(case), host + tower_host


def _kept_by_tower(name: str, case: Case) -> tuple[int, int]:
    """(device, host) bytes of a tower, its input and its projector, for a row full of its media."""
    c = case.itemsize
    tower = getattr(case.model, name)
    projector = getattr(case.model, f"{name}_projector")
    rows, projected = _media_rows(name, case)
    arriving, stem = stem_kept(tower)
    device = arriving * rows
    host = 0
    trains = case.trained_numbers(f"{name}.") > 0
    if trains:
        blocks, host = _kept_by_blocks(name, rows, case)
        device += blocks + c * stem * rows
    if case.stage.objective == "answers" and (trains or case.trained_numbers(f"{name}_projector.") > 0):
        width = tower.rows_per_feature(projector) * tower.hidden_size
        if projector.resampler is not None:
            width = (projector.downsample if name == "audio" else 1) * projector.input_width(tower)
            of_query, of_row = resampler_bytes(projector.resampler, tower.hidden_size, tower.num_rows, case.layout)
            device += of_query * projected + of_row * rows
        num_deep = tower.width // tower.hidden_size - 1
        numbers = projector_numbers(projector, width, tower.hidden_size, case.model.decoder, num_deep)
        stretched = 4 * case.model.decoder.hidden_size * projector.stretches  # float32
        device += projected * (c * numbers + stretched)
    return device, host


def _media_rows(name: str, case: Case) -> tuple[int, int]:
    rows, projected = media_rows(name, case.model, case.stage.data, case.layout.row_ranks)
    if case.stage.objective == "contrastive":
        rows = math.ceil(rows * pairs.micro_batches(case) * pairs.share_of_media(name, case))
    return rows, projected


def _kept_by_blocks(name: str, rows: int, case: Case) -> tuple[int, int]:
    """(device, host) bytes of all blocks of a module, for its rows."""
    mode = case.recompute(name)
    kept = rows * sum(
        count * block_bytes(block, case, mode) for block, count in kinds_of_blocks(name, case.model).items()
    )
    if mode == "full" and case.config.train.offload_activations:
        return 0, kept
    return kept, 0


def _recomputed(block: str, case: Case) -> int:
    """Bytes for each row that come back when the backward recomputes a block."""
    return block_bytes(block, case, "none") - block_bytes(block, case, case.recompute(block.partition(".")[0]))


def block_bytes(block: str, case: Case, mode: Recompute) -> int:
    """What a block, MODULE.blocks.i, keeps for each row, its adapters included."""
    name = block.partition(".")[0]
    trains = case.trained_numbers(f"{name}.") > 0
    if name not in ("decoder", "cross") and not trains:  # no graph is built
        return 0
    if name == "cross" and mode == "none":
        cross, layout = case.model.cross, case.layout
        norms_train = f"{block}.attention_norm.weight" in case.trained
        of_token, of_feature = cross_block_bytes(case.model.decoder, cross.qk_norm, layout, trains, norms_train)
        return of_token + of_feature * layout.context  # as many features as tokens of all ranks
    if mode != "none":
        return recomputing_block_bytes(block, case, mode)
    norms_train = f"{block}.attention_norm.weight" in case.trained
    if name == "decoder":
        experts = case.experts_of(block)
        size = decoder_block_bytes(case.model.decoder, experts, case.layout, trains, norms_train)
    else:
        scales_train = f"{block}.ffn_scale" in case.trained
        size = encoder_block_bytes(getattr(case.model, name), case.layout, norms_train, scales_train)
    return size + adapter_bytes(f"{block}.", case)


def adapter_bytes(block: str, case: Case) -> int:
    """What the adapters of a block keep for each row."""
    c = case.itemsize
    size = 0
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


def recomputing_block_bytes(block: str, case: Case, mode: Recompute) -> int:
    """What a block keeps for each row: full, its input; selective, also attention, every second product but the last
    and the sum of the output of attention over the tensor axis."""
    c = case.itemsize
    name = block.partition(".")[0]
    of_tokens = name in ("decoder", "cross")
    module = case.model.decoder if of_tokens else getattr(case.model, name)
    t, width = 1, module.hidden_size  # of attention over all heads
    if of_tokens:
        t, width = case.layout.tensor, module.num_heads * module.head_dim
    size = c * module.hidden_size // t
    if mode == "full":
        return size
    products = block_products(block, case.model)
    for number, path in enumerate(products):
        if keeps_product(number, len(products)):
            weight = f"{path}.weight"
            *_, outputs, _ = case.layout.share(weight, case.shapes[weight])
            if ".experts." in path:
                outputs = outputs * expert_rows(case.experts_of(block), case.layout)[0] // t
            if path.endswith((".router", ".shared_gate")):
                outputs = outputs // t  # of a rank's own tokens
            if name == "cross" and path.endswith((".k", ".v")):
                outputs *= case.layout.context  # of features, as many as tokens of all ranks
            size += c * outputs  # a product that the ranks will sum has all of them
    num_outs = 1
    if of_tokens and t > 1:
        size += c * module.hidden_size // t
    if name == "decoder" and case.layout.context > 1 and case.layout.context_mode == "allgather":
        num_outs = 2
    return size + num_outs * (c * width // t + 4 * module.num_heads // t)
