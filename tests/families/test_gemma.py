"""Text models of Gemma against their classes in transformers."""

import dataclasses

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

from avlm.config.decoder import DecoderConfig
from avlm.config.model import LoraConfig, ModelConfig
from avlm.config.run import InitFrom
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.families import gemma, gemma2
from avlm.families.door import family_of
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE
from avlm.models.decoder import TokenEmbedding
from avlm.models.encoder import OffsetRMSNorm
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import init_weights
from tests.families.measured import all_gradients_close, close, note
from tests.models.handmade import build, loaded, make_batch, save
from tests.models.test_avlm import WHOLE
from tests.weights.test_peft import command, write_trained

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
LINEAR = {"rope_type": "linear", "factor": 8.0}
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


OURS = DecoderConfig(
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4},
    **{"num_kv_heads": 2, "head_dim": 12, "rope_theta": 1e4, "norm_eps": 1e-6, "max_position": 256},
    **gemma.VARIANTS["gemma"],
)
SECOND = dataclasses.replace(
    OURS, post_norms=True, score_size=20.0, attention_softcap=2.0, logit_softcap=3.0, sliding_window=9
)
THIRD = dataclasses.replace(
    SECOND, qk_norm=True, attention_softcap=None, window_layers=[0, 1], window_rope_theta=500.0, rope_stretch=4.0
)
DECODERS = {
    "gemma": OURS,
    "gemma with a tied head, stretched": dataclasses.replace(OURS, tie_embedding=True, rope_stretch=2.0),
    "gemma2": SECOND,
    "gemma2 without windows": dataclasses.replace(SECOND, sliding_window=None, score_size=None, logit_softcap=None),
    "gemma3_text": THIRD,
    "gemma3_text with one base": dataclasses.replace(THIRD, window_rope_theta=None, rope_stretch=1.0),
    "gemma3_text with a window as long as its rows": dataclasses.replace(THIRD, sliding_window=256),
}
CONFIGS = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}


@pytest.mark.parametrize("name", DECODERS)
def test_an_export_is_read_back_in_both_dialects_and_has_the_logits_of_transformers(name, tmp_path):
    config = dataclasses.replace(WHOLE, decoder=DECODERS[name])
    model = build(config)
    model_type = name.split()[0]
    export(config, model.state_dict(), tmp_path / "out", FORMAT[model_type])
    assert read_config(tmp_path / "out") == DECODERS[name]
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.model_type == model_type
    newer = theirs.config.to_dict()
    assert "rope_parameters" in newer and "rope_theta" not in newer
    assert gemma.read(newer) == DECODERS[name]
    document = torch.randint(61, (100,)).tolist()
    with torch.no_grad():
        logits = model.decoder.head(model.decoder.norm(model.hidden(make_batch(config, [document]))), None)
        close(logits, theirs(torch.tensor([document])).logits[0], f"{FORMAT[model_type]} export")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_absent_keys_have_the_defaults_of_their_class(model_type):
    assert gemma.read({"model_type": model_type}) == gemma.read(CONFIGS[model_type]().to_dict())


def test_the_keys_of_published_folders_are_those_of_the_newer_dialect():
    """Gemma 3 of 4B and more, as transformers 4 wrote it: a pattern of layers, two bases and one scaling."""
    sizes = {"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 1024}
    ropes = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    found = gemma.read({**sizes, **ropes, "sliding_window_pattern": 6, "query_pre_attn_scalar": 168})
    assert found.window_layers == [0, 1, 2, 3, 4, 6, 7] and found.sliding_window == 1024
    assert (found.rope_theta, found.rope_stretch, found.window_rope_theta) == (1e6, 8.0, 2e4)
    assert found.score_size == 168 and found.tie_embedding
    assert gemma.read(transformers.Gemma3TextConfig(**sizes, **ropes, query_pre_attn_scalar=168).to_dict()) == found
    second = gemma.read({"model_type": "gemma2", "num_hidden_layers": 4})
    assert (second.window_layers, second.attention_softcap, second.logit_softcap) == ([0, 2], 50.0, 30.0)
    assert gemma.read({"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window_pattern": 3}) == second
    no_pattern = gemma.read({**sizes, **ropes, "sliding_window_pattern": None, "query_pre_attn_scalar": 168})
    assert no_pattern == found


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"model_type": "gemma", "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": None}, "no sliding_window"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "full_attention and sliding_attention"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "rope_type 'linear'"),
        ({"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}}, "rope_type 'linear'"),
        ({"rope_parameters": ROPES, "rope_scaling": LINEAR}, "rope_scaling beside rope_parameters"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0 is not a number of layers"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named) as error:
        gemma.read({"model_type": "gemma3_text", "num_hidden_layers": 6, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "odd", "wanted"),
    [
        ("sliding_window_pattern", 2.5, "an integer"),
        ("rope_local_base_freq", "10000", "a number"),
        ("rope_parameters", {"full_attention": [1]}, "an object"),
        ("rope_parameters", {"sliding_attention": 7}, "an object"),
    ],
)
def test_a_key_of_another_type_is_named(key, odd, wanted):
    inner = f"{next(iter(odd))} " if isinstance(odd, dict) else " "
    with pytest.raises(ValueError, match=rf"{key}\.?{inner}must be {wanted}, not"):
        family_of({"model_type": "gemma3_text", key: odd})


@pytest.mark.parametrize(
    ("format", "decoder", "named"),
    [
        ("gemma", SECOND, "post_norms=True: take gemma2"),
        ("gemma2", OURS, "post_norms=False: take gemma"),
        ("decoder", OURS, "activation=gelu_tanh: Gemma's are gemma and gemma2"),
        ("gemma", dataclasses.replace(OURS, qkv_bias=True), "decoder.qkv_bias=True"),
        ("gemma", dataclasses.replace(OURS, sliding_window=9), "decoder.sliding_window=9"),
        ("gemma2", dataclasses.replace(SECOND, window_rope_theta=9.0), "decoder.window_rope_theta=9.0"),
        ("gemma2", dataclasses.replace(THIRD, score_size=20.5), "score_size=20.5"),
        ("gemma2", dataclasses.replace(THIRD, attention_softcap=9.0), "attn_logit_softcapping=9.0"),
        ("gemma2", dataclasses.replace(THIRD, bidirectional="prefix"), "bidirectional=prefix"),
    ],
)
def test_formats_refuse_what_they_cannot_hold(format, decoder, named, tmp_path):
    config = ModelConfig(decoder=decoder)
    with pytest.raises(ValueError, match=named):
        export(config, build(config).state_dict(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_images_that_see_each_other_do_not_matter_to_a_text_model(tmp_path):
    config = ModelConfig(decoder=dataclasses.replace(THIRD, bidirectional="images"))
    export(config, build(config).state_dict(), tmp_path / "out", "gemma2")
    assert read_config(tmp_path / "out") == THIRD


@pytest.mark.parametrize(("decoder", "onto"), [(OURS, "gemma"), (THIRD, "gemma2")])
def test_adapters_of_a_decoder_with_towers_load_onto_its_own_class(decoder, onto, tmp_path, monkeypatch, capsys):
    export(ModelConfig(decoder=decoder), build(ModelConfig(decoder=decoder)).state_dict(), tmp_path / "base", onto)
    config = dataclasses.replace(WHOLE, decoder=decoder, lora=LoraConfig(rank=4, targets=["decoder.*"]))
    model = AVLM(config)
    start = InitFrom(decoder=str(tmp_path / "base"))
    init_weights(model, start, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 * ("lora_" in name))
    write_trained(tmp_path / "run", model, ["lora"], start)
    arguments = [tmp_path / "run", tmp_path / "adapter", "--format", "adapter"]
    with pytest.raises(ValueError, match=f"--onto {onto} writes the adapters of the decoder alone"):
        command(monkeypatch, *arguments)
    command(monkeypatch, *arguments, "--onto", onto)
    theirs = eval(
        capsys.readouterr().out.split("load it: ")[1].splitlines()[0], {"transformers": transformers, "peft": peft}
    )
    theirs.get_base_model().set_attn_implementation("eager")
    document = torch.randint(61, (40,)).tolist()
    with torch.no_grad():
        logits = model.decoder.head(model.decoder.norm(model.hidden(make_batch(config, [document]))), None)
        close(logits, theirs.eval()(torch.tensor([document])).logits[0], f"{onto} adapters")


def test_a_file_of_tensors_is_told_from_llamas_by_its_norms(tmp_path):
    config = ModelConfig(decoder=SECOND)
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "gemma2")
    torch.save(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "alone.pt")
    again = loaded(config, decoder=tmp_path / "alone.pt")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))
    first = ModelConfig(decoder=OURS)
    export(first, build(first).state_dict(), tmp_path / "first", "gemma")
    torch.save(load_file(tmp_path / "first" / "model.safetensors"), tmp_path / "first.pt")
    with pytest.raises(ValueError, match=r"have no name for decoder\.blocks\.0\.attention_post_norm\.weight"):
        loaded(config, decoder=tmp_path / "first.pt")
    assert set(gemma2.NAMES["decoder"]) - set(gemma.NAMES["decoder"]) == {
        "blocks.{i}.attention_post_norm",
        "blocks.{i}.ffn_post_norm",
    }


def test_norms_and_embeddings_round_as_those_of_transformers_in_bf16():
    """sqrt(2560) becomes 50.5, and 1 + weight is not rounded."""
    size = 2560
    theirs, ours = Gemma3RMSNorm(size).bfloat16(), OffsetRMSNorm(size, 1e-6).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_(std=0.3))
    x = (3 * torch.randn(50, size)).bfloat16()
    different = ours(x) != theirs(x)
    assert different.float().mean() < 1e-3  # float32 sums of another order
    config = DecoderConfig(**{**dataclasses.asdict(OURS), "hidden_size": size, "head_dim": 16})
    embedding = TokenEmbedding(config).bfloat16()
    scaled = Gemma3TextScaledWordEmbedding(61, size, 0, size**0.5).bfloat16()
    scaled.weight = embedding.weight
    assert embedding(torch.arange(61)).equal(scaled(torch.arange(61)))
    assert not embedding(torch.tensor([-200])).any()
