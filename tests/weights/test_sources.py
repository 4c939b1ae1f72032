"""Weights from runs, checkpoints of any layout, single files and PEFT folders; allow lists and reports."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from avlm.config.load import dump_config
from avlm.config.model import LoraConfig
from avlm.config.run import Config, DataConfig, InitFrom, OptimizerConfig, StageConfig
from avlm.models.avlm import AVLM
from avlm.models.lora import is_adapter
from avlm.preflight.check import check
from avlm.storage.checkpoint_files import MARKER
from avlm.storage.run_folder import Progress, folder_of, is_run
from avlm.training import checkpoint
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import init_weights, load_weights
from avlm.weights.peft import Base
from avlm.weights.sources import Stored, Turned, Whole, open_source
from tests.models.handmade import build, loaded, save
from tests.models.test_avlm import AUDIO_ONLY, DECODER, VISION_ONLY, WHOLE, llava

LORA = LoraConfig(rank=4, alpha=6.0, targets=["decoder.*", "audio.*.up"], dora=True)
ADAPTED = dataclasses.replace(WHOLE, lora=LORA)


def run_config(model, folder, data=None):
    data = data or DataConfig(train="synthetic", seq_length=64)
    stage = StageConfig(name="a", steps=9, optimizer=OptimizerConfig(lr=1e-3), data=data, train=["decoder"])
    return Config(output_dir=str(folder), model=model, stages=[stage])


class Attribute:
    """Pickled as Python 3.11.2 pickles a member of an Enum."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


def write_run(folder, model, step=3, data=None):
    """A run folder with the weights of a model as its checkpoint of a step."""
    path = folder_of(folder, step)
    path.mkdir(parents=True)
    dcp.save({"model": checkpoint.model_tensors(model)}, checkpoint_id=path, no_dist=True)
    (path / MARKER).write_text(json.dumps(dataclasses.asdict(Progress(step=step))))
    (folder / "config.yaml").write_text(dump_config(run_config(model.config, folder, data)))
    return path


def equal(model, other, names=None):
    return all(
        parameter.equal(other.get_parameter(name))
        for name, parameter in model.named_parameters()
        if names is None or name in names
    )


@pytest.mark.parametrize("tie", [False, True])
def test_a_run_and_a_checkpoint_of_it_load_like_their_export(tie, tmp_path):
    config = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, tie_embedding=tie))
    older, newer = build(config, seed=1), build(config, seed=2)
    first, _ = (write_run(tmp_path, model, step) for step, model in ((3, older), (5, newer)))
    assert equal(newer, loaded(config, all=tmp_path))
    assert equal(older, loaded(config, all=first))
    tower = AVLM(config)
    [report] = load_weights(tower, InitFrom(vision=str(first)))
    assert equal(older, tower, report.names) and all(name.startswith("vision.") for name in report.names)
    assert len(report.names) + report.skipped["other modules"] == report.total == len(list(older.parameters()))


def test_a_stored_tensor_reads_the_region_that_is_asked_for(tmp_path):
    write_run(tmp_path, build(WHOLE))
    tensor = open_source(tmp_path).tensors["decoder.blocks.1.ffn.up.weight"]
    whole = build(WHOLE).decoder.blocks[1].ffn.up.weight
    assert isinstance(tensor, Stored) and tensor.get_shape() == [48, 32]
    for region in (slice(None), slice(5, 9), (slice(5, 9), slice(30, 32)), (slice(0, 48), slice(3, 4))):
        assert tensor[region].equal(whole[region]), region


@pytest.mark.parametrize("wrapper", ["", "model.", "module."])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_single_file_loads_under_our_names(wrapper, key, tmp_path):
    model = build(ADAPTED)
    state = {wrapper + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "last.ckpt")
    assert equal(model, loaded(ADAPTED, all=tmp_path / "last.ckpt"))


def test_a_single_file_loads_under_the_names_of_hugging_face(tmp_path):
    theirs = llava()
    save(theirs, tmp_path / "folder")
    config = read_config(tmp_path / "folder")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "llava.pt")
    whole = loaded(config, all=tmp_path / "folder")
    assert equal(whole, loaded(config, all=tmp_path / "llava.pt"))
    model = AVLM(config)
    load_weights(model, InitFrom(vision=str(tmp_path / "llava.pt")))
    assert model.vision.position.equal(whole.vision.position)
    with pytest.raises(ValueError, match="holds no module that this entry could provide"):
        load_weights(AVLM(AUDIO_ONLY), InitFrom(audio=str(tmp_path / "llava.pt")))


class Code:
    def __reduce__(self):
        return (print, ("this must not be printed",))


def test_what_is_indexed_of_a_turned_tensor_is_read_the_other_way_round():
    for shape in ((5, 3), (2, 5, 3)):
        held = torch.randn(shape)
        turned, expected = Turned(Whole(held)), held.transpose(-1, -2)
        assert turned.get_shape() == list(expected.shape)
        rows, columns = slice(1, 3), slice(0, 4)
        for index in (slice(1, 2), (rows,), (slice(0, 1), rows), (slice(0, 2), rows, columns)[-len(shape) :]):
            assert turned[index].equal(expected[index])


def test_files_that_are_no_weights_are_one_line_and_run_no_code(tmp_path, capsys):
    contents = {"code.pt": {"w": Code()}, "nested.pt": {"model": {"w": torch.zeros(1)}}, "list.pt": [torch.zeros(1)]}
    said = {
        "code.pt": "code in weight files is not run",
        "nested.pt": "'model' is not a tensor",
        "list.pt": "holds no state_dict",
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "nested.pt").read_bytes()[:300])
    (tmp_path / "a.txt").write_text("x")
    said |= {"cut.ckpt": "cannot be read", "a.txt": "does not end in .ckpt, .pt, .pth"}
    for name, message in said.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(AVLM(WHOLE), InitFrom(all=str(tmp_path / name)))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert "must not" not in capsys.readouterr().out


class Touch:
    """What its pickle runs leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_checkpoint_runs_no_code_and_reads_no_file_outside_its_folder(tmp_path):
    model, mark = build(WHOLE), tmp_path / "ran"
    path = write_run(tmp_path / "run", model)
    index = path / ".metadata"
    good, name = index.read_bytes(), "model.decoder.norm.weight"
    place = next(key for key in pickle.loads(good).storage_data if key.fqn == name)

    def hide(metadata):
        """Bytes that DCP would unpickle as they are, where the model has a tensor."""
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data = {**metadata.storage_data, MetadataIndex(name): metadata.storage_data[place]}

    def change(attribute, value):
        return lambda metadata: setattr(metadata, attribute, value)

    changes = {
        "path.*touch|Path.touch": change("planner_data", Touch(mark)),
        "is not a tensor|BytesStorage": hide,
        "not a plain file": lambda metadata: setattr(metadata.storage_data[place], "relative_path", "../../x"),
        "zstd.*not a plain file|not a plain file": lambda m: setattr(
            m.storage_data[place], "transform_descriptors", ["zstd"]
        ),
        "takes __init__ of .*Metadata.*, which is not a member": change(
            "planner_data", Attribute(Metadata, "__init__")
        ),
        "names no files": change("storage_data", None),
        "holds no Metadata": change("state_dict_metadata", None),
        "has no shape": lambda metadata: setattr(metadata.state_dict_metadata[name], "size", [2, 3]),
    }
    for message, edit in changes.items():
        metadata = pickle.loads(good)
        edit(metadata)
        index.write_bytes(pickle.dumps(metadata))
        for read in (open_source, lambda folder: checkpoint.load_model(folder, build(WHOLE))):
            with pytest.raises(ValueError, match=message) as error:
                read(path)
            assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for damaged in (pickle.dumps(Touch(mark)), pickle.dumps([1]), good[:500], b"", b"\x80\x05junk"):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is not the index of a checkpoint"):
            open_source(path)
    index.unlink()
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: No such file"):
        open_source(path)
    assert not mark.exists()
    index.write_bytes(good)
    assert equal(model, loaded(WHOLE, all=path))


def test_a_folder_with_a_config_json_is_a_model_folder_whatever_else_it_holds(tmp_path):
    theirs = llava()
    folder = tmp_path / "checkpoints" / "step_00000010"  # a name that a trainer of others may give as well
    save(theirs, folder)
    (folder / "config.yaml").write_text("a: 1")
    (folder / MARKER).write_text("{}")
    inner = folder / "checkpoints" / "step_00000001"
    inner.mkdir(parents=True)
    (inner / MARKER).write_text("{}")
    (inner / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert not is_run(folder) and is_run(inner)
    config = read_config(folder)
    model = loaded(config, all=folder)
    assert (
        model.vision.position.equal(theirs.model.vision_tower.embeddings.position_embedding.weight)
        and not (tmp_path / "ran").exists()
    )


def test_what_is_missing_or_has_no_place_is_named_unless_it_is_allowed(tmp_path):
    model = build(WHOLE)
    state = model.state_dict()
    del state["vision.position"]
    state["decoder.blocks.0.attention.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pt")
    init = InitFrom(all=str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"no tensor vision.position for vision.position \(17, 24\).*allow_missing"):
        load_weights(AVLM(WHOLE), init)
    init = dataclasses.replace(init, allow_missing=["vision.pos"])
    with pytest.raises(
        ValueError, match=r"1 tensors .* no place for: decoder.blocks.0.attention.bias \(3,\).*allow_unused"
    ):
        load_weights(AVLM(WHOLE), init)
    init = dataclasses.replace(init, allow_unused=[r"decoder\.blocks\.\d+\.attention\.bias"])
    other = build(WHOLE, seed=7)
    [report] = load_weights(other, init)
    assert equal(model, other, set(state)) and not equal(model, other)
    assert report.initialised == {"vision": 1} and report.skipped == {"init_from.allow_unused": 1}
    assert "parameters initialised from scratch: 1 (vision)" in str(report)
    for key, pattern, near in (
        ("allow_missing", "vision.positions", "vision.position"),  # of no parameter
        ("allow_missing", "decoder.norm", "vision.position"),  # of one that is there
        ("allow_unused", "decoder.heads", "decoder.head"),
        ("allow_unused", "(", "not a regular expression"),
    ):
        with pytest.raises(ValueError, match=f"init_from.{key} holds .*{near}"):
            load_weights(AVLM(WHOLE), dataclasses.replace(init, **{key: [*getattr(init, key), pattern]}))


def test_a_source_with_fewer_modules_leaves_the_others_to_be_initialised(tmp_path):
    vision = build(VISION_ONLY)
    write_run(tmp_path, vision)
    model = AVLM(WHOLE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    [report] = init_weights(model, InitFrom(all=str(tmp_path)), seed=1)
    assert equal(vision, model) and not any(parameter.isnan().any() for parameter in model.parameters())
    count = lambda part: len([name for name, _ in model.named_parameters() if name.split(".")[0] == part])
    assert report.initialised == {part: count(part) for part in ("audio", "audio_projector")}
    with pytest.raises(ValueError, match=r"no place for: vision\..*allow_unused"):  # and the other way round
        load_weights(AVLM(AUDIO_ONLY), InitFrom(all=str(tmp_path)))
    text = dataclasses.replace(AUDIO_ONLY, audio=None, audio_projector=None)
    assert equal(loaded_with(text, all=str(tmp_path), allow_unused=["vision"]), vision)


def loaded_with(config, **keys):
    model = AVLM(config)
    load_weights(model, InitFrom(**keys))
    return model


def test_adapters_come_from_a_source_that_has_them_and_are_initialised_if_it_has_none(tmp_path):
    plain, adapted = build(WHOLE), build(ADAPTED, seed=3)
    write_run(tmp_path / "plain", plain)
    write_run(tmp_path / "adapted", adapted)
    model = AVLM(ADAPTED)
    [report] = init_weights(model, InitFrom(all=str(tmp_path / "plain")), seed=1)
    assert equal(plain, model) and list(report.initialised) == ["adapters"]
    again = AVLM(ADAPTED)
    [report] = init_weights(again, InitFrom(all=str(tmp_path / "adapted")), seed=1)
    assert equal(adapted, again) and not report.initialised  # the magnitudes of DoRA too
    with pytest.raises(ValueError, match=r"has adapters, and model\.lora is null"):
        loaded_with(WHOLE, all=str(tmp_path / "adapted"))
    for key, value in (("rank", 2), ("alpha", 1.0), ("rslora", True), ("dora", False)):
        other = dataclasses.replace(WHOLE, lora=dataclasses.replace(LORA, **{key: value}))
        with pytest.raises(ValueError, match=rf"model.lora.{key} is {value}, and the adapters of .* were made with"):
            loaded_with(other, all=str(tmp_path / "adapted"))
    fewer = dataclasses.replace(WHOLE, lora=dataclasses.replace(LORA, targets=["decoder.*"]))
    with pytest.raises(ValueError, match=r"no place for: audio.*lora_"):
        loaded_with(fewer, all=str(tmp_path / "adapted"))
    more = dataclasses.replace(WHOLE, lora=dataclasses.replace(LORA, targets=[*LORA.targets, "vision.*.up"]))
    with pytest.raises(ValueError, match=r"no tensor vision.*lora_"):
        loaded_with(more, all=str(tmp_path / "adapted"))
    allowed = loaded_with(more, all=str(tmp_path / "adapted"), allow_missing=[r"vision\..*lora_"])
    assert equal(adapted, allowed)


def test_a_source_of_another_shape_is_one_line_before_a_weight_is_read(tmp_path):
    path = write_run(tmp_path, build(WHOLE))
    torch.save(build(WHOLE).state_dict(), tmp_path / "a.pt")
    wide = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, intermediate_size=64))
    said = {tmp_path: "model.decoder.intermediate_size is 64, and there 48"}
    said |= {path: said[tmp_path], tmp_path / "a.pt": r"has shape \(48, 32\), and decoder.* has \(64, 32\)"}
    for source, message in said.items():
        config = dataclasses.replace(run_config(wide, tmp_path / "new"), init_from=InitFrom(all=str(source)))
        with pytest.raises(ValueError, match=message):
            check(config, 1)
    right = dataclasses.replace(run_config(WHOLE, tmp_path / "new"), init_from=InitFrom(all=str(path)))
    check(right, 1)


def test_folders_that_hold_no_weights_say_what_they_lack(tmp_path):
    path = write_run(tmp_path / "run", build(WHOLE))
    (path / MARKER).unlink()
    (tmp_path / "empty").mkdir()
    said = {path: "is not a complete checkpoint", tmp_path / "run": "holds no complete checkpoint"}
    said |= {tmp_path / "empty": "no config.json in", tmp_path / "nowhere": "which does not exist"}
    for source, message in said.items():
        config = dataclasses.replace(run_config(WHOLE, tmp_path / "new"), init_from=InitFrom(all=str(source)))
        with pytest.raises(FileNotFoundError, match=message):
            check(config, 1)
    (path / MARKER).write_text("{}")
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(AVLM(WHOLE), InitFrom(all=str(path)))


def test_adapters_go_to_a_peft_folder_and_come_back(tmp_path):
    lora = dataclasses.replace(LORA, targets=["decoder.*"])
    config = dataclasses.replace(WHOLE, lora=lora)
    model, folder = build(config), tmp_path / "adapter"
    write_run(tmp_path / "base", build(WHOLE, seed=2))
    export(config, model.state_dict(), folder, "adapter", base=Base(name="base"))
    again = AVLM(config)
    reports = init_weights(again, InitFrom(all=str(tmp_path / "base"), adapter=str(folder)), seed=1)
    adapters = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert set(reports[1].names) == adapters and equal(model, again, adapters) and not equal(model, again)
    assert not reports[0].initialised and not reports[1].initialised
    export(config, again.state_dict(), tmp_path / "again", "adapter", base=Base(name="base"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    said = {"rank": (2, "r=4"), "alpha": (1.0, "lora_alpha=6.0"), "rslora": (True, "use_rslora=False")}
    said |= {"dora": (False, "use_dora=True")}
    for key, (value, theirs) in said.items():
        other = dataclasses.replace(WHOLE, lora=dataclasses.replace(lora, **{key: value}))
        with pytest.raises(ValueError, match=f"model.lora.{key} is {value}, and .* was made with {theirs}"):
            loaded_with(other, adapter=str(folder))
    for targets, message in (
        (["decoder.*.q"], "no place for"),
        (["vision.*.up"], "holds no module that this entry could provide"),
    ):
        other = dataclasses.replace(WHOLE, lora=dataclasses.replace(lora, targets=targets))
        with pytest.raises(ValueError, match=message):
            loaded_with(other, adapter=str(folder))
    keys = json.loads((folder / "adapter_config.json").read_text())
    for key, value in {"rank_pattern": {"q_proj": 2}, "init_lora_weights": "pissa", "use_qalora": True}.items():
        (folder / "adapter_config.json").write_text(json.dumps(keys | {key: value}))
        with pytest.raises(ValueError, match=rf"{key}=.* is not implemented"):
            loaded_with(config, adapter=str(folder))
    with pytest.raises(FileNotFoundError, match="is not a PEFT folder"):
        loaded_with(config, adapter=str(tmp_path / "base"))
