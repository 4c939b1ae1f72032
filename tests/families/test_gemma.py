"""Text models of Gemma against their classes in transformers."""

import pytest
import torch
import transformers

from avlm.config.model import ModelConfig
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.models.batch import IGNORE
from avlm.weights.folder import read_config
from tests.families.measured import all_gradients_close, close, note
from tests.models.handmade import loaded, make_batch, save

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
GEMMA2 = {"sliding_window": 12, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
MODELS = {
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, **GEMMA2, final_logit_softcapping=1.5)
    ),
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, sliding_window=12, query_pre_attn_scalar=24, layer_types=KINDS, rope_parameters=ROPES
        )
    ),
}
FORMAT = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma2"}


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_answers_equal_those_of_transformers(name, tmp_path):
    theirs = MODELS[name]()
    theirs.set_attn_implementation("eager")  # no other has soft caps
    save(theirs, tmp_path)
    config = ModelConfig(decoder=read_config(tmp_path))
    ours = loaded(config, decoder=tmp_path)
    documents = [torch.randint(97, (length,)).tolist() for length in (60, 7)]
    batch = make_batch(config, documents)
    logits = ours.decoder.head(ours.decoder.norm(ours.hidden(batch)), None)
    of_theirs = [theirs(torch.tensor([document])).logits[0] for document in documents]
    close(logits, torch.cat(of_theirs), f"{FORMAT[name]} logits")

    ours(batch)[0].backward()
    for document, logits in zip(documents, of_theirs):
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="sum").backward()
    all_gradients_close(ours, theirs, FORMAT[name])

    prompts = [torch.tensor(document) for document in documents]
    samples = [EncodedSample("", "text", token_T, torch.full_like(token_T, IGNORE)) for token_T in prompts]
    answers = generate(ours, samples, stop_ids=[], max_new_tokens=20)
    for answer, token_T in zip(answers, prompts, strict=True):
        out = theirs.generate(token_T[None], do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert answer.token_ids == out[0, len(token_T) :].tolist()
    note(f"{FORMAT[name]} answers")
