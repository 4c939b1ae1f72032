"""Which file of a folder is read: that of transformers and PEFT, named in the report, and nothing stale."""

import fnmatch
import itertools
import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from avlm.config.model import LoraConfig, ModelConfig
from avlm.config.run import InitFrom
from avlm.models.avlm import AVLM
from avlm.storage.hub import resolve
from avlm.storage.weight_files import choose
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from avlm.weights.peft import Base
from avlm.weights.sources import open_source, read_files
from tests.models.handmade import build, save
from tests.models.test_avlm import AUDIO_ONLY

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
INDEX, PICKLES = "model.safetensors.index.json", "pytorch_model.bin.index.json"
EMBEDDING = "model.embed_tokens.weight"
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def states():
    """Weights of two models of the same shape, told apart by every number."""
    shape = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64)
    return [transformers.LlamaForCausalLM(shape) for _ in range(2)]


def shards(state, folder, suffix):
    """The state in two files and their index."""
    names = sorted(state)
    files = [f"{'model' if suffix == 'safetensors' else 'pytorch_model'}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        part = {name: state[name].contiguous() for name in names if places[name] == file}
        save_file(part, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, folder / file)
    index = INDEX if suffix == "safetensors" else PICKLES
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


WRITE = {
    "model.safetensors": lambda state, folder: save_file(state, folder / "model.safetensors", {"format": "pt"}),
    INDEX: lambda state, folder: shards(state, folder, "safetensors"),
    "pytorch_model.bin": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    PICKLES: lambda state, folder: shards(state, folder, "bin"),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(WRITE, 2)))
def test_of_two_kinds_of_files_the_one_that_transformers_reads_is_read_and_said(first, second, states, tmp_path):
    new, old = states
    save(new, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    WRITE[second](dict(old.state_dict()), tmp_path)
    stale = {path.name for path in tmp_path.iterdir() if "model" in path.name}
    WRITE[first](dict(new.state_dict()), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[EMBEDDING]
    model = AVLM(ModelConfig(decoder=read_config(tmp_path)))
    [report] = load_weights(model, InitFrom(decoder=str(tmp_path)))
    assert model.decoder.embedding.weight.equal(theirs) and theirs.equal(new.state_dict()[EMBEDDING])
    single = [first] if not first.endswith(".json") else report.files.read
    assert report.files.read == single and set(report.files.unread) == stale - {first}
    assert f"decoder from {tmp_path} ({single[0]}" in str(report) and f"leaving {min(stale)}" in str(report)


def test_a_file_that_the_config_names_is_read_in_their_place(states, tmp_path):
    new, old = states
    save(old, tmp_path)
    save_file(dict(new.state_dict()), tmp_path / "tuned.safetensors", {"format": "pt"})
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"transformers_weights": "tuned.safetensors"}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[EMBEDDING]
    source = open_source(tmp_path)
    assert source.tensors[EMBEDDING][:].equal(theirs) and theirs.equal(new.state_dict()[EMBEDDING])
    assert str(source.files) == "tuned.safetensors, leaving model.safetensors unread"
    for odd in ("../tuned.safetensors", "model.bin", 3, "x" * 5000 + ".safetensors"):
        (tmp_path / "config.json").write_text(json.dumps(keys | {"transformers_weights": odd}))
        with pytest.raises(ValueError, match="is not a safetensors file of the folder"):
            read_files(tmp_path, choose(tmp_path))


def test_shards_that_the_index_does_not_name_are_left_aside_and_those_it_lacks_are_an_error(states, tmp_path):
    new, old = (dict(model.state_dict()) for model in states)
    save(states[0], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    places = shards(new, tmp_path, "safetensors")
    save_file(old, tmp_path / "model-00001-of-00001.safetensors")
    source = open_source(tmp_path)
    assert all(source.tensors[name][:].equal(tensor) for name, tensor in new.items())
    assert source.files.unread == ["model-00001-of-00001.safetensors"]
    first, second = sorted(set(places.values()))
    stale = next(name for name, file in places.items() if file == first)
    save_file({name: new[name] for name in new if places[name] == second} | {stale: old[stale]}, tmp_path / second)
    with pytest.raises(ValueError, match=rf"{stale} is in {second}, but the index names {first}"):
        open_source(tmp_path)  # transformers reads the stale one, whose file comes last
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{second} is missing: {INDEX} names it"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "holds no weight_map"),
        ({"weight_map": None}, "holds no weight_map"),
        ({"weight_map": {}}, "holds no weight_map"),
        ({"weight_map": ["a"]}, "holds no weight_map"),
        ({"weight_map": {"a": "x", "b": 1}}, "puts b in 1"),
        ({"weight_map": {"a": ["x"]}}, r"in \['x'\], not a file of the folder"),
        ({"weight_map": {"a": "../x"}}, "not a file of the folder"),
        ({"weight_map": {"a": "x" * 5000}}, "not a file of the folder"),
        ({"weight_map": {"a": "x\0"}}, "not a file of the folder"),
        ({"weight_map": {"a": "x"}}, "x is missing"),
    ],
)
def test_an_index_of_wrong_types_is_one_short_line(index, message, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_files(tmp_path, choose(tmp_path))
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_files_without_tensors_and_folders_with_other_names_say_so(tmp_path):
    for name, write, message in (
        ("model.safetensors", lambda path: save_file({}, path), "holds no tensor"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "cannot be read"),
        ("pytorch_model.bin", lambda path: torch.save({}, path), "holds no tensor"),
        ("pytorch_model.bin", lambda path: torch.save({1: torch.ones(1)}, path), "1 is not a tensor"),
        ("pytorch_model.bin", lambda path: path.write_bytes(b""), "cannot be read"),
        (
            "model.fp16.safetensors",
            lambda path: save_file({"a": torch.ones(1)}, path),
            "there is model.fp16.safetensors",
        ),
    ):
        write(tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_files(tmp_path, choose(tmp_path))
        assert str(error.value).isprintable()
        (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", WRITE)
def test_of_a_hub_model_what_is_read_is_fetched_and_nothing_else(kind, states, tmp_path, monkeypatch):
    remote, here = tmp_path / "remote", tmp_path / "here"
    save(states[0], remote)
    (remote / "model.safetensors").unlink()
    WRITE[kind](dict(states[0].state_dict()), remote)
    for stray in ("model.fp16.safetensors", "consolidated.safetensors", "training_args.bin", "a.gguf"):
        (remote / stray).write_text("x")
    here.mkdir()

    def download(name, allow_patterns, ignore_patterns, local_files_only):
        for file in remote.iterdir():
            fits = lambda patterns, name=file.name: any(fnmatch.fnmatch(name, each) for each in patterns)
            if fits(allow_patterns) and not fits(ignore_patterns):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_source("owner/model")
    assert source.path == here and source.tensors[EMBEDDING][:].equal(states[0].state_dict()[EMBEDDING])
    small = {"config.json", "generation_config.json", kind if kind.endswith(".json") else "config.json"}
    assert {file.name for file in here.iterdir()} == {*source.files.read, *small}
    for name, message in ((INDEX, '{"weight_map": 3}'), ("config.json", "[[")):
        if (remote / name).is_file():
            (remote / name).write_text(message)
            with pytest.raises(ValueError, match=name):
                open_source("owner/model")


def test_of_two_adapter_files_the_one_that_peft_reads_is_read_and_said(tmp_path):
    config = ModelConfig(decoder=AUDIO_ONLY.decoder, lora=LoraConfig(rank=4, targets=["decoder.*.q"]))
    new, old = (build(config, seed=seed) for seed in (1, 2))
    folder = tmp_path / "adapter"
    export(config, new.state_dict(), folder, "adapter", base=Base(name="base"))
    export(config, old.state_dict(), tmp_path / "old", "adapter", base=Base(name="base"))
    torch.save(load_file(tmp_path / "old" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    for expected, said in (
        (new, r"\(adapter_model.safetensors, leaving adapter_model.bin unread\)"),
        (old, r"\(adapter_model.bin\)"),
    ):
        model = build(config, seed=3)
        [report] = load_weights(model, InitFrom(adapter=str(folder)))
        theirs = peft.utils.load_peft_weights(str(folder), device="cpu")
        assert len(theirs) == len(report.names) and all(
            model.get_parameter(name).equal(expected.get_parameter(name)) for name in report.names
        )
        name = next(name for name in theirs if "layers.0" in name and "lora_A" in name)
        assert theirs[name].equal(model.get_parameter("decoder.blocks.0.attention.q.lora_down.weight"))
        assert re.search(said, str(report))
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)


def test_whole_numbers_are_no_weights(states, tmp_path):
    save(states[0], tmp_path)
    state = {name: tensor.clone() for name, tensor in states[0].state_dict().items()}
    state[EMBEDDING] = (100 * state[EMBEDDING]).to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for source in (tmp_path, tmp_path / "state.pt"):
        with pytest.raises(ValueError, match=rf"{EMBEDDING} has dtype .*(I8|int8): quantised weights"):
            load_weights(AVLM(ModelConfig(decoder=read_config(tmp_path))), InitFrom(decoder=str(source)))


@pytest.mark.parametrize("name", ["/nowhere", "/" + "x" * 5000, "a\0b", "a\nb/c/d", "~nobody-has-this-name/x"])
def test_a_name_that_is_no_folder_is_said_so_in_one_line(name):
    for read in (resolve, open_source):
        with pytest.raises((FileNotFoundError, ValueError), match=r"no model folder|is not a valid path") as error:
            read(name)
        assert str(error.value).isprintable() and len(str(error.value)) < 400
