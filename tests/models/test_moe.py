"""Mixtures of experts against a loop over tokens and experts, and the balance loss against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from avlm.config.decoder import DecoderConfig, ExpertsConfig
from avlm.config.model import ModelConfig
from avlm.config.run import RecomputeConfig, TrainConfig
from avlm.models.avlm import AVLM
from avlm.models.decoder import Decoder, feed_forward
from avlm.models.moe import SUMS, clear_seen, set_balance, take_seen
from avlm.parallel.recompute import apply_recompute
from avlm.training.expert_load import expert_load
from kernels.segments import Segments

N, K, D = 6, 3, 16


def make_config(shared=0, normalize=True, **decoder):
    sizes = {"num": N, "per_token": K, "intermediate_size": 8, "normalize": normalize, "shared_size": shared}
    sizes |= decoder.pop("experts", {})
    given = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}
    return DecoderConfig(**{**given, "num_kv_heads": 2, **decoder}, experts=ExpertsConfig(**sizes))


def make(config):
    mixture = feed_forward(config, 0)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixture


def by_token(mixture, x_TD, real_T):
    """The definition, one token and one expert after the other."""
    config, experts = mixture.config, mixture.experts
    outputs = []
    for x_D, real in zip(x_TD, real_T):
        p_N = (mixture.router.weight @ x_D).softmax(-1)
        weight_K, chosen_K = p_N.topk(config.per_token)
        weight_K = weight_K / weight_K.sum() if config.normalize else weight_K
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weight_K, chosen_K.tolist() if real else []):
            hidden_F = F.silu(experts.gate.weight[e] @ x_D) * (experts.up.weight[e] @ x_D)
            y_D = y_D + weight * (experts.down.weight[e] @ hidden_F)
        if mixture.shared is not None:
            shared = mixture.shared
            hidden_F = F.silu(shared.gate.weight @ x_D) * (shared.up.weight @ x_D)
            y_D = y_D + (mixture.shared_gate.weight @ x_D).sigmoid() * (shared.down.weight @ hidden_F)
        outputs.append(y_D)
    return torch.stack(outputs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [0, 12])
def test_a_mixture_is_the_sum_of_its_experts_forward_and_backward(shared, normalize):
    mixture = make(make_config(shared, normalize))
    x_TD = torch.randn(30, D)
    real_T = torch.arange(30) < 23
    dy_TD = torch.randn(30, D)
    found, expected = [], []
    for function, results in ((mixture, found), (lambda x, real: by_token(mixture, x, real), expected)):
        x = x_TD.clone().requires_grad_()
        mixture.zero_grad()
        y = function(x, real_T)
        y.backward(dy_TD)
        results += [y, x.grad, *(parameter.grad for parameter in mixture.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_real", [0, 1])
def test_experts_without_a_token_have_gradients_of_zero(num_real):
    mixture = make(make_config())
    y_TD = mixture(torch.randn(4, D, requires_grad=True), torch.arange(4) < num_real)
    y_TD.sum().backward()
    norms = mixture.experts.up.weight.grad.flatten(1).norm(dim=1)
    assert (norms > 0).sum() == K * num_real and y_TD[num_real:].eq(0).all()
    assert mixture(torch.empty(0, D), None).shape == (0, D)


def test_a_token_does_not_depend_on_those_beside_it():
    mixture = make(make_config())
    x_TD = torch.randn(12, D)
    together = mixture(x_TD)
    torch.testing.assert_close(torch.cat([mixture(x_TD[:5]), mixture(x_TD[5:])]), together)


def test_the_balance_loss_of_a_row_is_that_of_transformers_and_so_is_its_gradient():
    mixture = make(make_config())
    x_TD = torch.randn(40, D)
    num_real = 31
    logits_TN = F.linear(x_TD[:num_real], mixture.router.weight)
    expected = load_balancing_loss_func((logits_TN,), N, K) / K  # theirs sums over a token's experts
    [gradient] = torch.autograd.grad(expected, mixture.router.weight)

    def backward(factor, num_rows):
        set_balance(mixture, factor, num_rows)
        mixture.zero_grad()
        mixture(x_TD, torch.arange(40) < num_real).sum().backward()
        return mixture.router.weight.grad

    without, within = backward(0.0, 1), backward(300.0, 4)
    torch.testing.assert_close(within - without, 300 / 4 * gradient, atol=1e-5, rtol=1e-4)
    clear_seen(mixture, torch.device("cpu"))
    backward(0.3, 4)
    found = expert_load(take_seen(mixture, torch.device("cpu")).tolist(), mixture.config)
    assert found["experts/balance_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_seen_counts_tokens_alone_and_only_where_a_graph_is_built():
    mixture = make(make_config())
    x_TD, real_T = torch.randn(20, D), torch.arange(20) < 14
    with torch.no_grad():
        mixture(x_TD, real_T)
        p_TN = mixture.router(x_TD)[:14]
    assert take_seen(mixture, torch.device("cpu")).eq(0).all()
    mixture(x_TD, real_T)
    mixture(x_TD, real_T)
    seen = take_seen(mixture, torch.device("cpu"))
    assert len(seen) == N + len(SUMS) and seen[:N].sum() == 2 * 14 * K
    found = expert_load(seen.tolist(), mixture.config)
    share_N = p_TN.topk(K).indices.flatten().bincount(minlength=N) / (14 * K)
    assert found["experts/load"] == pytest.approx((N * share_N).tolist(), abs=1e-4)
    assert found["experts/busiest"] == pytest.approx(N * share_N.max().item())
    assert found["experts/entropy"] == pytest.approx(torch.special.entr(p_TN).sum(1).mean().item() / math.log(N))
    assert found["experts/dropped"] == 0 and "experts/balance_loss" not in found
    assert take_seen(mixture, torch.device("cpu")).eq(0).all()


@pytest.mark.parametrize("shared", [0, 12])
def test_what_is_seen_is_the_same_where_blocks_are_recomputed(shared):
    """Also where only some of them are: the first has no graph."""
    found = []
    for mode in ("none", "full", "selective"):
        torch.manual_seed(0)
        model = AVLM(ModelConfig(decoder=make_config(shared)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5).requires_grad_(False)
        model.decoder.blocks[1].requires_grad_(True)
        set_balance(model, 0.1, 2)
        apply_recompute(model, TrainConfig(recompute=RecomputeConfig(decoder=mode)))
        for _ in range(2):  # micro-batches
            x_TD = model.decoder(torch.randn(9, D), torch.arange(9), Segments.of([9]), real_T=torch.arange(9) < 7)
            x_TD.square().sum().backward()
        found.append(expert_load(take_seen(model, torch.device("cpu")).tolist(), model.config.decoder.experts))
    assert found[0]["experts/dropped"] == 0 and 0 < found[0]["experts/entropy"] < 1
    for other in found[1:]:
        for name, value in found[0].items():
            assert other[name] == pytest.approx(value, rel=1e-6), name


def test_layers_without_experts_are_dense_and_a_model_without_them_sees_nothing():
    decoder = Decoder(make_config(experts={"dense_layers": [0]}))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert [hasattr(block.ffn, "router") for block in decoder.blocks] == [False, True]
    x_TD = decoder(torch.randn(9, D), torch.arange(9), Segments.of([9]))
    assert x_TD.isfinite().all()
    assert not len(take_seen(decoder.blocks[0], torch.device("cpu")))


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ({"per_token": 7}, "per_token=7 is more than num=6"),
        ({"dense_layers": [2]}, r"dense_layers=\[2\]"),
        ({"intermediate_size": 12}, "experts.intermediate_size=12 must be a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(experts, said):
    with pytest.raises(ValueError, match=said):
        make_config(experts=experts)


@pytest.mark.compiler
def test_a_mixture_is_one_graph_that_notes_what_it_sees_and_has_the_same_gradients():
    mixture = make(make_config(shared=12))
    set_balance(mixture, 0.1, 1)
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    x_TD, real_T = torch.randn(20, D), torch.arange(20) < 14
    found = []
    for function in (mixture, compiled):
        x = x_TD.clone().requires_grad_()
        mixture.zero_grad()
        function(x, real_T).square().sum().backward()
        seen = take_seen(mixture, torch.device("cpu"))
        found.append([x.grad, seen, *(parameter.grad for parameter in mixture.parameters())])
    assert found[0][1].sum() > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
