"""Pixtral, Mistral Small 3 and Ministral 3 against transformers: features, logits, gradients, answers, and exports.

The prompt has images of several sizes, made of our patches, with a token after each line of features. Ministral's
positions go far past its original context.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.families import mistral3, pixtral
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, IMAGE, Batch
from avlm.models.patches import tower_layout
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.families.measured import all_gradients_close, close, note
from tests.models.handmade import adapted, loaded, normalised, save

FAMILIES = {"pixtral": pixtral, "mistral3": mistral3, "ministral3": mistral3}
FORMATS = {"pixtral": "pixtral", "mistral3": "mistral3", "ministral3": "mistral3"}
CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
CONFIGS = {
    "pixtral": transformers.LlavaConfig,
    "mistral3": transformers.Mistral3Config,
    "ministral3": transformers.Mistral3Config,
}
PAD, BREAK, END = IDS = (95, 96, 97)
TOKENS = dict(zip(pixtral.MEDIA_TOKENS, IDS))
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 12}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "beta_fast": 32.0, "beta_slow": 1.0}
DECODERS = {
    "pixtral": {**TEXT, "model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral3": {**TEXT, "model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "ministral3": {**TEXT, "model_type": "ministral3", "rope_parameters": YARN},
}
VISION = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 2, "patch_size": 4, "hidden_act": "silu"}
MERGE = {"pixtral": 1, "mistral3": 2, "ministral3": 2}
SIZES = [(3, 5), (4, 1), (2, 2)]  # of the images, in features


def config_of(name: str, **changes) -> transformers.PretrainedConfig:
    """A tiny model of a family."""
    keys = {"text_config": dict(DECODERS[name]), "vision_config": dict(VISION), "image_token_index": PAD}
    keys |= {"tie_word_embeddings": False, "vision_feature_layer": -1}
    if name == "pixtral":
        keys["vision_feature_select_strategy"] = "full"
    return CONFIGS[name](**{**keys, **changes})


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(name of the case, transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = CLASSES[request.param](config_of(request.param))
    save(theirs, folder)
    return request.param, theirs, folder, read_config(folder)


@dataclasses.dataclass
class Prompt:
    """The same prompt for them and for us."""

    inputs: dict[str, Tensor]  # of transformers' forward
    sample: EncodedSample
    batch: Batch


def prompt(config: ModelConfig, sizes: list[tuple[int, int]] = SIZES, pad_id: int = PAD) -> Prompt:
    side = config.vision.patch_size * config.vision_projector.downsample
    pixels, ids = [], [5, 6]
    for lines, columns in sizes:
        pixels.append(torch.randint(256, (3, lines * side, columns * side), dtype=torch.uint8))
        ids += [7, *([pad_id] * columns + [BREAK]) * lines]
        ids[-1] = END
    ids_T = torch.tensor([*ids, 8, 9, 10, 11, 12])
    is_image = ids_T == pad_id
    inputs = {"input_ids": ids_T[None]}
    if sizes:
        most = [max(size) * side for size in zip(*sizes)]
        values = [normalised(image, config.vision) for image in pixels]
        padded = [pad(value, (0, most[1] - value.shape[2], 0, most[0] - value.shape[1])) for value in values]
        inputs |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes) * side}
    token_T = torch.where(is_image, IMAGE, ids_T)
    target_T = torch.cat([ids_T[1:], torch.tensor([IGNORE])])
    target_T[torch.cat([is_image[1:], torch.tensor([False])])] = IGNORE
    images = [cut_into_patches(image[None], config.vision) for image in pixels]
    sample = EncodedSample("a", "image" if sizes else "text", token_T, target_T, {"image": images})
    return Prompt(inputs, sample, pack([sample], len(ids_T), config))


def logits_of(model, batch: Batch) -> Tensor:
    return model.decoder.head(model.decoder.norm(model.hidden(batch)), None)


@torch.no_grad()
def test_features_and_logits_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(config)
    media = ask.batch.image
    images = {key: ask.inputs[key] for key in ("pixel_values", "image_sizes")}
    rows = ours.vision(media)
    tower = theirs.model.vision_tower(**images).last_hidden_state[0]
    starts = torch.tensor([0, *media.lengths]).cumsum(0)[:-1]
    orders = [line_by_line(size, config) for size in SIZES]
    close(torch.cat([rows[start + order] for start, order in zip(starts, orders)]), tower, f"{FORMATS[name]} tower")
    into = torch.zeros(len(ask.batch.token_T), config.decoder.hidden_size)
    features, _ = ours.vision_projector(into, media, rows)
    close(
        features[media.rows],
        torch.cat(list(theirs.model.get_image_features(**images).pooler_output)),
        f"{FORMATS[name]} features",
    )
    close(logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0], f"{FORMATS[name]} logits")
    text = prompt(config, [])
    close(logits_of(ours, text.batch), theirs(**text.inputs).logits[0], f"{FORMATS[name]} logits of text")


@torch.no_grad()
def test_the_features_of_an_earlier_layer_equal_those_of_transformers(case, tmp_path):
    name, theirs, folder, _ = case
    keys = json.loads((folder / "config.json").read_text()) | {"vision_feature_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = read_config(tmp_path)
    ours = loaded(config, all=tmp_path)
    ask = prompt(config)
    images = {key: ask.inputs[key] for key in ("pixel_values", "image_sizes")}
    media = ask.batch.image
    features, _ = ours.vision_projector(torch.zeros(len(ask.batch.token_T), 32), media, ours.vision(media))
    expected = theirs.model.get_image_features(**images, vision_feature_layer=-2).pooler_output
    close(features[media.rows], torch.cat(list(expected)), f"{FORMATS[name]} features of layer -2")


def line_by_line(size: tuple[int, int], config: ModelConfig) -> Tensor:
    """The rows of an image in the tower, in the order of its patches."""
    n = config.vision_projector.downsample
    return tower_layout((size[0] * n, size[1] * n), config.vision, n).order.argsort()


def test_gradients_of_the_loss_equal_those_of_transformers(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(config)
    ours(ask.batch)[0].backward()
    logits = theirs(**ask.inputs).logits[0]
    cross_entropy(logits[ask.batch.target_rows_R], ask.batch.target_R, reduction="sum").backward()
    all_gradients_close(ours, theirs, FORMATS[name])
    theirs.zero_grad()


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    name, theirs, folder, config = case
    ours = loaded(config, all=folder)
    prompts = [prompt(config), prompt(config, [(5, 3)]), prompt(config, [])]
    answers = generate(ours, [ask.sample for ask in prompts], stop_ids=[], max_new_tokens=20)
    for answer, ask in zip(answers, prompts, strict=True):
        out = theirs.generate(**ask.inputs, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert answer.token_ids == out[0, ask.inputs["input_ids"].shape[1] :].tolist()
    note(f"{FORMATS[name]} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
@torch.no_grad()
def test_an_export_is_read_back_by_transformers_with_equal_logits(case, targets, tmp_path):
    name, _, folder, config = case
    ours = adapted(config, folder, targets)
    export(ours.config, ours.state_dict(), tmp_path / "out", FORMATS[name])
    theirs, report = CLASSES[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ask = prompt(config, pad_id=theirs.config.image_token_index)  # without a tokenizer it is the first free id
    logits = theirs(**ask.inputs).logits[0]
    assert logits.shape[1] == config.decoder.vocab_size + 3
    close(logits_of(ours, ask.batch), logits[:, : config.decoder.vocab_size], f"{FORMATS[name]} export")
    again = read_config(tmp_path / "out")
    assert dataclasses.replace(again, decoder=config.decoder) == config
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == load_file(folder / "model.safetensors").keys()
    if not targets:
        back = loaded(dataclasses.replace(config, decoder=again.decoder), all=tmp_path / "out")
        assert back.vision_projector.up.weight.equal(ours.vision_projector.up.weight)
        assert all(a.equal(b) for a, b in zip(back.vision.parameters(), ours.vision.parameters()))


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    """transformers writes what the Hub's folders have; other programs write the names of its modules."""
    _, theirs, folder, config = case
    one = loaded(config, all=folder)
    state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    other = loaded(config, all=tmp_path)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters()))
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    file = loaded(config, all=tmp_path / "weights.pt")
    assert all(a.equal(b) for a, b in zip(one.parameters(), file.parameters()))


def test_a_tower_is_taken_from_a_whole_model(case):
    _, _, folder, config = case
    model = AVLM(config)
    [report] = load_weights(model, InitFrom(vision=str(folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert report.skipped.keys() == {"other modules"} and report.loaded + sum(report.skipped.values()) == report.total
    assert model.vision.patch.weight.equal(loaded(config, all=folder).vision.patch.weight)
