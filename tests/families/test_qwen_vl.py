"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with and without experts, against transformers: features, logits, gradients,
answers, and exports.

The prompt has two images of odd sizes and a video, made of our patches.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, IMAGE, Batch
from avlm.models.vit import normalise
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_qwen_vl_keys import FAMILIES, TOKENS, config_of, keys_of
from tests.models.handmade import adapted, build, loaded, save

START, IMAGE_PAD, VIDEO_PAD, END = TOKENS.values()
CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
SIZES = [(5, 7), (1, 12)]  # of the images, in features of 8 x 8 pixels
VIDEO = (3, 4, 5)  # temporal patches, lines and columns of features


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(name of the family, transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = CLASSES[request.param](config_of(request.param, tied=request.param == "qwen3_vl"))
    save(theirs, folder)
    return request.param, theirs, folder, read_config(folder)


def frames(lines: int, columns: int, config: ModelConfig) -> Tensor:
    """The patches of an item of two random frames: uint8 (2 * lines, 2 * columns, N)."""
    side = config.vision.patch_size * config.vision_projector.downsample
    return cut_into_patches(torch.randint(256, (2, 3, lines * side, columns * side), dtype=torch.uint8), config.vision)


@dataclasses.dataclass
class Prompt:
    """The same prompt for them and for us."""

    inputs: dict[str, Tensor]  # of transformers' forward
    sample: EncodedSample
    batch: Batch


def prompt(name: str, theirs, config: ModelConfig) -> Prompt:
    images = [frames(*size, config) for size in SIZES]
    video = [frames(*VIDEO[1:], config) for _ in range(VIDEO[0])]
    ids: list[int] = []
    for size in SIZES:
        ids += [5, START, *[IMAGE_PAD] * (size[0] * size[1]), END, 6]
    patch = [VIDEO_PAD] * (VIDEO[1] * VIDEO[2])
    if name.startswith("qwen3_vl"):
        ids += [t for i in range(VIDEO[0]) for t in (20 + i, 30, START, *patch, END)]
    else:
        ids += [START, *patch * VIDEO[0], END]
    ids += [7, 8, 9, 10, 11]
    ids_T = torch.tensor(ids)
    kinds = (ids_T == IMAGE_PAD).int() + 2 * (ids_T == VIDEO_PAD).int()
    inputs = {
        "input_ids": ids_T[None],
        "mm_token_type_ids": kinds[None],
        "pixel_values": pixel_values(images, config),
        "image_grid_thw": torch.tensor([(1, 2 * lines, 2 * columns) for lines, columns in SIZES]),
        "pixel_values_videos": pixel_values(video, config),
        "video_grid_thw": torch.tensor([(VIDEO[0], 2 * VIDEO[1], 2 * VIDEO[2])]),
    }
    grids = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw")}
    position_3T = theirs.model.get_rope_index(ids_T[None], kinds[None], **grids)[0][:, 0]
    token_T = torch.where(kinds > 0, IMAGE, ids_T)
    target_T = torch.cat([ids_T[1:], torch.tensor([IGNORE])])
    target_T[torch.cat([kinds[1:] > 0, torch.tensor([False])])] = IGNORE
    sample = EncodedSample("a", "mixed", token_T, target_T, {"image": [*images, *video]}, position_3T)
    return Prompt(inputs, sample, pack([sample], len(ids), config))


def pixel_values(items: list[Tensor], config: ModelConfig) -> Tensor:
    """As their processors give them: features line by line, each with its patches line by line."""
    n = config.vision_projector.downsample
    parts = [rearrange(item, "(y i) (x j) n -> (y x i j) n", i=n, j=n) for item in items]
    return normalise(torch.cat(parts), config.vision)


def logits_of(model, batch: Batch) -> Tensor:
    return model.decoder.head(model.decoder.norm(model.hidden(batch)), None)


@torch.no_grad()
def test_features_and_logits_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    pixels = torch.cat([ask.inputs["pixel_values"], ask.inputs["pixel_values_videos"]])
    grids = torch.cat([ask.inputs["image_grid_thw"], ask.inputs["video_grid_thw"]])
    expected = theirs.model.visual(pixels, grid_thw=grids)
    rows = ours.vision(ask.batch.image)
    close(rows[:, : config.vision.hidden_size], expected.last_hidden_state, f"{name} tower")
    media = ask.batch.image
    into = torch.zeros(len(ask.batch.token_T), config.decoder.hidden_size)
    features, deep = ours.vision_projector(into, media, rows)
    close(features[media.rows], expected.pooler_output, f"{name} features")
    for ours_deep, theirs_deep in zip(deep, getattr(expected, "deepstack_features", None) or [], strict=True):
        close(ours_deep, theirs_deep, f"{name} deepstack")
    close(logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0], f"{name} logits")


def test_gradients_of_the_loss_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    ours(ask.batch)[0].backward()
    logits = theirs(**ask.inputs).logits[0]
    cross_entropy(logits[ask.batch.target_rows_R], ask.batch.target_R, reduction="sum").backward()
    all_gradients_close(ours, theirs, name)
    theirs.zero_grad()


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(name, theirs, config)
    text_T = torch.tensor([5, 6, 7, 8])
    text = EncodedSample("b", "text", text_T, torch.full_like(text_T, IGNORE))
    answers = generate(ours, [ask.sample, text], stop_ids=[], max_new_tokens=12)
    for answer, inputs in zip(answers, (ask.inputs, {"input_ids": text_T[None]}), strict=True):
        out = theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note(f"{name} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
@torch.no_grad()
def test_an_export_is_read_back_by_transformers_with_equal_logits(case, targets, tmp_path):
    """Adapters are merged before q, k and v of the tower are joined."""
    name, _, folder, config = case
    if config.decoder.experts is not None:  # which take no adapters
        targets = [target.replace("decoder.*", "decoder.*.attention.*") for target in targets]
    ours = adapted(config, folder, targets)
    export(ours.config, ours.state_dict(), tmp_path / "out", name)
    theirs, report = CLASSES[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ask = prompt(name, theirs, config)
    ids = ask.inputs["input_ids"]  # without a tokenizer the placeholders get the first free ids
    ids[ids == IMAGE_PAD], ids[ids == VIDEO_PAD] = theirs.config.image_token_id, theirs.config.video_token_id
    logits = theirs(**ask.inputs).logits[0]
    assert logits.shape[1] == config.decoder.vocab_size + 4
    close(logits_of(ours, ask.batch), logits[:, : config.decoder.vocab_size], f"{name} export")
    again = read_config(tmp_path / "out")
    assert dataclasses.replace(again, decoder=config.decoder) == config
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() - load_file(folder / "model.safetensors").keys()
        == set()
    )


def test_patches_of_one_frame_are_exported_as_a_convolution_over_one(tmp_path):
    keys = keys_of("qwen2_vl")
    keys["vision_config"]["temporal_patch_size"] = 1
    config = FAMILIES["qwen2_vl"].read(keys, {})
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "qwen2_vl")
    theirs = CLASSES["qwen2_vl"].from_pretrained(tmp_path / "out").model.visual.patch_embed.proj.weight
    assert theirs.shape == (24, 3, 1, 4, 4) and theirs.flatten(1).equal(model.vision.patch.weight)


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    """transformers writes what the Hub's folders have; other programs write the names of its modules."""
    name, theirs, folder, config = case
    one = loaded(config, all=folder)
    state = {
        key: tensor for key, tensor in theirs.state_dict().items() if key != "lm_head.weight" or name != "qwen3_vl"
    }
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    other = loaded(config, all=tmp_path)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters()))
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    file = loaded(config, all=tmp_path / "weights.pt")
    assert all(a.equal(b) for a, b in zip(one.parameters(), file.parameters()))


def test_a_tower_is_taken_from_a_whole_model(case):
    _, _, folder, config = case
    alone = ModelConfig(decoder=config.decoder, vision=config.vision, vision_projector=config.vision_projector)
    model = AVLM(alone)
    [report] = load_weights(model, InitFrom(vision=str(folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert report.skipped.keys() == {"other modules"} and report.loaded + sum(report.skipped.values()) == report.total
    assert f"{len(report.names) - 4 * config.vision.num_layers} of {report.total} tensors loaded" in str(report)
    assert model.vision.patch.weight.equal(loaded(config, all=folder).vision.patch.weight)


def edited(folder, target, change, tensors=lambda state: state):
    """A copy of a folder with another config, and other tensors."""
    keys = json.loads((folder / "config.json").read_text())
    change(keys)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(keys))
    save_file(tensors(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def test_files_that_do_not_fit_their_config_are_refused_in_one_line(case, tmp_path):
    name, _, folder, _ = case

    def refused(key, value, said, tensors=lambda state: state):
        broken = edited(
            folder, tmp_path / said[:8].strip(), lambda keys: keys["vision_config"].update({key: value}), tensors
        )
        with pytest.raises(ValueError, match=said) as error:
            loaded(read_config(broken), all=broken)
        assert "\n" not in str(error.value)

    prefix = FAMILIES[name].PREFIXES["vision"][0]
    refused("depth", 2, rf"the model has no place for: {prefix}blocks.2.")
    refused("depth", 4, rf"has no tensor {prefix}blocks.3.norm1.weight for vision.blocks.3.attention_norm.weight")
    if name.startswith("qwen3_vl"):
        refused(
            "num_position_embeddings", 49, r"pos_embed.weight has shape \(36, 24\), and vision.position has \(49, 24\)"
        )
    cut = lambda state: {
        key: tensor[:-1].clone() if "blocks.0.attn.qkv" in key else tensor for key, tensor in state.items()
    }
    refused("depth", 3, r"qkv.weight has shape \(71, 24\), and .*attention.q.weight, .*v.weight 72 rows", cut)
