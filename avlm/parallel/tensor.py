"""Tensor parallelism of the decoder: what each of its modules does over the axis "tensor", as a plan of DTensor styles.

    embedding      a share of the vocabulary; every rank looks up all tokens, the sum is scattered over the rows
    norms          whole weights, on this rank's rows
    q k v gate up  a share of the outputs, on all rows (gathered before them)
    o down         a share of the inputs; the sum is scattered over the rows
    head           a share of the vocabulary, on all target rows; the loss needs sums of one number a row

Between blocks a rank holds its rows alone ("sequence parallel", Korthikanti et al. 2022), so each row is worked on once
and every gradient is a plain sum. The number of rows must be a multiple of the axis.
"""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from avlm.config import DecoderConfig
from avlm.models.decoder import Decoder
from kernels.cross_entropy import linear_cross_entropy

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
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.q_norm": norm_of_heads,
        "blocks.*.attention.k_norm": norm_of_heads,
        "blocks.*.attention.o": RowwiseParallel(output_layouts=ROWS),
        "blocks.*.ffn_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.ffn": gather,
        "blocks.*.ffn.gate": ColwiseParallel(),
        "blocks.*.ffn.up": ColwiseParallel(),
        "blocks.*.ffn.down": RowwiseParallel(output_layouts=ROWS),
        "norm": OnEveryRank(),
        "head": VocabularyHead(),
    }


def apply_tensor(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Share out the decoder over a mesh of the one axis "tensor". Its output is all rows again, on every rank."""
    styles = plan()
    if not decoder.config.qk_norm:
        styles = {path: style for path, style in styles.items() if not path.endswith(("q_norm", "k_norm"))}
    parallelize_module(decoder, mesh, styles)
    if decoder.config.tie_embedding:
        decoder.head.weight = decoder.embedding.weight
    parallelize_module(decoder, mesh, PrepareModuleOutput(output_layouts=ROWS, desired_output_layouts=Replicate()))


def check_sizes(config: DecoderConfig, tensor: int) -> None:
    """Raise ValueError for a decoder that cannot be shared out over ``tensor`` ranks."""
    for name in ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size"):
        size = getattr(config, name)
        if size % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.decoder.{name}={size}: "
                f"every rank takes an equal share, so choose a divisor of {size}"
            )


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

        def forward(hidden_RD: Tensor, target_R: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            weight_VD = module.weight.to_local(grad_placements=[Shard(0)])
            # The gradient of hidden is the sum of what the shares of the vocabulary give.
            hidden_RD = DTensor.from_local(hidden_RD, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            if target_R is None:
                logits_RV = DTensor.from_local(F.linear(hidden_RD, weight_VD).float(), mesh, [Shard(1)])
                return logits_RV.full_tensor()
            first = mesh.get_local_rank() * weight_VD.shape[0]
            return linear_cross_entropy(hidden_RD, weight_VD, target_R, first=first, reduce=reduce)

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
