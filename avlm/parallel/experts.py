"""Expert parallelism: ranks that follow each other share out the experts of each layer, in equal parts.

gather     each rank gets the tokens of all of them, and computes those of its experts; the sums are scattered back, in
           the dtype of compute. No number is asked of the device, at the price of room for all assignments on each rank
exchange   a rank's assignments go to the ranks of their experts, and the outputs come back. How many they are has to be
           known on the host: it waits for the device each time that a layer runs

Between blocks a rank holds tokens of its own, along tensor and context as along shard, so it does not matter here which
axes the ranks lie on. A gradient of an expert is whole on its rank: FSDP sums it over the ranks with the same experts.

T tokens of this rank   G tokens of all ranks   K experts of a token   N experts   H of them on a rank   R ranks
A assignments of this rank   B assignments that arrive
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from avlm.config.decoder import DecoderConfig
from avlm.config.parallel import ParallelConfig
from avlm.models.moe import Experts, GroupedLinear, Order, alone, collect, mixtures, spread, weighted_sum
from avlm.parallel.exchange import swap
from avlm.parallel.gather import Gather, Scatter, gathered
from kernels.grouped import grouped_linear


def expert_mode(decoder: DecoderConfig, parallel: ParallelConfig) -> str:
    """What ``parallel.expert_mode`` comes to: gather, exchange or, where experts are not shared out, none. A gather
    receives R - 1 tokens for each of a rank's own, an exchange K (R - 1) / R assignments. But a gather makes room for
    R K assignments, and moves them all, to compute K: auto takes it while that is little."""
    if decoder.experts is None or parallel.expert == 1:
        return "none"
    if parallel.expert_mode != "auto":
        return parallel.expert_mode
    return "gather" if decoder.experts.per_token >= 2 * parallel.expert else "exchange"


def check_experts(decoder: DecoderConfig, parallel: ParallelConfig, num_ranks: int) -> None:
    """ValueError for experts that the ranks of a copy of the model, ``num_ranks``, cannot share out."""
    if parallel.expert == 1:
        return
    if decoder.experts is None:
        raise ValueError(f"parallel.expert={parallel.expert} needs model.decoder.experts, and there are none")
    if num_ranks % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide parallel.shard x context x tensor = {num_ranks}, the "
            f"ranks that share out the experts: choose a divisor of {num_ranks}"
        )
    if decoder.experts.num % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide model.decoder.experts.num={decoder.experts.num}: every "
            f"rank takes an equal share, so choose a divisor of {decoder.experts.num}"
        )


def shard_dim(num: int, outputs: int, num_ranks: int) -> int:
    """Along which dim FSDP shards weights of ``num`` experts: whole experts where the ranks divide them, else outputs
    where they divide those; otherwise some ranks hold nothing."""
    return int(num % num_ranks > 0 and outputs % num_ranks == 0)


def shard_of_experts(num_ranks: int, weight: Tensor) -> Shard:
    num, outputs, _ = weight.to_local().shape if isinstance(weight, DTensor) else weight.shape
    return Shard(shard_dim(num, outputs, num_ranks))


def apply_experts(model: nn.Module, mesh: DeviceMesh, group: ProcessGroup, mode: str) -> None:
    """Share out the experts of all layers. ``mesh``: of the axis expert; ``group``: a communicator for its ranks."""
    for mixture in mixtures(model):
        experts = mixture.experts
        for linear in (experts.gate, experts.up, experts.down):
            _share(linear, mesh)
        experts.forward = torch.compiler.disable(functools.partial(_compute, experts, group, mode))


def sum_over_rows(model: nn.Module, group: ProcessGroup) -> None:
    """Let balance losses be those of whole rows, which the ranks of ``group`` share."""

    @torch.compiler.disable
    def summed(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    for mixture in mixtures(model):
        mixture.sum_of_row = summed


def shares_experts(block: nn.Module) -> bool:
    """Whether a block communicates because of its experts."""
    return any("forward" in each.experts.__dict__ or each.sum_of_row is not alone for each in mixtures(block))


def _compute(
    experts: Experts, group: ProcessGroup, mode: str, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """In place of ``Experts.forward``. Without a graph, in generation, ranks may have different numbers of tokens,
    which a gather cannot have."""
    share = experts.num // group.size()
    held = range(group.rank() * share, (group.rank() + 1) * share)
    form = _gather if mode == "gather" and torch.is_grad_enabled() else _exchange
    return form(experts, held, group, x_TD, expert_TK, weight_TK)


def _share(linear: GroupedLinear, mesh: DeviceMesh) -> None:
    linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(0)]))

    def forward(x_AD: Tensor, end_N: Tensor) -> Tensor:
        return grouped_linear(x_AD, linear.weight.to_local(grad_placements=[Shard(0)]), end_N)

    linear.forward = forward


def _gather(
    experts: Experts, held: range, group: ProcessGroup, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    x_GD = Gather.apply(x_TD, group)
    weight_GK = Gather.apply(weight_TK, group)
    order = Order.of(gathered(expert_TK.int(), group), experts.num, held)
    y_GD = experts.mix(x_GD, order, weight_GK)
    return Scatter.apply(y_GD, group), order.end_N[-1]


def _exchange(
    experts: Experts, held: range, group: ProcessGroup, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    R, H = group.size(), len(held)
    order = Order.of(expert_TK, experts.num, range(experts.num))
    sent_RH = order.end_N.diff(prepend=order.end_N.new_zeros(1)).view(R, H)
    arrived_RH = torch.empty_like(sent_RH)
    dist.all_to_all_single(arrived_RH, sent_RH, group=group)
    # The one place where the model itself waits for the device.
    send_counts, receive_counts = torch.stack([sent_RH.sum(1), arrived_RH.sum(1)]).tolist()
    order = order._replace(assignment_A=order.assignment_A[: sum(send_counts)])
    x_BD = _Swap.apply(spread(x_TD, order), send_counts, receive_counts, group)
    # They arrive by rank, then expert.
    expert_RH = torch.arange(H, device=x_BD.device).expand(R, H)
    expert_B = expert_RH.flatten().repeat_interleave(arrived_RH.flatten(), output_size=sum(receive_counts))
    by_expert = Order.of(expert_B[:, None], H, range(H))
    y_BD = collect(experts.run(spread(x_BD, by_expert), by_expert.end_N), by_expert).squeeze(1)
    y_AD = _Swap.apply(y_BD, receive_counts, send_counts, group)
    return weighted_sum(y_AD, order, weight_TK), by_expert.end_N[-1]


class _Swap(torch.autograd.Function):
    """Rows to the ranks that they go to, and those that arrive."""

    @staticmethod
    def forward(ctx, x_AD, send_counts, receive_counts, group):
        ctx.back = receive_counts, send_counts, group
        return swap(x_AD.contiguous(), send_counts, receive_counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BD):
        return swap(dx_BD.contiguous(), *ctx.back), None, None, None
