"""Features that are added to tokens, as Moshi adds its streams; weights in the loss; a model that walks the rows."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import MoshiConfig
from transformers.models.moshi.modeling_moshi import MoshiForCausalLM

from avlm.config.connector import ResamplerConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.data.media import audio
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.evaluation.listening import features_of, walk, windows_of
from avlm.models.avlm import AVLM
from kernels.cross_entropy import linear_cross_entropy
from tests.models.handmade import build

VOCABULARY = 64
CONFIG = ModelConfig(
    decoder=DecoderConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4},
        **{"num_kv_heads": 2, "norm_eps": 1e-8, "rope_theta": 10000.0, "max_position": 64},
    ),
    audio=AudioConfig(
        hidden_size=24, intermediate_size=48, num_layers=1, num_heads=2, num_mels=16, max_positions=20
    ),  # windows of 400 ms
    audio_projector=ProjectorConfig(downsample=4, add=True),
)
ADAPTER = ResamplerConfig(type="conformer", num_layers=1, num_heads=2, intermediate_size=24)
SECONDS = (1.7, 0.9)  # of two recordings: 22 and 12 rows


def recording(seconds: float) -> Tensor:
    return torch.randn(round(16_000 * seconds)) * 0.1


def samples_of(network: AVLM, clips: list[Tensor] | None = None) -> list[EncodedSample]:
    """Recordings in which anything is said, with weights."""
    torch.manual_seed(1)
    samples = []
    for clip in clips or map(recording, SECONDS):
        windows = [mel for window in windows_of(clip, network) for mel in audio.mels(window, network.config.audio)]
        num_rows = sum(len(features_of(network, window)) for window in windows_of(clip, network))
        token_T = torch.randint(VOCABULARY, (num_rows + 1,))
        of_sample = token_T[:-1], token_T[1:], {"image": [], "audio": windows}
        samples.append(EncodedSample("", "audio", *of_sample, factor_T=torch.rand(num_rows)))
    return samples


def moshi_of(network: AVLM) -> MoshiForCausalLM:
    """A MoshiForCausalLM with the weights of our decoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MoshiConfig(
        **sizes, vocab_size=VOCABULARY, ffn_dim=2 * 48, head_dim=8, sliding_window=64, max_position_embeddings=64
    )
    config._attn_implementation = "sdpa"
    decoder = network.decoder
    state = {"model.norm.weight": decoder.norm.weight, "lm_head.weight": decoder.head.weight}
    padding = torch.zeros(1, 32)
    state["model.embed_tokens.weight"] = torch.cat([decoder.embedding.weight, padding])
    for i, block in enumerate(decoder.blocks):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            state[f"{layer}.self_attn.{name}_proj.linear.weight"] = getattr(block.attention, name).weight
        state[f"{layer}.mlp.fc1.weight"] = torch.cat([block.ffn.gate.weight, block.ffn.up.weight])
        state[f"{layer}.mlp.fc2.weight"] = block.ffn.down.weight
        state[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        state[f"{layer}.post_attention_layernorm.weight"] = block.ffn_norm.weight
    moshi = MoshiForCausalLM(config).eval()
    moshi.load_state_dict(state)
    return moshi


def test_the_loss_of_summed_streams_is_that_of_moshi():
    """Moshi adds the embeddings of its streams (MoshiForConditionalGeneration.forward: inputs_embeds = text + sum of
    codes) and runs its decoder on the sum. Ours with the same weights gives its logits, the weighted loss and the
    gradients, of the tower too."""
    network = build(CONFIG)
    batch = pack(samples_of(network), 40, CONFIG)
    moshi = moshi_of(network)
    names = ("decoder.embedding.weight", "audio_projector.up.weight", "audio.conv1.weight")
    ours = [network.get_parameter(name) for name in names]
    loss, loss_R = network(batch)
    (loss / batch.num_targets).backward()
    found = [parameter.grad.clone() for parameter in ours]
    network.zero_grad()

    features = network.audio(batch.audio)
    heard = network.audio_projector(torch.zeros(len(batch.token_T), 32), batch.audio, features)[0]
    total = weight = torch.zeros(())
    start, wanted = 0, []
    for num_rows in (22, 12):
        part = slice(start, start + num_rows)
        streams = moshi.model.embed_tokens(batch.token_T[part]) + heard[part]
        logits = moshi(inputs_embeds=streams[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, batch.target_R[part], reduction="none")
        wanted.append(losses * batch.factor_R[part])
        total, weight = total + wanted[-1].sum(), weight + batch.factor_R[part].sum()
        start += num_rows
    (total / weight).backward()
    torch.testing.assert_close(loss_R, torch.cat(wanted).detach(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-6)
    of_tokens = moshi.model.embed_tokens.weight.grad[:VOCABULARY]
    for gradient, reference in zip(found, [of_tokens, *(network.get_parameter(name).grad for name in names[1:])]):
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("window, adapter", [(None, None), (5, None), (None, ADAPTER)])
def test_walking_the_rows_says_what_a_whole_row_would(window, adapter):
    """Row by row, with a cache and window after window, the model says what one forward over all it said predicts; with
    a sliding window of the decoder, and an adapter of Conformer blocks, too."""
    decoder = dataclasses.replace(CONFIG.decoder, sliding_window=window, window_layers=[1] if window else None)
    projector = dataclasses.replace(CONFIG.audio_projector, resampler=adapter)
    config = dataclasses.replace(CONFIG, decoder=decoder, audio_projector=projector)
    network = build(config)
    with torch.no_grad():
        network.decoder.embedding.weight.mul_(30)  # so that what is said depends on what was
    clip = recording(1.7)
    tokens = [token for token, _ in walk(network, windows_of(clip, network), pad=3)]
    assert len(tokens) == 22 and len(set(tokens)) > 3
    windows = [mel for part in windows_of(clip, network) for mel in audio.mels(part, CONFIG.audio)]
    token_T = torch.tensor([3, *tokens[:-1]])
    batch = pack([EncodedSample("", "audio", token_T, torch.tensor(tokens), {"audio": windows})], 22, config)
    with torch.no_grad():
        _, _, predicted_R = network(batch, predict=True)
    assert predicted_R.tolist() == tokens


def test_factors_weigh_the_loss_of_each_row_and_its_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    target = torch.randint(17, (9,))
    target[4] = -100
    factor = torch.rand(9)
    loss, loss_R = linear_cross_entropy(hidden, weight, target, factor_R=factor)
    found = torch.autograd.grad(2 * loss, (hidden, weight))
    each = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none") * factor
    wanted = torch.autograd.grad(2 * each.sum(), (hidden, weight))
    torch.testing.assert_close(loss_R, each.detach())
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
