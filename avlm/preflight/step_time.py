"""How long a training step takes, on paper: what has to be computed and sent follows from the config, the layout and a
row; how fast that is, from the rates of ``avlm.preflight.rates``, which are assumptions.

    products, attention   FLOPs of ``avlm.training.flops``, on the rank with most / rate
    elementwise, copies   bytes in the memory of the GPU: between products, and around FSDP's collectives
    tensor, experts       gathers, sums and exchanges inside of blocks, which all wait for
    exposed               FSDP, context and media: what does not hide under the computation next to it
    optimizer             AdamW and clipping
    host                  Python and dispatch, beside the GPU: it counts where it is longer
    row                   the next row on its way to the ranks that share it, beside both

A step takes as long as the slowest of GPU, host and row. Validation, checkpoints and waiting for the loader are apart.
Not counted: ``train.float8``, logits, embeddings, kernels too short to fill a GPU, ranks that lag, other jobs on the
network. All rows of a step are alike.

C, t ranks of context, tensor   U of C that exchange heads   L tokens of a rank   R ranks that share a row
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from avlm.config.model import TOWERS
from avlm.config.run import Config, StageConfig
from avlm.models.shapes import parameter_shapes
from avlm.preflight import communication, memory, rates, wire
from avlm.preflight.activations import expert_rows
from avlm.preflight.case import Case
from avlm.preflight.described_step import Both, Row, Step, media_bytes
from avlm.preflight.layout import layout_of
from avlm.preflight.memory import GIB
from avlm.preflight.rates import NODE, Gpu

TOKEN_BYTES = 16  # of a row on the host: token, position, row and source of a feature, each int32


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step on its slowest rank; bytes that it sends; bytes of the rank that holds most."""

    parts: dict[str, float]
    host: float
    row: float
    save: float  # that a checkpoint makes training wait
    sent: dict[str, float]
    memory: int
    gpu: Gpu
    tokens: int  # of a step, all ranks
    ideal: float  # seconds at the peak, without recomputation

    @property
    def device(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        return max(self.device, self.host, self.row)

    @property
    def mfu(self) -> float:
        return self.ideal / self.seconds

    @property
    def wall(self) -> str:
        """What a faster step, or any, meets first."""
        if self.memory > self.gpu.memory:
            return f"memory, {self.memory / GIB:.0f} GiB of {self.gpu.memory / GIB:.0f}"
        if self.host == self.seconds:
            return f"the host, {rounded(self.host)} s for {rounded(self.device)} s of the GPU"
        if self.row == self.seconds:
            return f"the row on its way, {rounded(self.row)} s for {rounded(self.device)} s of the GPU"
        part = max(self.parts, key=self.parts.__getitem__)
        return f"{part}, {self.parts[part] / self.device:.0%} of it"


def rounded(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def estimate(config: Config, stage: StageConfig, world_size: int, gpu: Gpu, row: Row) -> StepTime:
    """ValueError for cpu_offload: what the host then computes is not modelled."""
    if config.parallel.cpu_offload:
        raise ValueError("parallel.cpu_offload=true: no step time is estimated for weights and AdamW on the host")
    case = Case(config, stage, layout_of(config, world_size), parameter_shapes(config.model))
    step = Step(case, gpu, row)
    layout = case.layout
    micro_batches = step.micro_batches
    context = communication.context(step)
    work = _work(step, context.pairs)
    tensor, tensor_sent = communication.tensor(step)
    copies, waited, weights_sent = communication.weights(step, work, tensor)
    exchange, exchange_sent = communication.media(step)
    experts, experts_sent = communication.experts(step)
    num_trained = memory.resident(case)["gradients"] / 4
    parts = {kind: micro_batches * sum(map(sum, of_modules.values())) for kind, of_modules in work.items()}
    parts |= {
        "copies": copies,
        "tensor exchange": micro_batches * sum(tensor),
        "expert exchange": micro_batches * experts,
        "exposed communication": waited + micro_batches * (context.exposed + exchange),
        "optimizer": rates.ADAMW[stage.optimizer.moments] * num_trained / step.memory_rate,
    }
    sent = {"weights": weights_sent, "tensor": micro_batches * tensor_sent, "experts": micro_batches * experts_sent}
    sent |= {"context": micro_batches * context.sent, "media": micro_batches * exchange_sent}
    num_rows = layout.rows_per_step(config.train)
    num_flops = sum(
        (forward + backward) * step.counts[name] for (_, name), (forward, backward, _) in step.costs.items()
    )
    return StepTime(
        parts=parts,
        host=_host(step, world_size),
        row=micro_batches * _row_on_its_way(step),
        save=_save(case, world_size),
        sent=sent,
        memory=memory.estimate(config, stage, world_size, case.shapes).total,
        gpu=gpu,
        tokens=num_rows * row.tokens,
        ideal=num_flops * num_rows / world_size / step.peak(1),
    )


# 1. What is computed.


def _work(step: Step, pairs: float) -> dict[str, dict[str, Both]]:
    """kind -> module -> seconds of a micro-batch."""
    ranks = step.case.layout.row_ranks
    products: dict[str, Both] = defaultdict(Both)
    attention: dict[str, Both] = defaultdict(Both)
    for (module, name), (forward, backward, again) in step.costs.items():
        share = 1 / ranks
        if module in TOWERS.values():
            share = step.share_of_items(next(key for key, tower in TOWERS.items() if tower == module))
        elif name == "token_pairs":
            share = pairs
        kind, shares = products, (rates.PRODUCT, rates.PRODUCT)
        if name.endswith("pairs"):
            kind, shares = attention, (rates.ATTENTION_FORWARD, rates.ATTENTION_BACKWARD)
        number = share * step.counts[name]
        before = number * forward / step.peak(shares[0])
        after = number * (backward / step.peak(shares[1]) + again / step.peak(shares[0]))
        kind[module] = Both(kind[module].forward + before, kind[module].backward + after)
    elementwise = {"decoder": _elementwise(step)}
    for modality in step.row.items:
        elementwise[TOWERS[modality]] = _elementwise_of_tower(step, modality)
    return {"products": products, "attention": attention, "elementwise": elementwise}


def _elementwise(step: Step) -> Both:
    """Of the decoder's blocks. One that recomputes selectively runs uncompiled under context, or with experts shared
    out."""
    case = step.case
    decoder = case.model.decoder
    mode = case.recompute("decoder")
    is_cut = case.layout.context > 1 or case.layout.expert > 1
    compiled = case.config.train.compile and not (is_cut and mode == "selective")
    D, F = decoder.hidden_size, decoder.intermediate_size
    QK = (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    of_token = []
    num_mixtures = wire.num_mixtures(decoder)
    in_all = F * (decoder.num_layers - num_mixtures)  # activations of a token in all layers
    copies = 0
    if decoder.experts is not None:
        rows, collected = expert_rows(decoder.experts, case.layout)
        in_all += num_mixtures * (rows * decoder.experts.intermediate_size + decoder.experts.shared_size)
        copies = num_mixtures * (rows + collected) * D  # a token for each of its experts, and their outputs
    for i in range(2):
        size = rates.COPIED_ROW * copies
        if compiled:
            size += (rates.COMPILED_D[i] * D + rates.COMPILED_QK[i] * QK) * decoder.num_layers
            size += rates.COMPILED_F[i] * in_all
        else:
            norm = (rates.OFFSET_NORM if decoder.norm_offset else rates.NORM)[i]
            of_layer = 2 * (norm * (1 + decoder.post_norms) + rates.RESIDUAL[i]) * D + rates.ROTATED[i] * QK
            of_layer += norm * QK * decoder.qk_norm
            size += of_layer * decoder.num_layers + rates.SWIGLU[i] * in_all
        of_token.append(size)
    forward, backward = (size * step.tokens / case.layout.tensor for size in of_token)
    if mode != "none":
        backward += forward
    return Both(forward / step.memory_rate, backward / step.memory_rate)


def _elementwise_of_tower(step: Step, modality: str) -> Both:
    name = TOWERS[modality]
    tower = getattr(step.case.model, name)
    rows = step.share_of_items(modality) * step.counts[f"{modality}_rows"] * tower.num_blocks
    forward, backward = (
        rows * (rates.TOWER_D[i] * tower.hidden_size + rates.TOWER_F[i] * tower.intermediate_size) for i in range(2)
    )
    trains = step.case.trained_numbers(f"{name}.") > 0
    if step.case.recompute(name) != "none":
        backward += forward
    return Both(forward / step.memory_rate, trains * backward / step.memory_rate)


# 2. What the host does.


def _host(step: Step, world_size: int) -> float:
    case = step.case
    layout = case.layout
    decoder = case.model.decoder
    block = rates.BLOCK[case.recompute("decoder")]
    if layout.tensor > 1:
        block *= rates.TENSOR_BLOCK
    of_batch = decoder.num_layers * block
    for name in case.model.modalities.values():
        share = 1.0 if case.trained_numbers(f"{name}.") else rates.FORWARD_SHARE
        mode = case.recompute(name) if share == 1 else "none"
        of_batch += getattr(case.model, name).num_blocks * rates.BLOCK[mode] * share
    if layout.context_mode in ("ring", "ulysses_ring") and layout.context > 1:
        longest = math.ceil(max(step.row.documents) / (step.tokens * step.num_together))
        of_batch += 3 * decoder.num_layers * longest * rates.RING_STEP
    return step.micro_batches * of_batch + 2 * (world_size - 1) * rates.HOST_HOP


def _row_on_its_way(step: Step) -> float:
    """Tokens to all ranks of a row, one after the other in a tree; media from the first of them to their encoders."""
    ranks = step.case.layout.row_ranks
    if ranks == 1:
        return 0.0
    media = wire.ring(ranks, media_bytes(step.row, step.case.model, step.case.stage.data))
    return (media + math.ceil(math.log2(ranks)) * TOKEN_BYTES * step.row.tokens) / rates.TCP


def _save(case: Case, world_size: int) -> float:
    """Seconds that a checkpoint makes training wait, once the first of the stage has written what is frozen."""
    if case.config.checkpoint.async_save:
        held = memory.resident(case)
        trained = held["gradients"]  # as large as the parameters that have them
        return (trained + held["optimizer state"]) / case.layout.replicate / rates.STAGING
    moments = 4 if case.stage.optimizer.moments == "bf16" else 8
    size = (4 + moments) * sum(map(math.prod, case.trained.values()))
    nodes = math.ceil(world_size / NODE)
    return size / min(rates.STORE, rates.STORE_OF_NODE * nodes) + rates.SAVE_PLAN
