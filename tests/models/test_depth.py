"""The depth decoder: CSM's, forward and gradients; and codes of speech in the input and the loss of a duplex model."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CsmDepthDecoderConfig
from transformers.models.csm.modeling_csm import CsmDepthDecoderForCausalLM

from avlm.config.codec import CodecConfig
from avlm.config.contrastive import ContrastiveConfig, TextConfig
from avlm.data.packing import pack
from avlm.evaluation.listening import walk, windows_of
from avlm.models.costs import counts
from avlm.models.depth import Codec
from avlm.models.lora import adaptable
from tests.models.handmade import build, shake
from tests.models.test_duplex import CONFIG, recording, samples_of

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
CODEC = CodecConfig(num_codebooks=3, codebook_size=16, rope_theta=10000.0, **SIZES)
SPEAKING = dataclasses.replace(CONFIG, codec=CODEC)
K, V = 3, 17


def csm_of(codec: Codec) -> CsmDepthDecoderForCausalLM:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CsmDepthDecoderConfig(
        **{**sizes, "num_key_value_heads": 2, "head_dim": 6, "num_codebooks": K, "vocab_size": V},
        **{"backbone_hidden_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    csm = CsmDepthDecoderForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": codec.embedding.weight, "model.norm.weight": codec.norm.weight}
    state["model.inputs_embeds_projector.weight"] = codec.into.weight
    state["codebooks_head.weight"] = torch.stack([head.weight.T for head in codec.heads][1:])
    for i, block in enumerate(codec.blocks):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            state[f"{layer}.self_attn.{name}_proj.weight"] = getattr(block.attention, name).weight
        for name in ("gate", "up", "down"):
            state[f"{layer}.mlp.{name}_proj.weight"] = getattr(block.ffn, name).weight
        state[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        state[f"{layer}.post_attention_layernorm.weight"] = block.ffn_norm.weight
    csm.load_state_dict(state)
    return csm


def test_the_depth_decoder_is_that_of_csm():
    """Logits of all codes but the first, which CSM leaves to its backbone, and the gradients of their loss."""
    codec = build(SPEAKING).codec
    csm = csm_of(codec)
    hidden = torch.randn(5, 32, requires_grad=True)
    code_FK = torch.randint(16, (5, K))
    x_FKC = codec(hidden, code_FK[:, :-1])
    logits = torch.stack([head(x_FKC[:, k]) for k, head in enumerate(codec.heads)], dim=1)[:, 1:]
    ids = torch.cat([torch.zeros(5, 1, dtype=torch.int64), code_FK[:, :-1]], dim=1)
    theirs = hidden.detach().clone().requires_grad_()
    wanted = csm(input_ids=ids, backbone_last_hidden_state=theirs).logits
    torch.testing.assert_close(logits, wanted, atol=2e-6, rtol=1e-6)
    for each in (logits, wanted):
        cross_entropy(each.flatten(0, 1), code_FK[:, 1:].flatten()).backward()
    torch.testing.assert_close(hidden.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    pairs = {
        "embedding": (codec.embedding.weight, csm.model.embed_tokens.weight),
        "into": (codec.into.weight, csm.model.inputs_embeds_projector.weight),
        "q": (codec.blocks[0].attention.q.weight, csm.model.layers[0].self_attn.q_proj.weight),
        "down": (codec.blocks[1].ffn.down.weight, csm.model.layers[1].mlp.down_proj.weight),
        "head": (codec.heads[2].weight, csm.codebooks_head.weight),
    }
    for name, (ours, other) in pairs.items():
        gradient = other.grad[1].T if name == "head" else other.grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours.grad, gradient, atol=1e-6, rtol=1e-4)


def test_codes_are_added_to_the_input_and_learned():
    """The embeddings of the codes before are summed into the row; the loss is 3 * text + 4 * the mean over codes."""
    network = build(SPEAKING)
    samples = [dataclasses.replace(each, factor_T=None) for each in samples_of(network)]
    code_TK = torch.randint(16, (len(samples[0]), K))
    samples[0] = dataclasses.replace(samples[0], code_TK=code_TK)  # the other one has none
    batch = pack(samples, 40, SPEAKING)
    assert counts(batch)["code_pairs"] == len(code_TK) * 6
    rows = slice(len(code_TK))
    plain = dataclasses.replace(batch, codes=None)
    x_TD = network.embed(batch)[0]
    added = x_TD - network.embed(plain)[0]
    before = torch.cat([torch.full((1, K), 16), code_TK[:-1]])
    wanted = sum(network.codec.embedding.weight[before[:, k] + k * V] for k in range(K))
    torch.testing.assert_close(added[rows], wanted)
    assert added[len(code_TK) :].abs().max() == 0
    loss, loss_R = network(batch)
    hidden_TD = network.decoder.norm(network.hidden(batch))
    logits = network.decoder.head(hidden_TD[batch.target_rows_R], None)
    total_R = 3 * cross_entropy(logits, batch.target_R, reduction="none")
    x_FKC = network.codec(hidden_TD[rows], code_TK[:, :-1])
    for k, head in enumerate(network.codec.heads):
        total_R[rows] += 4 / K * cross_entropy(head(x_FKC[:, k]), code_TK[:, k], reduction="none")
    torch.testing.assert_close(loss_R, total_R.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, total_R.sum(), atol=1e-4, rtol=1e-5)


def test_a_walk_says_codes_as_a_whole_row_would():
    network = build(SPEAKING)
    with torch.no_grad():
        shake(network)
        network.decoder.embedding.weight.mul_(30)
        network.codec.embedding.weight.mul_(30)
    clip = recording(1.1)
    found = list(walk(network, windows_of(clip, network), pad=3))
    tokens, code_TK = [token for token, _ in found], torch.stack([codes for _, codes in found])
    assert code_TK.shape == (14, K) and len(code_TK.unique()) > 3
    [sample] = samples_of(network, [clip])
    token_T, target_T = torch.tensor([3, *tokens[:-1]]), torch.tensor(tokens)
    sample = dataclasses.replace(sample, token_T=token_T, target_T=target_T, factor_T=None, code_TK=code_TK)
    batch = pack([sample], 14, SPEAKING)
    with torch.no_grad():
        *_, predicted_R = network(batch, predict=True)
        hidden_TD = network.decoder.norm(network.hidden(batch))
        x_FKC = network.codec(hidden_TD, code_TK[:, :-1])
    assert predicted_R.tolist() == tokens
    likeliest = [head(x_FKC[:, k])[:, :16].argmax(-1) for k, head in enumerate(network.codec.heads)]
    assert torch.equal(torch.stack(likeliest, 1), code_TK)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads=5"):
        CodecConfig(num_codebooks=3, codebook_size=16, **{**SIZES, "num_heads": 5})


def test_codecs_and_heads_of_embeddings_take_no_adapters():
    """The loss of codes reads the weights of heads, where adapters would not count."""
    text = TextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    config = dataclasses.replace(SPEAKING, text=text, contrastive=ContrastiveConfig(size=8))
    adapted = {path.split(".")[0] for path in adaptable(build(config))}
    assert adapted == {"decoder", "audio", "text"}
