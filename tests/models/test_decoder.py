"""The decoder against transformers, and what packing promises."""

import dataclasses

import pytest
import torch
import transformers

from avlm.config.decoder import DecoderConfig, RopeScaling
from avlm.config.model import ModelConfig
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.families import llama
from avlm.families.door import hugging_face_name
from avlm.models.batch import IGNORE, Batch
from avlm.models.rope import rope_frequencies
from avlm.weights.folder import read_config
from tests.families.measured import close, gradients_close, note
from tests.measurements.elementwise_bytes import compiled_block, eager_block
from tests.models.handmade import build, loaded, make_batch, save

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
GROWING_ROPE = {**YARN_ROPE, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5}
MODELS = {
    "llama2": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "llama3": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama2, stretched": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    ),
    "smollm2": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)),
    "qwen2 with yarn": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, rope_parameters=YARN_ROPE)
    ),
    "ministral3": lambda: transformers.Ministral3ForCausalLM(
        transformers.Ministral3Config(**SIZES, head_dim=16, pad_token_id=None, rope_parameters=GROWING_ROPE)
    ),
    "mistral with a window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=20, head_dim=16)
    ),
    "qwen2 with a window in the last layer": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=2)
    ),
    "qwen3 with a window in some layers": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES,
            use_sliding_window=True,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}


def all_logits(model, batch: Batch) -> torch.Tensor:
    """Logits of every row, through the model's own parts."""
    x_TD = model.hidden(batch)
    return model.decoder.head(model.decoder.norm(x_TD), None)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = MODELS[name]()
    save(theirs, tmp_path)
    config = ModelConfig(decoder=read_config(tmp_path))
    ours = loaded(config, decoder=tmp_path)
    documents = [torch.randint(97, (length,)).tolist() for length in (200, 7)]
    with torch.no_grad():
        logits = all_logits(ours, make_batch(config, documents))
        expected = torch.cat([theirs(torch.tensor([document])).logits[0] for document in documents])
    close(logits, expected, "decoder logits")


@pytest.mark.parametrize(
    "name", ["llama3", "qwen2", "qwen3", "qwen2 with a window in the last layer", "qwen2 with yarn", "ministral3"]
)
def test_gradients_equal_those_of_transformers(name, tmp_path):
    theirs = MODELS[name]()
    save(theirs, tmp_path)
    config = ModelConfig(decoder=read_config(tmp_path))
    ours = loaded(config, decoder=tmp_path)
    document = torch.randint(97, (60,)).tolist()
    ours(make_batch(config, [document]))[0].backward()
    logits = theirs(torch.tensor([document])).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(document[1:]), reduction="sum").backward()
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    prefix = lambda rest: "" if rest == "head.weight" else "model."
    gradients = {}
    for key, parameter in ours.named_parameters():
        rest = key.removeprefix("decoder.")
        gradients[prefix(rest) + hugging_face_name(llama, "decoder", rest)] = parameter.grad
    gradients_close(gradients, expected, "decoder")


def test_answers_past_the_original_context_equal_those_of_transformers(tmp_path):
    """Cached keys stay as they are while the queries grow."""
    theirs = MODELS["ministral3"]()
    save(theirs, tmp_path)
    config = ModelConfig(decoder=read_config(tmp_path))
    prompts = [torch.randint(97, (length,)) for length in (28, 75)]
    samples = [EncodedSample("", "text", token_T, torch.full_like(token_T, IGNORE)) for token_T in prompts]
    answers = generate(loaded(config, decoder=tmp_path), samples, stop_ids=[], max_new_tokens=40)
    for answer, token_T in zip(answers, prompts, strict=True):
        out = theirs.generate(token_T[None], do_sample=False, max_new_tokens=40, eos_token_id=None)
        assert answer.token_ids == out[0, len(token_T) :].tolist()
    note("decoder answers")


DECODER = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_position=128
)


def test_packed_documents_equal_separate_ones():
    config = ModelConfig(decoder=DECODER)
    model = build(config)
    documents = [torch.randint(61, (length,)).tolist() for length in (17, 1, 33, 2)]
    _, packed = model(make_batch(config, documents))
    separate = torch.cat([model(make_batch(config, [document]))[1] for document in documents])
    assert (packed - separate).abs().max() <= 1e-5


def test_no_row_sees_a_later_one():
    config = ModelConfig(decoder=DECODER)
    model = build(config)
    batch = make_batch(config, [torch.randint(61, (20,)).tolist()])
    changed = dataclasses.replace(batch, token_T=torch.cat([batch.token_T[:12], (batch.token_T[12:] + 1) % 61]))
    with torch.no_grad():
        a, b = all_logits(model, batch), all_logits(model, changed)
    assert torch.equal(a[:12], b[:12])
    assert (a[12:] - b[12:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("layers", [None, [0]])
def test_a_window_hides_what_lies_before_it(layers):
    """Two layers that see 5 tokens each reach 8 tokens back, one of them 4."""
    windowed = dataclasses.replace(
        DECODER, sliding_window=5, window_layers=layers, num_layers=2 if layers is None else 1
    )
    config = ModelConfig(decoder=windowed)
    model = build(config)
    batch = make_batch(config, [torch.randint(61, (20,)).tolist()])
    changed = dataclasses.replace(batch, token_T=torch.cat([(batch.token_T[:1] + 1) % 61, batch.token_T[1:]]))
    with torch.no_grad():
        a, b = all_logits(model, batch), all_logits(model, changed)
    reach = 9 if layers is None else 5
    assert torch.equal(a[reach:], b[reach:])
    assert (a[:reach] - b[:reach]).abs().amax(-1).min() > 1e-6


def test_window_layers_that_make_no_sense_are_refused():
    for options, message in (
        ({"window_layers": [0]}, "window_layers needs a sliding_window"),
        ({"sliding_window": 4, "window_layers": [0, 2]}, "must ascend and lie below num_layers=2"),
        ({"sliding_window": 4, "window_layers": [1, 0]}, "must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(DECODER, **options)


def test_tied_embedding_is_one_tensor_with_both_gradients():
    config = ModelConfig(decoder=dataclasses.replace(DECODER, tie_embedding=True))
    model = build(config)
    assert model.decoder.head.weight is model.decoder.embedding.weight
    assert "decoder.head.weight" not in dict(model.named_parameters())
    document = [1, 2, 3, 4, 5]
    model(make_batch(config, [document]))[0].backward()
    gradient = model.decoder.embedding.weight.grad
    assert (gradient.abs().sum(1) > 0).all()  # as head every row takes part in the softmax


def test_a_batch_without_targets_gives_exactly_zero_gradients():
    config = ModelConfig(decoder=DECODER)
    model = build(config)
    loss, loss_R = model(make_batch(config, [[1, 2, 3]], num_targets=0))
    assert loss == 0 and loss_R.shape == (0,)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_bf16_stays_close_to_fp32():
    config = ModelConfig(decoder=DECODER)
    model = build(config)
    batch = make_batch(config, [torch.randint(61, (40,)).tolist()])
    with torch.no_grad():
        exact, rounded = model(batch)[1], model.bfloat16()(batch)[1]
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.1


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    plain = rope_frequencies(DECODER)
    stretched = rope_frequencies(dataclasses.replace(DECODER, rope_scaling=scaling))
    assert torch.equal(plain[:1], stretched[:1])
    assert torch.allclose(plain[-1:] / 8, stretched[-1:])


def test_eager_work_between_products_moves_at_most_twice_the_bytes_of_fused_kernels():
    """The rotation alone moves more: no operator of PyTorch adds two products, so that takes two passes."""
    rows = eager_block(T=1024)
    ratio = {name: moved / least for name, (moved, least) in rows.items()}
    assert ratio["RMSNorm"] <= 1.5 and ratio["SwiGLU"] <= 1.75 and ratio["rotate"] <= 2.75, ratio
    moved, least = map(sum, zip(*rows.values()))
    assert moved <= 2 * least


def test_compiled_work_between_products_moves_few_bytes_more_than_fused_kernels():
    moved, least = compiled_block()
    assert 0.95 * sum(least) <= sum(moved) <= 1.15 * sum(least)
