"""``from``: a run's sizes, weights, tokenizer and prompts come from model folders and runs."""

import dataclasses

import pytest
import transformers
import yaml

from avlm.config.decoder import ExpertsConfig
from avlm.config.load import dump_config, load_config
from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.models.avlm import AVLM
from avlm.storage.checkpoint_files import MARKER
from avlm.weights.compare import check_config
from avlm.weights.load import load_weights
from avlm.weights.model_from import open_config
from tests.data.small_files import write_tokenizer
from tests.models.handmade import save
from tests.models.test_avlm import WHOLE
from tests.training.test_train import ROOT
from tests.weights.test_export_prompts import CHATML, LLAVA, exported

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WHISPER = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LORA = {"train": ["lora"], "steps": 3, "name": "lora", "optimizer": {"lr": 1e-4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("folders")
    exported(LLAVA, here / "llava", "llava", control=CONTROL)
    exported(dataclasses.replace(WHOLE), here / "own", "avlm", "chatml", control=CONTROL, system="Be short.")
    qwen = transformers.Qwen2Config(vocab_size=400, num_key_value_heads=2, max_position_embeddings=512, **SIZES)
    save(transformers.Qwen2ForCausalLM(qwen), here / "qwen")
    write_tokenizer(here / "qwen", CONTROL, chat_template=CHATML, eos_token="<|im_end|>")
    clip = transformers.CLIPVisionConfig(image_size=28, patch_size=14, hidden_act="gelu", **SIZES)
    save(transformers.CLIPVisionModel(clip), here / "clip")
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in WHISPER.items()}
    whisper = transformers.WhisperConfig(d_model=32, num_mel_bins=128, vocab_size=64, pad_token_id=0, **sizes)
    save(transformers.WhisperModel(whisper), here / "whisper")
    return here


@pytest.fixture
def config(tmp_path):
    def config(model, *overrides, **sections):
        tree = {"model": model, "data": {"train": "mine.jsonl"}, "stages": [LORA], **sections}
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        return open_config(path, overrides)

    return config


def test_three_lines_start_lora_on_a_llava(folders, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {{from: {folders / 'llava'}, lora: {{rank: 4}}}}\n"
        "data: {train: mine.jsonl}\n"
        "stages: [{name: lora, steps: 3, train: [lora, vision_projector], optimizer: {lr: 1e-4}}]\n"
    )
    cfg = open_config(path)
    assert cfg.output_dir == "runs/mine"
    assert (cfg.model.decoder.hidden_size, cfg.model.lora.rank) == (LLAVA.decoder.hidden_size, 4)
    assert cfg.model.vision.image_size == LLAVA.vision.image_size and cfg.model.audio is None
    assert cfg.init_from == InitFrom(all=str(folders / "llava"))
    [stage] = cfg.stages
    assert (stage.data.tokenizer, stage.data.template) == (str(folders / "llava"), "tokenizer")
    assert stage.data.seq_length == cfg.model.decoder.max_position
    [report] = load_weights(AVLM(cfg.model), cfg.init_from)
    assert len(report.names) == report.total - sum(report.skipped.values())
    (tmp_path / "again.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "again.yaml") == cfg, "what --print shows needs no folder"


def test_parts_come_from_a_folder_each_and_keys_next_to_from_win(folders, config):
    model = {
        "decoder": {"from": str(folders / "qwen"), "max_position": 256},
        "vision": {"from": str(folders / "clip"), "feature_layer": -1},
        "audio": {"from": str(folders / "whisper")},
        "vision_projector": {"downsample": 2},
    }
    cfg = config(model, stages=[{**LORA, "train": ["audio_projector"]}])
    assert cfg.model.decoder.qkv_bias and cfg.model.decoder.max_position == 256
    assert (cfg.model.vision.activation, cfg.model.vision.feature_layer) == ("gelu", -1)
    assert (cfg.model.audio.num_mels, cfg.model.audio_projector.downsample) == (128, 1)
    assert cfg.model.vision_projector.downsample == 2
    assert (cfg.init_from.decoder, cfg.init_from.audio) == (str(folders / "qwen"), str(folders / "whisper"))
    data = cfg.stages[0].data
    assert (data.tokenizer, data.template, data.seq_length) == (str(folders / "qwen"), "tokenizer", 256)
    own = config(model, "data.template=chatml", "data.seq_length=64", stages=[{**LORA, "train": ["audio_projector"]}])
    assert (own.stages[0].data.template, own.stages[0].data.seq_length) == ("chatml", 64)


def test_a_part_is_taken_from_a_whole_model_and_replaces_that_of_another(folders, config):
    model = {"from": str(folders / "llava"), "decoder": {"from": str(folders / "qwen")}, "lora": {}}
    cfg = config(model)
    assert cfg.model.decoder.qkv_bias
    assert (cfg.init_from.all, cfg.init_from.decoder) == (str(folders / "llava"), str(folders / "qwen"))
    cfg = config({"from": str(folders / "qwen"), "vision": {"from": str(folders / "llava")}, "lora": {}})
    assert cfg.model.vision == dataclasses.replace(LLAVA.vision, num_layers=LLAVA.vision.num_blocks, feature_layer=-1)
    assert (cfg.init_from.decoder, cfg.init_from.all) == (str(folders / "qwen"), None)


def test_a_model_gains_a_tower_and_loses_one(folders, config):
    cfg = config({"from": str(folders / "llava"), "audio": {"from": str(folders / "whisper")}, "lora": {}})
    reports = load_weights(AVLM(cfg.model), cfg.init_from)
    assert [report.entry for report in reports] == ["all", "audio"]
    assert reports[1].initialised == {} and cfg.model.modules[-1] == "audio_projector"
    unused = {"allow_unused": ["vision_tower.*", "multi_modal_projector.*"]}
    text = {"from": str(folders / "llava"), "vision": None, "vision_projector": None, "lora": {}}
    cfg = config(text, init_from=unused)
    [report] = load_weights(AVLM(cfg.model), cfg.init_from)
    assert cfg.model.modules == ["decoder"] and report.initialised.keys() == {"adapters"}
    with pytest.raises(ValueError, match="vision and vision_projector come together"):
        config({"from": str(folders / "llava"), "vision": None, "lora": {}})


def test_a_run_and_an_export_bring_their_prompts_along(folders, config, tmp_path):
    cfg = config({"from": str(folders / "own"), "lora": {}})
    assert dataclasses.replace(cfg.model, lora=None) == ModelConfig(
        **{name: getattr(cfg.model, name) for name in cfg.model.modules}
    )
    assert (cfg.stages[0].data.template, cfg.stages[0].data.system) == ("chatml", "Be short.")
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "checkpoints" / "step_00000003" / MARKER).touch()
    (run / "config.yaml").write_text(dump_config(cfg))
    again = config({"from": str(run), "decoder": {"max_position": 128}})
    assert again.init_from == InitFrom(all=str(run))
    assert again.model.lora == cfg.model.lora and again.model.decoder.max_position == 128
    assert (again.stages[0].data.tokenizer, again.stages[0].data.system) == (str(folders / "own"), "Be short.")


def test_null_keeps_the_sizes_and_leaves_the_weights(folders, config):
    cfg = config({"from": str(folders / "llava"), "lora": {}}, init_from={"all": None})
    assert cfg.init_from == InitFrom() and cfg.model.vision is not None


def test_a_mismatch_lists_every_difference(folders, config):
    decoder = {"from": str(folders / "qwen"), "hidden_size": 64, "num_kv_heads": 4, "max_position": 1024}
    cfg = config({"decoder": decoder, "lora": {}}, "data.seq_length=64")
    with pytest.raises(ValueError) as error:
        load_weights(AVLM(cfg.model), cfg.init_from)
    for difference in ("hidden_size is 64, and there 32", "num_kv_heads is 4, and there 2", "max_position is 1024"):
        assert f"model.decoder.{difference}" in str(error.value)


def test_of_two_mixtures_of_experts_the_field_that_differs_is_named():
    experts = ExpertsConfig(num=8, per_token=2, intermediate_size=16)
    theirs = dataclasses.replace(WHOLE.decoder, experts=experts)
    ours = dataclasses.replace(theirs, experts=dataclasses.replace(experts, num=12))
    with pytest.raises(ValueError, match=r"sizes: model\.decoder\.experts\.num is 12, and there 8$"):
        check_config(ours, theirs, "a folder")


def test_a_linear_projector_differs_from_another_in_its_type():
    theirs = dataclasses.replace(WHOLE, vision_projector=dataclasses.replace(WHOLE.vision_projector, type="linear"))
    for ours, folder, message in ((WHOLE, theirs, "'mlp2x_gelu', and there 'linear'"), (theirs, WHOLE, "'linear'")):
        with pytest.raises(ValueError, match=rf"sizes: model\.vision_projector\.type is {message}"):
            check_config(ours, folder, "a folder")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"from": "nowhere"}, "model.from: no model folder nowhere"),
        ({"from": 7}, "model.from must be a folder, a run or a name of the Hub, not 7"),
        ({"from": "clip"}, "is a tower: name it as model.vision.from"),
        ({"from": "qwen", "vision": {"from": "whisper"}}, "model.vision.from is .*which holds no VisionConfig"),
        ({"from": "qwen", "audio": {"from": "llava"}}, "holds no AudioConfig"),
        ({"decoder": {"from": "owner/absent"}}, "model.decoder.from: owner/absent is not a local folder and could not"),
        ({"from": "qwen", "lora": {"rnk": 3}}, r"unknown key model.lora.rnk \(did you mean rank\?\)"),
    ],
)
def test_what_from_cannot_be_is_said_with_its_key(model, message, folders, config):
    def placed(value):
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return str(folders / value) if isinstance(value, str) and (folders / value).is_dir() else value

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config(placed(model))


def test_weights_that_two_entries_give_are_an_error(folders, config):
    model = {"decoder": {"from": str(folders / "qwen")}, "lora": {}}
    for everything in (str(folders / "llava"), "owner/model"):
        with pytest.raises(ValueError, match="both give the decoder weights"):
            config(model, init_from={"all": everything})
    assert config(model, init_from={"all": "projector.pt"}).init_from.decoder == str(folders / "qwen")
    with pytest.raises(ValueError, match=r"model.from=.* and init_from.all=projector.pt both give the weights"):
        config({"from": str(folders / "llava"), "lora": {}}, init_from={"all": "projector.pt"})


def test_sections_that_hold_no_keys_are_said_by_name(folders, config):
    model = {"from": str(folders / "qwen"), "lora": {}}
    with pytest.raises(ValueError, match="init_from must hold keys and values, not here"):
        config(model, init_from="here")
    with pytest.raises(ValueError, match="data must hold keys and values, not mine"):
        config(model, data="mine.jsonl")
    with pytest.raises(ValueError, match=r"model\.decoder: .* got None"):
        config({**model, "decoder": None})


STARTERS = {
    "lora_llava": {"model.from": "llava"},
    "alignment": {"model.decoder.from": "qwen", "model.vision.from": "clip", "model.audio.from": "whisper"},
    "speech": {"model.decoder.from": "qwen", "model.audio.from": "whisper"},
    "from_nothing": {},
}


def test_every_starter_is_a_config_whatever_its_models(folders):
    paths = sorted((ROOT / "configs" / "starters").glob("*.yaml"))
    assert {path.stem for path in paths} == STARTERS.keys()
    for path in paths:
        overrides = [f"{key}={folders / name}" for key, name in STARTERS[path.stem].items()]
        cfg = open_config(path, [*overrides, "data.seq_length=256"])
        assert cfg.output_dir == f"runs/{path.stem}" and cfg.stages[-1].epochs
        assert cfg.stages[0].data.template in ("tokenizer", "chatml")
        assert f"cp configs/starters/{path.name} mine.yaml" in path.read_text()
