"""Mixture of experts: a token goes through the few feed-forward parts that a router chooses for it (Shazeer et al.
2017; as in Qwen3-MoE).

    p = softmax(x @ router.T), in float32
    y = sum over the K experts e of the largest p_e of w_e * down_e(act(gate_e(x)) * up_e(x))
    w_e = p_e, or p_e over their sum

Tokens are sorted by expert, and each linear of all experts is one grouped product. No token is dropped, nothing here
waits for the device (but see ``kernels.grouped``), and sums have a fixed order. What fills the end of a row goes to no
expert.

    balance loss = N * sum over the experts e of f_e * P_e     (Fedus et al. 2021), the mean over layers and rows

f_e is the share of a packed row's assignments that go to the expert, P_e the mean of p_e over the row's tokens. Rows
are the same on every layout of ranks, and so is the loss.

T tokens   D hidden   F intermediate   N experts   K experts of a token   A assignments of tokens to experts
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avlm.config.decoder import ExpertsConfig
from avlm.models.encoder import ACTIVATIONS
from kernels.grouped import grouped_linear

SUMS = ("tokens", "entropy", "balance", "rows", "computed")  # that ``MixtureOfExperts.seen`` has behind the assignments


class Order(NamedTuple):
    """The assignments to the experts that are computed here, sorted by expert.

    assignment_A  int64: their numbers, t K + k. There may be others behind those that are computed here
    slot_TK       int64: where each assignment stands among them, 0 if it is not computed here
    is_here_TK    bool: whether it is
    end_N         int32: where those of each expert end
    """

    assignment_A: Tensor
    slot_TK: Tensor
    is_here_TK: Tensor
    end_N: Tensor

    @staticmethod
    def of(expert_TK: Tensor, num: int, held: range) -> "Order":
        """Of ``num`` experts those in ``held`` are computed here; expert ``num`` is none."""
        expert_A = expert_TK.flatten()
        last = num + 1 - held.start
        place_A = torch.where(expert_A < held.start, last, expert_A - held.start)
        sorted_A, assignment_A = place_A.sort(stable=True)
        here_N = torch.arange(len(held), device=expert_A.device)
        end_N = torch.searchsorted(sorted_A, here_N, right=True, out_int32=True)
        slot_A = torch.empty_like(assignment_A)
        slot_A[assignment_A] = torch.arange(len(slot_A), device=slot_A.device)
        slot_TK = slot_A.view(expert_TK.shape)
        is_here_TK = slot_TK < end_N[-1]
        num_tokens, per_token = expert_TK.shape
        most = num_tokens * min(per_token, len(held))  # a token goes to an expert at most once
        return Order(assignment_A[:most], slot_TK.where(is_here_TK, 0), is_here_TK, end_N)


class Router(nn.Module):
    def __init__(self, config: ExpertsConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """p_TN, float32."""
        return self.with_weight(x_TD, self.weight)

    @staticmethod
    def with_weight(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        return F.linear(x_TD, weight_ND).softmax(-1, dtype=torch.float32)

    def choose(self, p_TN: Tensor, real_T: Tensor | None) -> Tensor:
        """expert_TK, int64, the likeliest first; N for tokens that go to none."""
        expert_TK = p_TN.detach().topk(self.config.per_token, dim=-1).indices
        return expert_TK if real_T is None else expert_TK.where(real_T[:, None], self.config.num)

    def weigh(self, p_TN: Tensor, expert_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """w_TK of the chosen experts."""
        weight_TK = p_TN.gather(1, expert_TK.clamp(max=self.config.num - 1))
        if self.config.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK.to(dtype)


class GroupedLinear(nn.Module):
    """A linear without bias for each expert."""

    def __init__(self, num: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, out_features, in_features))

    def forward(self, x_AD: Tensor, end_N: Tensor) -> Tensor:
        """The rows from ``end_N[e - 1]`` to ``end_N[e]`` go through expert e. Those behind the last are not computed:
        what stands there may be anything, in the output and in gradients."""
        return grouped_linear(x_AD, self.weight, end_N)


class Experts(nn.Module):
    def __init__(self, config: ExpertsConfig, hidden_size: int, activation: str):
        super().__init__()
        self.num = config.num
        self.gate = GroupedLinear(config.num, hidden_size, config.intermediate_size)
        self.up = GroupedLinear(config.num, hidden_size, config.intermediate_size)
        self.down = GroupedLinear(config.num, config.intermediate_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums of the experts' outputs, (T, D), and how many assignments were computed, int ()."""
        order = Order.of(expert_TK, self.num, range(self.num))
        return self.mix(x_TD, order, weight_TK), order.end_N[-1]

    def mix(self, x_TD: Tensor, order: Order, weight_TK: Tensor) -> Tensor:
        return weighted_sum(self.run(spread(x_TD, order), order.end_N), order, weight_TK)

    def run(self, x_AD: Tensor, end_N: Tensor) -> Tensor:
        """The outputs of sorted rows, see ``GroupedLinear``."""
        return self.down(self.activation(self.gate(x_AD, end_N)) * self.up(x_AD, end_N), end_N)


def spread(x_TD: Tensor, order: Order) -> Tensor:
    """A copy of a token for each of its assignments, in their order."""
    return _Spread.apply(x_TD, order.assignment_A, order.slot_TK, order.is_here_TK)


def weighted_sum(y_AD: Tensor, order: Order, weight_TK: Tensor) -> Tensor:
    """Of the outputs of a token's assignments, (T, D); those that are not computed here count 0."""
    return torch.bmm(weight_TK[:, None], collect(y_AD, order)).squeeze(1)


def collect(y_AD: Tensor, order: Order) -> Tensor:
    """The outputs of each token's assignments, (T, K, D); 0 for those that are not computed here."""
    return _Collect.apply(y_AD, order.assignment_A, order.slot_TK, order.is_here_TK)


class _Spread(torch.autograd.Function):
    """The gradient is summed in the order of a token's experts, which that of an index would not be on a GPU."""

    @staticmethod
    def forward(x_TD, assignment_A, slot_TK, is_here_TK):
        return x_TD[assignment_A // slot_TK.shape[1]]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_AD):
        return _collected(dx_AD, *ctx.saved_tensors).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(y_AD, assignment_A, slot_TK, is_here_TK):
        return _collected(y_AD, slot_TK, is_here_TK)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TKD):
        return dy_TKD.flatten(0, 1)[ctx.saved_tensors[0]], None, None, None


def _collected(y_AD: Tensor, slot_TK: Tensor, is_here_TK: Tensor) -> Tensor:
    if not len(y_AD):
        return y_AD.new_zeros(*slot_TK.shape, y_AD.shape[1])
    return y_AD[slot_TK].where(is_here_TK[..., None], 0)  # not a product: rows that were not computed may be NaN


class TokenGate(nn.Module):
    """sigmoid(x . w), (T, 1)"""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.with_weight(x_TD, self.weight)

    @staticmethod
    def with_weight(x_TD: Tensor, weight_1D: Tensor) -> Tensor:
        return F.linear(x_TD, weight_1D).sigmoid()


def alone(x: Tensor) -> Tensor:
    """The sum over the one rank that holds a whole row."""
    return x


class MixtureOfExperts(nn.Module):
    """Stands where a block has its feed-forward part. ``shared``: an expert that takes every token.

    balance_scale  the factor of the balance loss of a layer and row in the loss of a step; 0: there is none
    sum_of_row     sums over the ranks that hold tokens of the same row
    seen           float32 (N + len(SUMS),), of forwards that build a graph, until ``take_seen``: assignments of this
                   rank's tokens to each expert, and SUMS
    """

    def __init__(self, config: ExpertsConfig, hidden_size: int, activation: str, shared: nn.Module | None):
        super().__init__()
        self.config = config
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size, activation)
        self.shared = shared
        self.shared_gate = TokenGate(hidden_size) if shared is not None else None
        self.balance_scale = 0.0
        self.sum_of_row: Callable[[Tensor], Tensor] = alone
        self.register_buffer("seen", torch.zeros(config.num + len(SUMS)), persistent=False)

    def forward(self, x_TD: Tensor, real_T: Tensor | None = None) -> Tensor:
        """``real_T``: bool, the tokens that do not just fill the end of a row; None if all are."""
        p_TN = self.router(x_TD)
        expert_TK = self.router.choose(p_TN, real_T)
        seen = None
        if torch.is_grad_enabled():
            p_TN, seen = self._balanced(p_TN, expert_TK)
        y_TD, num_computed = self.experts(x_TD, expert_TK, self.router.weigh(p_TN, expert_TK, x_TD.dtype))
        if seen is not None:  # all at once: a recomputation may end before this line
            self.seen += torch.cat([seen, num_computed[None]])
        if self.shared is not None and self.shared_gate is not None:
            y_TD = y_TD + self.shared_gate(x_TD) * self.shared(x_TD)
        return y_TD

    def _balanced(self, p_TN: Tensor, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """p, whose gradient gets that of the balance loss; and what is seen, without what was computed."""
        num = self.config.num
        with torch.no_grad():
            real_T = (expert_TK[:, 0] < num).to(p_TN.dtype)
            ones_A = torch.ones_like(expert_TK.flatten(), dtype=p_TN.dtype)  # sums of ones are exact in any order
            count_N = p_TN.new_zeros(num + 1).index_add_(0, expert_TK.flatten(), ones_A)[:num]
            entropy_T = torch.special.entr(p_TN).sum(1)
            balance = share = torch.zeros_like(real_T.sum())
            slope_N = torch.zeros_like(count_N)
            if self.balance_scale:
                of_row = self.sum_of_row(torch.cat([count_N, real_T.sum()[None]]))
                num_tokens = of_row[-1].clamp(min=1)
                slope_N = num / self.config.per_token * of_row[:-1] / num_tokens**2  # of the balance loss in each p_e
                balance, share = (real_T @ p_TN) @ slope_N, real_T.sum() / num_tokens
            sums = torch.stack([real_T.sum(), (entropy_T * real_T).sum(), balance, share])
            seen = torch.cat([count_N, sums])
        if not self.balance_scale:
            return p_TN, seen
        return _AddGradient.apply(p_TN, real_T, slope_N * self.balance_scale), seen


class _AddGradient(torch.autograd.Function):
    """p, to the gradient of which that of sum_te real_t * slope_e * p_te is added."""

    @staticmethod
    def forward(p_TN, real_T, slope_N):
        return p_TN.view_as(p_TN)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dp_TN):
        real_T, slope_N = ctx.saved_tensors
        return dp_TN + real_T[:, None] * slope_N, None, None


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """In the order of layers."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def set_balance(model: nn.Module, factor: float, num_rows: int) -> None:
    """Let steps of ``num_rows`` rows, over all ranks, add ``factor`` times the balance loss to their loss."""
    found = mixtures(model)
    for each in found:
        each.balance_scale = factor / (num_rows * len(found))


def clear_seen(model: nn.Module, device: torch.device) -> None:
    """Begin to look, on the device of compute."""
    for each in mixtures(model):
        each.seen = torch.zeros(each.seen.shape, device=device)


def take_seen(model: nn.Module, device: torch.device) -> Tensor:
    """What this rank has computed since the last call: ``seen`` of the layers with experts, one after the other,
    float32 (layers * (N + len(SUMS)),). A recomputed block may count twice, in all of its own."""
    found = [each.seen for each in mixtures(model)]
    taken = torch.cat([torch.empty(0, device=device), *found])
    if found:
        torch._foreach_zero_(found)
    return taken
