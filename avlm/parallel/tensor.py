"""Tensor parallelism of the decoder: how each of its modules is sharded over the axis "tensor", by DTensor styles.

    embedding      a share of the vocabulary; every rank looks up all tokens, the sum is scattered over the tokens
    norms          whole weights, on this rank's tokens
    q k v gate up  a share of the outputs, on all tokens (gathered before them)
    o down         a share of the inputs; the sum is scattered over the tokens
    router         whole, on this rank's tokens; experts are no matter of this axis, see experts.py
    head           a share of the vocabulary, on all tokens with a target; the loss needs sums of one number a target

Adapters are sharded with their linear. If it is sharded by outputs, so is ``lora_up``, and ``lora_down`` is whole; if
by inputs, so is ``lora_down``, and ``lora_up`` is whole. Their output is added before the linear's own reduction, so
adapters cost no extra communication except the gradient all-reduce of the whole half.

Between blocks a rank holds only its own tokens ("sequence parallel", Korthikanti et al. 2022), so each token is
computed once and every gradient is a plain sum. The number of tokens must be a multiple of the axis.
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

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.models.cross import CrossLayers
from avlm.models.decoder import Decoder, Head, TokenEmbedding
from avlm.models.lora import LowRankLinear
from kernels.cross_entropy import linear_argmax, linear_cross_entropy

TOKENS = Shard(0)  # x_TD between blocks


def tensor_plan(config: DecoderConfig) -> dict[str, ParallelStyle]:
    """Module path -> style. A block's input and output are this rank's tokens."""
    gather_first = PrepareModuleInput(
        input_layouts=(TOKENS, None, None, None), desired_input_layouts=(Replicate(), None, None, None)
    )  # of x, rope, segments, cache
    norm_of_heads = SequenceParallel(sequence_dim=1, use_local_output=True)  # (T, H, E), sharded by heads
    styles = {
        "embedding": VocabularyEmbedding(),
        "blocks.*.attention_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.attention": gather_first,
        "blocks.*.attention.q": SharedOutputs(),
        "blocks.*.attention.k": SharedOutputs(),
        "blocks.*.attention.v": SharedOutputs(),
        "blocks.*.attention.q_norm": norm_of_heads,
        "blocks.*.attention.k_norm": norm_of_heads,
        "blocks.*.attention.o": SharedInputs(output_layouts=TOKENS),
        "blocks.*.attention_post_norm": SequenceParallel(sequence_dim=0, use_local_output=True),
        "blocks.*.ffn_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.ffn_post_norm": SequenceParallel(sequence_dim=0, use_local_output=True),
        "norm": OnEveryRank(),
        "head": VocabularyHead(),
    }
    if not config.qk_norm:
        del styles["blocks.*.attention.q_norm"], styles["blocks.*.attention.k_norm"]
    if not config.post_norms:
        del styles["blocks.*.attention_post_norm"], styles["blocks.*.ffn_post_norm"]
    for i in range(config.num_layers):
        ffn = f"blocks.{i}.ffn"
        if not config.has_experts(i):
            styles |= feed_forward_plan(ffn, num_inputs=2)
            continue
        styles |= {ffn: OwnTokens(), f"{ffn}.router": OnOwnTokens()}
        if config.experts is not None and config.experts.shared_size:
            styles |= {f"{ffn}.shared_gate": OnOwnTokens(), **feed_forward_plan(f"{ffn}.shared", num_inputs=1)}
    return styles


def feed_forward_plan(path: str, num_inputs: int) -> dict[str, ParallelStyle]:
    others = (None,) * (num_inputs - 1)
    return {
        path: PrepareModuleInput(input_layouts=(TOKENS, *others), desired_input_layouts=(Replicate(), *others)),
        f"{path}.gate": SharedOutputs(),
        f"{path}.up": SharedOutputs(),
        f"{path}.down": SharedInputs(output_layouts=TOKENS),
    }


def apply_tensor(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard the decoder over a mesh of the one axis "tensor". Its output is all tokens again, on every rank."""
    parallelize_module(decoder, mesh, tensor_plan(decoder.config))
    decoder.tie()
    parallelize_module(decoder, mesh, PrepareModuleOutput(output_layouts=TOKENS, desired_output_layouts=Replicate()))


def apply_cross_tensor(cross: CrossLayers, mesh: DeviceMesh) -> None:
    """Shard layers of cross-attention likewise. Features of media are whole on every rank; each computes the keys and
    values of its heads, and so a part of the gradient of every feature."""
    block = "blocks.*"
    others = (None,) * 4  # features, tokens, features of documents, cache
    styles: dict[str, ParallelStyle] = {
        f"{block}.attention_norm": SequenceParallel(sequence_dim=0),
        f"{block}.attention": PrepareModuleInput(
            input_layouts=(TOKENS, *others), desired_input_layouts=(Replicate(), *others)
        ),
        f"{block}.attention.q": SharedOutputs(),
        f"{block}.attention.k": SharedOutputsOfWhole(),
        f"{block}.attention.v": SharedOutputsOfWhole(),
        f"{block}.attention.o": SharedInputs(output_layouts=TOKENS),
        f"{block}.ffn_norm": SequenceParallel(sequence_dim=0),
        f"{block}.attention_gate": OnOwnTokens(),
        f"{block}.ffn_gate": OnOwnTokens(),
        **feed_forward_plan(f"{block}.ffn", num_inputs=1),
    }
    if isinstance(cross.blocks[0].attention.q_norm, nn.RMSNorm):
        norm_of_heads = SequenceParallel(sequence_dim=1, use_local_output=True)
        styles |= {f"{block}.attention.q_norm": norm_of_heads, f"{block}.attention.k_norm": norm_of_heads}
    parallelize_module(cross, mesh, styles)


def check_sizes(config: ModelConfig, tensor: int) -> None:
    """Raise ValueError for a model whose decoder cannot be sharded over ``tensor`` ranks."""
    if tensor > 1 and config.lora:
        refused = f"parallel.tensor={tensor} does not go with model.lora."
        if config.lora.dropout:
            raise ValueError(f"{refused}dropout, which needs the same random choices on every rank")
        if config.lora.dora:
            raise ValueError(f"{refused}dora, which needs the lengths of weight rows that no rank holds whole")
    if tensor > 1 and config.codec:
        raise ValueError(f"parallel.tensor={tensor} does not go with model.codec: use parallel.context, or shard")
    decoder = config.decoder
    sizes = {name: getattr(decoder, name) for name in ("num_kv_heads", "num_heads", "vocab_size")}
    for name, size in {**sizes, **feed_forward_sizes(decoder)}.items():
        if size % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.decoder.{name}={size}: "
                f"every rank takes an equal share, so choose a divisor of {size}"
            )


def feed_forward_sizes(decoder: DecoderConfig) -> dict[str, int]:
    """Widths of the feed-forward parts that every token goes through, by their keys."""
    sizes = {}
    if not all(decoder.has_experts(i) for i in range(decoder.num_layers)):
        sizes["intermediate_size"] = decoder.intermediate_size
    if decoder.experts is not None and decoder.experts.shared_size:
        sizes["experts.shared_size"] = decoder.experts.shared_size
    return sizes


def tensor_share(name: str, shape: tuple[int, ...], tensor: int, expert: int = 1) -> tuple[int, ...]:
    """Shape of a parameter's share on a rank of the axis, as ``tensor_plan`` shards it; or of the ``expert`` ranks that
    share out experts."""
    if ".experts." in name:
        return shape[0] // expert, *shape[1:]
    is_whole = "norm" in name or ".router." in name or "_gate." in name
    if not name.startswith(("decoder.", "cross.")) or is_whole:
        return shape
    path, _, adapter = name.removesuffix(".weight").partition(".lora_")
    by_inputs = path.endswith(("attention.o", ".down"))
    whole_half = "up" if by_inputs else "down"
    if adapter in ("magnitude", whole_half):
        return shape
    if by_inputs:
        return shape[0], shape[1] // tensor
    return shape[0] // tensor, *shape[1:]


class SharedOutputs(ColwiseParallel):
    """A linear and its adapters, sharded by outputs; the input is whole, and so is ``lora_down``."""

    def _apply(self, module: nn.Linear, mesh: DeviceMesh) -> nn.Linear:
        if isinstance(module, LowRankLinear):
            # Each rank's outputs contribute a part to the gradients of the input and of ``lora_down``.
            share_adapter(module.lora_down, mesh, Replicate(), x_gradient=Partial(), gradient=Partial())
            share_adapter(module.lora_up, mesh, Shard(0), gradient=Shard(0), output=Shard(1))
        return super()._apply(module, mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if not name:  # it is called for the adapters as well
            distribute(module, mesh, Shard(0))


class SharedOutputsOfWhole(ParallelStyle):
    """A linear, sharded by outputs, of a local input that is whole on every rank. The gradient of the input is this
    rank's part of a sum that is made elsewhere."""

    def _apply(self, module: nn.Linear, mesh: DeviceMesh) -> nn.Linear:
        distribute(module, mesh, Shard(0))
        module.forward = lambda x_SC: F.linear(x_SC, module.weight.to_local(grad_placements=[Shard(0)]))
        return module


class SharedInputs(RowwiseParallel):
    """A linear and its adapters, sharded by inputs; the output is a sum over the ranks, and ``lora_up`` is whole."""

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
    """Between the DTensor that enters ``lora_down`` and the one that leaves ``lora_up``, a rank computes with local
    tensors."""
    adapter.weight = nn.Parameter(distribute_tensor(adapter.weight, mesh, [placement]))

    def forward(x: Tensor) -> Tensor:
        if x_gradient is not None:
            x = x.to_local(grad_placements=[x_gradient])
        y = F.linear(x, adapter.weight.to_local(grad_placements=[gradient]))
        if output is not None:
            y = DTensor.from_local(y, mesh, [output])
        return y

    adapter.forward = forward


class VocabularyEmbedding(ParallelStyle):
    """Rank i holds the embeddings of token ids i * V / n to (i + 1) * V / n."""

    def _apply(self, module: TokenEmbedding, mesh: DeviceMesh) -> TokenEmbedding:
        distribute(module, mesh, Shard(0))

        def forward(token_T: Tensor) -> Tensor:
            weight_VD = module.weight.to_local(grad_placements=[Shard(0)])
            num_held = weight_VD.shape[0]
            id_T = token_T - mesh.get_local_rank() * num_held
            # Tokens of other ranks are zero here; placeholders, whose ids are negative, are so on every rank.
            held_T = (id_T >= 0) & (id_T < num_held) & (token_T >= 0)
            x_TD = F.embedding(id_T.where(held_T, 0), weight_VD)
            x_TD = x_TD * module.factor(held_T, x_TD.dtype)
            summed_TD = DTensor.from_local(x_TD, mesh, [Partial()]).redistribute(placements=[TOKENS])
            return summed_TD.to_local(grad_placements=[TOKENS])

        module.forward = forward
        return module


class VocabularyHead(ParallelStyle):
    """Loss over a sharded vocabulary: no rank sees all logits of a token. For generation they are gathered."""

    def _apply(self, module: Head, mesh: DeviceMesh) -> Head:
        distribute(module, mesh, Shard(0))
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

        def reduce(x: Tensor, operation: str) -> None:
            dist.all_reduce(x, operations[operation], group=mesh.get_group())

        def forward(
            hidden_RD: Tensor, target_R: Tensor | None, predict: bool = False, factor_R: Tensor | None = None
        ) -> Tensor | tuple[Tensor, ...]:
            weight_VD = module.weight.to_local(grad_placements=[Shard(0)])
            # Each share of the vocabulary contributes a part to the gradient of hidden.
            hidden_RD = DTensor.from_local(hidden_RD, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            if target_R is None:
                logits_RV = module.bounded(F.linear(hidden_RD, weight_VD).float())
                return DTensor.from_local(logits_RV, mesh, [Shard(1)]).full_tensor()
            first = mesh.get_local_rank() * weight_VD.shape[0]
            capped = {"softcap": module.softcap, "first": first, "reduce": reduce, "factor_R": factor_R}
            losses = linear_cross_entropy(hidden_RD, weight_VD, target_R, **capped)
            if predict:
                losses = *losses, linear_argmax(hidden_RD, weight_VD, first=first, reduce=reduce)
            return losses

        module.forward = forward
        return module


class OwnTokens(ParallelStyle):
    """A mixture of experts, which takes this rank's tokens; its experts stay as they are."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def before(_: nn.Module, inputs: tuple[DTensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            x, real_T = inputs
            x_TD = x.to_local(grad_placements=[TOKENS])
            if real_T is not None:
                real_T = real_T.chunk(mesh.size())[mesh.get_local_rank()]
            return x_TD, real_T

        module.register_forward_pre_hook(before)
        return module


class OnOwnTokens(ParallelStyle):
    """A whole weight for this rank's tokens alone: its gradient is a part of the sum."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute(module, mesh, Replicate())
        module.forward = lambda x_TD: module.with_weight(x_TD, module.weight.to_local(grad_placements=[Partial()]))
        return module


class OnEveryRank(ParallelStyle):
    """Whole weights, all tokens: every rank of the axis computes the same."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute(module, mesh, Replicate())
        module.register_forward_pre_hook(lambda _, inputs: (DTensor.from_local(inputs[0], mesh, [Replicate()]),))
        module.register_forward_hook(lambda _, inputs, output: output.to_local(grad_placements=[Replicate()]))
        return module


def distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make the module's own parameters DTensors."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [placement])))
