"""Tensor parallelism of the decoder: what each of its modules does over the axis "tensor", as a plan of DTensor styles.

    embedding      a share of the vocabulary; every rank looks up all tokens, the sum is scattered over the rows
    norms          whole weights, on this rank's rows
    q k v gate up  a share of the outputs, on all rows (gathered before them)
    o down         a share of the inputs; the sum is scattered over the rows
    head           a share of the vocabulary, on all target rows; the loss needs sums of one number a row

Adapters go with their linear: where it shares its outputs, ``lora_up`` does so too and ``lora_down`` is whole; where it
shares its inputs, ``lora_down`` does so too and ``lora_up`` is whole. What they give is part of what the linear gives,
so nothing more is sent, but for the sums of the gradients of whole ones.

Between blocks a rank holds its rows alone ("sequence parallel", Korthikanti et al. 2022), so each row is worked on once
and every gradient is a plain sum. The number of rows must be a multiple of the axis.
"""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from avlm.config.model import ModelConfig
from avlm.models.decoder import Decoder
from avlm.models.lora import LowRankLinear
from kernels.cross_entropy import linear_argmax, linear_cross_entropy

ROWS = Shard(0)


def plan() -> dict[str, ParallelStyle]:
    """Module path -> style. A block's input and output are this rank's rows."""
    gather = PrepareModuleInput(input_layouts=(ROWS,), desired_input_layouts=(Replicate(),))
    gather_first = PrepareModuleInput(
        input_layouts=(ROWS, None, None, None), desired_input_layouts=(Replicate(), None, None, None)
    )  # of x, rope, segments, cache
    norm_of_heads = SequenceParallel(sequence_dim=1, use_local_output=True)  # heads (T, H, E) are what is shared out
    return {
        "embedding": VocabularyEmbedding(),
        "blocks.*.attention_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.attention": gather_first,
        "blocks.*.attention.q": SharedOutputs(),
        "blocks.*.attention.k": SharedOutputs(),
        "blocks.*.attention.v": SharedOutputs(),
        "blocks.*.attention.q_norm": norm_of_heads,
        "blocks.*.attention.k_norm": norm_of_heads,
        "blocks.*.attention.o": SharedInputs(output_layouts=ROWS),
        "blocks.*.ffn_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.ffn": gather,
        "blocks.*.ffn.gate": SharedOutputs(),
        "blocks.*.ffn.up": SharedOutputs(),
        "blocks.*.ffn.down": SharedInputs(output_layouts=ROWS),
        "norm": OnEveryRank(),
        "head": VocabularyHead(),
    }


def apply_tensor(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Share out the decoder over a mesh of the one axis "tensor". Its output is all rows again, on every rank."""
    styles = plan()
    if not decoder.config.qk_norm:
        styles = {path: style for path, style in styles.items() if not path.endswith(("q_norm", "k_norm"))}
    parallelize_module(decoder, mesh, styles)
    decoder.tie()
    parallelize_module(decoder, mesh, PrepareModuleOutput(output_layouts=ROWS, desired_output_layouts=Replicate()))


def check_sizes(config: ModelConfig, tensor: int) -> None:
    """Raise ValueError for a model whose decoder cannot be shared out over ``tensor`` ranks."""
    if tensor > 1 and config.lora and (config.lora.dropout or config.lora.dora):
        key, reason = "dora", "lengths of rows that no rank holds whole"
        if config.lora.dropout:
            key, reason = "dropout", "the same random choices on every rank"
        raise ValueError(f"parallel.tensor={tensor} does not go with model.lora.{key}, which needs {reason}")
    for name in ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size"):
        size = getattr(config.decoder, name)
        if size % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.decoder.{name}={size}: "
                f"every rank takes an equal share, so choose a divisor of {size}"
            )


def tensor_share(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Shape of a parameter on a rank of the axis, as ``plan`` shares it out."""
    path, _, adapter = name.removesuffix(".weight").partition(".lora_")
    by_inputs = path.endswith(("attention.o", "ffn.down"))
    if not name.startswith("decoder.") or "norm" in name or adapter in ("magnitude", "up" if by_inputs else "down"):
        return shape
    return (shape[0], shape[1] // tensor) if by_inputs else (shape[0] // tensor, *shape[1:])


class SharedOutputs(ColwiseParallel):
    """Of a linear and of its adapters; the input is whole, and so is ``lora_down``."""

    def _apply(self, module: nn.Linear, mesh: DeviceMesh) -> nn.Linear:
        if isinstance(module, LowRankLinear):
            # Each rank's outputs give a part of the gradients of what is whole.
            share_adapter(module.lora_down, mesh, Replicate(), x_gradient=Partial(), gradient=Partial())
            share_adapter(module.lora_up, mesh, Shard(0), gradient=Shard(0), output=Shard(1))
        return super()._apply(module, mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in () if name else list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))


class SharedInputs(RowwiseParallel):
    """Of a linear and of its adapters; the output is a sum over the ranks, and ``lora_up`` is whole on each."""

    def _apply(self, module: nn.Linear, mesh: DeviceMesh) -> nn.Linear:
        if isinstance(module, LowRankLinear):
            share_adapter(module.lora_down, mesh, Shard(1), x_gradient=Shard(1), gradient=Shard(1))
            share_adapter(module.lora_up, mesh, Replicate(), gradient=Partial(), output=Partial())
        return super()._apply(module, mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if not name:  # it is called for the adapters as well
            super()._partition_linear_fn(name, module, mesh)


def share_adapter(
    adapter: nn.Linear,
    mesh: DeviceMesh,
    placement: Placement,
    *,
    gradient: Placement,
    x_gradient: Placement | None = None,
    output: Placement | None = None,
) -> None:
    """From ``lora_down``, which is given a DTensor, to ``lora_up``, which gives one, a rank works on its own part."""
    adapter.weight = nn.Parameter(distribute_tensor(adapter.weight, mesh, [placement]))

    def forward(x: Tensor) -> Tensor:
        x = x if x_gradient is None else x.to_local(grad_placements=[x_gradient])
        y = F.linear(x, adapter.weight.to_local(grad_placements=[gradient]))
        return y if output is None else DTensor.from_local(y, mesh, [output])

    adapter.forward = forward


class VocabularyEmbedding(ParallelStyle):
    """Rank i holds the rows of tokens i * V / n to (i + 1) * V / n of the table."""

    def _apply(self, module: nn.Embedding, mesh: DeviceMesh) -> nn.Embedding:
        share_rows(module, mesh)

        def forward(token_T: Tensor) -> Tensor:
            weight_VD = module.weight.to_local(grad_placements=[Shard(0)])
            row_T = token_T - mesh.get_local_rank() * weight_VD.shape[0]
            # Tokens of other ranks are zero here; placeholders, whose ids are negative, are so on every rank.
            held_T = (row_T >= 0) & (row_T < weight_VD.shape[0]) & (token_T >= 0)
            x_TD = F.embedding(row_T.where(held_T, 0), weight_VD) * held_T.unsqueeze(-1).to(weight_VD.dtype)
            return (
                DTensor.from_local(x_TD, mesh, [Partial()])
                .redistribute(placements=[ROWS])
                .to_local(grad_placements=[ROWS])
            )

        module.forward = forward
        return module


class VocabularyHead(ParallelStyle):
    """Loss over a shared-out vocabulary: no rank sees all logits of a row. For generation they are gathered."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        share_rows(module, mesh)
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

        def reduce(x: Tensor, operation: str) -> None:
            dist.all_reduce(x, operations[operation], group=mesh.get_group())

        def forward(hidden_RD: Tensor, target_R: Tensor | None, predict: bool = False) -> Tensor | tuple[Tensor, ...]:
            weight_VD = module.weight.to_local(grad_placements=[Shard(0)])
            # The gradient of hidden is the sum of what the shares of the vocabulary give.
            hidden_RD = DTensor.from_local(hidden_RD, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            if target_R is None:
                logits_RV = DTensor.from_local(F.linear(hidden_RD, weight_VD).float(), mesh, [Shard(1)])
                return logits_RV.full_tensor()
            first = mesh.get_local_rank() * weight_VD.shape[0]
            losses = linear_cross_entropy(hidden_RD, weight_VD, target_R, first=first, reduce=reduce)
            return (*losses, linear_argmax(hidden_RD, weight_VD, first=first, reduce=reduce)) if predict else losses

        module.forward = forward
        return module


class OnEveryRank(ParallelStyle):
    """Whole weights, whole rows: every rank of the axis does the same."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))
        module.register_forward_pre_hook(lambda _, inputs: (DTensor.from_local(inputs[0], mesh, [Replicate()]),))
        module.register_forward_hook(lambda _, inputs, output: output.to_local(grad_placements=[Replicate()]))
        return module


def share_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
