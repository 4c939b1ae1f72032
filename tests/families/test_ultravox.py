"""Ultravox, whose language model lies in a folder of its own, against its published formula in plain PyTorch, around
Whisper and Llama of transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.generation import generate
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE
from avlm.models.log_mel import windows
from avlm.models.whisper import sinusoids
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights, open_model
from avlm.weights.model_from import open_config
from tests.data.small_files import CORPUS, write_tokenizer
from tests.families.measured import close, gradients_close, note
from tests.families.test_audio_families import noise
from tests.families.test_qwen_vl import logits_of
from tests.models.handmade import build, loaded, save

LLAMA = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WHISPER = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40}
WHISPER |= {"num_mel_bins": 16, "max_source_positions": 50, "decoder_layers": 1, "decoder_ffn_dim": 8}
WHISPER |= {"decoder_attention_heads": 2, "vocab_size": 20, "decoder_start_token_id": 1}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SECONDS = [0.1, 0.47, 2.3]  # of clips, in windows of 1 s


@dataclasses.dataclass
class Reference:
    """An Ultravox folder, what it is made of, and its formula."""

    folder: Path
    llama: transformers.LlamaForCausalLM
    encoder: torch.nn.Module
    projector: dict[str, Tensor]

    def features(self, mel: Tensor) -> Tensor:
        """Of a window of log-mel frames (M, W)."""
        encoder, p = self.encoder, self.projector
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None])))).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        x = encoder.layer_norm(x)[0]
        x = F.pad(x, (0, 0, 0, -len(x) % 8)).reshape(-1, 8 * 24)
        a, b = F.linear(rms(x, p["ln_pre.weight"]), p["linear_1.weight"]).chunk(2, dim=1)
        x = F.silu(b) * a
        if "ln_mid.weight" in p:
            return F.linear(rms(x, p["ln_mid.weight"]), p["linear_2.weight"])
        return rms(F.linear(x, p["linear_2.weight"]), p["ln_post.weight"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.fixture(scope="module", params=["0.5, its encoder trained", "0.4, its encoder elsewhere"])
def case(request, tmp_path_factory) -> Reference:
    torch.manual_seed(0)
    here = tmp_path_factory.mktemp("ultravox")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER))
    whisper.encoder.embed_positions.weight.data = sinusoids(torch.arange(50), 24)
    save(llama, here / "llama")
    save(whisper, here / "whisper")
    is_new = request.param.startswith("0.5")
    norm = "ln_mid" if is_new else "ln_post"
    projector = {"ln_pre.weight": torch.rand(192), f"{norm}.weight": torch.rand(20 if is_new else 32)}
    projector |= {"linear_1.weight": torch.randn(40, 192) / 14, "linear_2.weight": torch.randn(32, 20) / 5}
    keys = {"model_type": "ultravox", "hidden_size": 40, "stack_factor": 8, "projector_act": "swiglu"}
    keys |= {"projector_ln_mid": is_new, "text_model_id": str(here / "llama"), "audio_model_id": None}
    tensors = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    if is_new:
        keys["audio_config"] = {"model_type": "whisper", **WHISPER}
        tensors |= {f"audio_tower.{name}": tensor for name, tensor in whisper.encoder.state_dict().items()}
    else:
        keys["audio_model_id"] = str(here / "whisper")
    folder = write_tokenizer(
        here / "ultravox",
        ["<|eot_id|>"],
        CORPUS,
        bos_token=None,
        eos_token="<|eot_id|>",
        chat_template="{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}",
    )
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors, folder / "model.safetensors")
    return Reference(folder, llama, whisper.encoder, projector)


@dataclasses.dataclass
class Prompt:
    sample: EncodedSample
    mels: list[Tensor]


def prompt(config: ModelConfig) -> Prompt:
    """Clips with a text before, between and behind."""
    torch.manual_seed(1)
    mels, ids = [], [5, 6]
    for seconds in SECONDS:
        items = windows(noise(seconds), config.audio)
        mels += items
        ids += [*placeholders("audio", items, config), 7]
    token_T = torch.tensor([*ids, 8, 9, 10])
    target_T = torch.cat([token_T[1:], torch.tensor([IGNORE])])
    target_T[target_T < 0] = IGNORE
    return Prompt(EncodedSample("a", "audio", token_T, target_T, {"audio": mels}), mels)


def embedded(reference: Reference, ask: Prompt) -> Tensor:
    """Of every token, (1, T, D)."""
    token_T = ask.sample.token_T
    x_TD = reference.llama.model.embed_tokens(token_T.clamp(min=0))
    features = torch.cat([reference.features(mel) for mel in ask.mels])
    return x_TD.masked_scatter((token_T == AUDIO)[:, None], features)[None]


@torch.no_grad()
def test_features_logits_and_answers_equal_those_of_the_formula(case):
    config = read_config(case.folder)
    ours = loaded(config, all=case.folder)
    ask = prompt(config)
    frames = [mel.shape[1] for mel in ask.mels]
    assert frames == [10, 47, 100, 100, 30]
    assert (ask.sample.token_T == AUDIO).sum() == sum(-(-number // 16) for number in frames)
    batch = pack([ask.sample], len(ask.sample), config)
    into = torch.zeros(len(ask.sample), 32)
    features, _ = ours.audio_projector(into, batch.audio, ours.audio(batch.audio))
    expected = torch.cat([case.features(mel) for mel in ask.mels])
    close(features[batch.audio.rows], expected, "ultravox features")
    embeddings = embedded(case, ask)
    close(logits_of(ours, batch), case.llama(inputs_embeds=embeddings).logits[0], "ultravox logits")
    [answer] = generate(ours, [ask.sample], stop_ids=[], max_new_tokens=8)
    out = case.llama.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert answer.token_ids == out[0].tolist()
    note("ultravox answers")


def test_gradients_of_the_projector_equal_those_of_the_formula(case):
    config = read_config(case.folder)
    ours = loaded(config, all=case.folder)
    ask = prompt(config)
    batch = pack([ask.sample], len(ask.sample), config)
    ours(batch)[0].backward()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.projector.items()}
    logits = case.llama(inputs_embeds=embedded(dataclasses.replace(case, projector=leaves), ask)).logits[0]
    F.cross_entropy(logits[batch.target_rows_R], batch.target_R, reduction="sum").backward()
    projector = ours.audio_projector
    norm = projector.hidden_norm if config.audio_projector.hidden_norm == "rms" else projector.output_norm
    found = {
        "linear_1.weight": torch.cat([projector.up.weight.grad, projector.gate.weight.grad]),
        "linear_2.weight": projector.down.weight.grad,
        "ln_pre.weight": projector.feature_norm.weight.grad,
    }
    found[next(name for name in leaves if name not in (*found,))] = norm.weight.grad
    gradients_close(found, {name: leaf.grad for name, leaf in leaves.items()}, "ultravox")


@torch.no_grad()
def test_an_export_holds_everything_under_its_names(case, tmp_path):
    config = read_config(case.folder)
    ours = loaded(config, all=case.folder)
    export(config, ours.state_dict(), tmp_path / "out", "ultravox")
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys["hidden_size"] == 40 and "text_model_id" not in keys and keys["architectures"] == ["UltravoxModel"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(case.folder / "model.safetensors").items():
        assert tensors[name].allclose(tensor, atol=1e-6), name  # sinusoids are computed
    for name, tensor in load_file(case.folder.parent / "llama" / "model.safetensors").items():
        assert tensors[f"language_model.{name}"].equal(tensor)
    assert read_config(tmp_path / "out") == config
    again = loaded(config, all=tmp_path / "out")
    assert all(a.equal(b) for a, b in zip(ours.parameters(), again.parameters()))


def test_a_run_and_an_answer_start_from_the_folder_alone(case, tmp_path):
    stage = {"name": "align", "steps": 1, "train": ["audio_projector"], "optimizer": {"lr": 1e-4}}
    tree = {"model": {"from": str(case.folder)}, "data": {"train": "a.jsonl"}, "stages": [stage]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    cfg = open_config(tmp_path / "mine.yaml")
    assert cfg.model == read_config(case.folder) and cfg.init_from.all == str(case.folder)
    assert cfg.stages[0].data.template == "tokenizer" and cfg.stages[0].data.markers == {}
    opened = open_model(str(case.folder))
    model = opened.load(torch.device("cpu"), torch.float32)
    expected = loaded(cfg.model, all=case.folder)
    assert all(a.equal(b) for a, b in zip(model.parameters(), expected.parameters()))
    [report] = load_weights(AVLM(cfg.model), InitFrom(all=str(case.folder)))
    assert f"(model.safetensors) and its decoder from {case.folder.parent / 'llama'}" in str(report)
    assert not report.initialised and {name.split(".")[0] for name in report.names} == set(cfg.model.modules)


def test_what_lies_elsewhere_and_does_not_fit_is_said_in_one_line(case, tmp_path):
    keys = json.loads((case.folder / "config.json").read_text())
    here = case.folder.parent
    for change, said in [
        ({"text_model_id": f"{here}/nowhere"}, "config.json: text_model_id: no model folder .*nowhere"),
        ({"text_model_id": f"{here}/whisper"}, "text_model_id.*whisper holds no DecoderConfig"),
        ({"audio_model_id": f"{here}/llama"}, "audio_model_id.*llama holds no AudioConfig"),
        ({"text_model_id": str(case.folder)}, "text_model_id: .*ultravox leaves modules to other folders itself"),
        ({"text_model_id": 3}, "text_model_id must be a string, not 3"),
        ({"hidden_size": 41}, "hidden_size=41 is odd"),
        ({"projector_act": "relu"}, "projector_act='relu' is not implemented"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size=100 is not implemented"),
        ({"text_model_id": None, "text_config": {"model_type": "gemma"}}, "a decoder of 'gemma'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**keys, **change}))
        with pytest.raises(ValueError, match=said) as error:
            read_config(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("audio_projector", {"bias": True}, r"cannot hold audio_projector\.bias=True"),
        ("audio_projector", {"feature_norm": "none"}, r"audio_projector\.feature_norm=none, only rms"),
        ("audio", {"key_bias": True}, r"audio\.key_bias=True, only False"),
        ("audio", {"pool": 2}, r"audio\.pool=2, only 1"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(case, module, changes, said, tmp_path):
    config = read_config(case.folder)
    config = dataclasses.replace(config, **{module: dataclasses.replace(getattr(config, module), **changes)})
    with pytest.raises(ValueError, match=said):
        export(config, build(config).state_dict(), tmp_path / "out", "ultravox")
