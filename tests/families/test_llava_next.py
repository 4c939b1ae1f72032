"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision against transformers, from folders as the Hub has them: ids, pixels,
features, logits, gradients and answers of images that are cut and of videos; and exports."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.video_utils import VideoMetadata

from avlm.config.load import dump_config, load_config
from avlm.config.run import DataConfig, InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE, NEWLINE
from avlm.models.vit import normalise
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, read_config
from avlm.weights.load import init_weights, load_weights
from tests.data.media.test_area import every_frame
from tests.data.small_files import CONTROL, image_file, photo, video_file, write_tokenizer
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_llava_next_keys import FAMILIES, config_of, published
from tests.models.handmade import adapted, loaded, save
from tests.weights.test_peft import command
from tests.weights.test_sources import write_run

CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
CHATML = {"llava_onevision"}
RATE = 8
VIDEO = video_file(1.5, RATE)
# Heights and widths; the first two are those of the longer tests.
SIZES = [(30, 47), (61, 20), (1, 40), (40, 1), (3, 3), (16, 16), (16, 32), (33, 95), (97, 61), (120, 160)]
QUESTIONS = {  # what is asked -> images and videos
    "one image": (1, 0),
    "several images": (2, 0),
    "a video": (0, 1),
    "both": (2, 1),
    "text": (0, 0),
}


@dataclasses.dataclass
class Case:
    """A model of transformers in a folder, and ours, which is made of it."""

    name: str
    folder: str
    theirs: transformers.PreTrainedModel
    ours: AVLM
    data: DataConfig

    def __post_init__(self) -> None:
        self.config = self.ours.config
        self.encoder = SampleEncoder(self.config, self.data, Tokenizer(self.folder))
        self.processor = transformers.AutoProcessor.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    torch.manual_seed(0)
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    chatml = ["<|im_start|>", "<|im_end|>"] if name in CHATML else []
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    control = [token for token in CONTROL if not token.startswith("<|")]
    write_tokenizer(folder, [*control, *chatml, "<image>", "<video>"], **names)
    tokenizer = Tokenizer(folder)
    ids = {"image": tokenizer.find("<image>"), "video": tokenizer.find("<video>")}
    theirs = CLASSES[name](config_of(name, name == "llava_onevision", tokenizer.size, **ids))
    save(theirs, folder)
    for file, keys in published(name).items():
        if file != "config.json":
            (folder / file).write_text(json.dumps(keys))
    config, data = model_and_data(folder)
    return Case(name, folder, theirs, loaded(config, all=folder), data)


def asked(case: Case, sizes: list[tuple[int, int]], num_videos: int = 0, answer: str | None = "two") -> tuple:
    """(our sample, transformers' inputs) of a question, with its answer unless that is to be generated."""
    pictures = [photo(width, height, seed=height) for height, width in sizes]
    tags = "<image>" * len(pictures) + "<video>" * num_videos
    messages = [{"role": "user", "content": f"{tags}\nwhat is one?"}]
    media = {"images": [image_file(picture) for picture in pictures], "videos": [VIDEO] * num_videos}
    if answer is None:
        sample = case.encoder.prompt(messages, **media)
    else:
        messages.append({"role": "assistant", "content": answer})
        sample = case.encoder.encode(Sample("a", messages, **media))
    text = "".join(piece.text for piece in case.encoder.chat.pieces(messages, prompt=answer is None))
    inputs = {}
    if pictures:
        inputs["images"] = [pictures] if case.name == "llava_onevision" else pictures
    if num_videos:
        frames = every_frame(VIDEO)
        metadata = [VideoMetadata(total_num_frames=len(frames), fps=float(RATE))] * num_videos
        inputs |= {"videos": [frames] * num_videos, "video_metadata": metadata}
        inputs |= {"do_sample_frames": True, "num_frames": 8}
    return sample, dict(case.processor(text=[text], return_tensors="pt", **inputs))


def questions(case: Case, answer: str | None = "two") -> list[tuple]:
    kinds = [counts for counts in QUESTIONS.values() if not counts[1] or case.name != "llava_next"]
    return [asked(case, SIZES[:images], videos, answer) for images, videos in kinds]


def assert_ids_equal(case: Case, sample: EncodedSample, inputs: dict) -> None:
    [ids] = inputs["input_ids"]
    pads = torch.tensor([case.encoder.tokenizer.find(token) for token in FAMILIES[case.name].MEDIA_TOKENS])
    is_medium = (sample.token_T == IMAGE) | (sample.token_T == NEWLINE)
    assert torch.equal(torch.isin(ids, pads), is_medium)
    assert torch.equal(ids[~is_medium], sample.token_T[~is_medium])


def assert_pixels_equal(case: Case, items: list[Tensor], theirs: Tensor) -> None:
    """``theirs`` (N, 3, S, S)"""
    side = case.config.vision.patch_size
    whole = case.config.vision.patches_per_side * side
    assert len(items) == len(theirs)
    for item, view in zip(items, theirs):
        patches = rearrange(view[:, :whole, :whole], "c (l y) (k x) -> l k (c y x)", y=side, x=side)
        torch.testing.assert_close(normalise(item, case.config.vision), patches, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_of_any_size_gives_the_ids_and_pixels_of_the_processor(case, size):
    sample, inputs = asked(case, [size])
    assert_ids_equal(case, sample, inputs)
    assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"][0])


def test_several_images_and_videos_give_the_ids_and_pixels_of_the_processor(case):
    sample, inputs = asked(case, SIZES[:2], 0 if case.name == "llava_next" else 2)
    assert_ids_equal(case, sample, inputs)
    views = [image[:1] if case.name == "llava_onevision" else image for image in inputs["pixel_values"]]
    if case.name != "llava_next":
        views += [*inputs["pixel_values_videos"]]
    views = [view for image in views for view in image if view.abs().sum()]  # of batches that are padded with zeros
    assert_pixels_equal(case, sample.media["image"], torch.stack(views))
    note(f"{case.name} prompts")


def test_what_a_row_of_prompts_makes_equals_what_transformers_makes_of_each(case):
    """Features among the embeddings of the text, logits, and the gradients of all parameters."""
    asked_of = questions(case)
    row = pack([sample for sample, _ in asked_of], sum(len(sample) for sample, _ in asked_of), case.config)
    seen = []
    hook = case.theirs.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    theirs = torch.cat([case.theirs(**inputs).logits[0] for _, inputs in asked_of])
    hook.remove()
    model = case.ours
    assert (row.image.features.mix is not None) == (case.name == "llava_onevision"), "nothing was stretched"
    with torch.no_grad():
        x_TD, *_ = model.embed(row)
        close(x_TD, torch.cat([each[0] for each in seen]), f"{case.name} features")
        close(model.decoder.head(model.decoder.norm(model.hidden(row)), None), theirs, f"{case.name} logits")
    model.zero_grad()
    model(row)[0].backward()
    cross_entropy(theirs[row.target_rows_R], row.target_R, reduction="sum").backward()
    all_gradients_close(model, case.theirs, case.name)
    case.theirs.zero_grad()


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    asked_of = questions(case, answer=None)
    answers = generate(case.ours, [sample for sample, _ in asked_of], stop_ids=[], max_new_tokens=12)
    for answer, (_, inputs) in zip(answers, asked_of, strict=True):
        out = case.theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note(f"{case.name} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
def test_an_export_is_read_back_by_transformers_and_by_us_with_equal_logits(case, targets, tmp_path):
    """And its processor makes the prompts that ours makes."""
    ours = adapted(case.config, case.folder, targets)
    layout = dataclasses.replace(case.data.image_layout, grids=case.data.image_layout.grids[:4])
    data = dataclasses.replace(case.data, image_layout=layout)
    export(ours.config, ours.state_dict(), tmp_path / "out", case.name, data=data)
    theirs, report = CLASSES[case.name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config, again = model_and_data(tmp_path / "out")
    assert (again.image_layout, again.video) == (layout, case.data.video)
    out = Case(case.name, tmp_path / "out", theirs, loaded(config, all=tmp_path / "out"), again)
    held = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {name for name in held if "image_newline" in name} == {"image_newline"}
    for sample, inputs in questions(out):
        assert_ids_equal(out, sample, inputs)
        row = pack([sample], len(sample), config)
        with torch.no_grad():
            for model in (ours, out.ours):
                logits = model.decoder.head(model.decoder.norm(model.hidden(row)), None)
                close(logits, theirs(**inputs).logits[0], f"{case.name} export")


def test_an_export_of_our_own_keeps_the_layout(case, tmp_path):
    export(case.config, case.ours.state_dict(), tmp_path / "out", data=case.data)
    config, data = model_and_data(tmp_path / "out")
    assert (config, data.image_layout, data.video) == (case.config, case.data.image_layout, case.data.video)
    assert loaded(config, all=tmp_path / "out").vision_projector.newline.equal(case.ours.vision_projector.newline)


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    state = {key: value for key, value in case.theirs.state_dict().items() if key != "lm_head.weight" or not tied(case)}
    assert "model.image_newline" in state
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((case.folder / name).read_text())
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    for source in (tmp_path, tmp_path / "weights.pt"):
        other = loaded(case.config, all=source)
        assert all(a.equal(b) for a, b in zip(case.ours.parameters(), other.parameters()))


def tied(case: Case) -> bool:
    return case.config.decoder.tie_embedding


def test_a_tower_is_taken_from_a_whole_model(case):
    model = AVLM(read_config(case.folder))
    [report] = load_weights(model, InitFrom(vision=str(case.folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert "other modules" in report.skipped and report.loaded + sum(report.skipped.values()) == report.total
    assert model.vision.patch.weight.equal(case.ours.vision.patch.weight)


def write_run_of(case: Case, folder, **stage) -> AVLM:
    """A run that trained adapters and the projector of a folder's model."""
    model = adapted(case.config, case.folder, ["decoder.*.q", "vision.*.up"])
    with torch.no_grad():
        model.vision_projector.up.weight.add_(0.1)
    write_run(folder, model)
    config = load_config(folder / "config.yaml")
    trains = dataclasses.replace(config.stages[0], train=["lora", "vision_projector"], **stage)
    start = InitFrom(all=str(case.folder))
    (folder / "config.yaml").write_text(dump_config(dataclasses.replace(config, stages=[trains], init_from=start)))
    return model


def test_adapters_and_the_linears_of_the_projector_load_onto_their_class(case, tmp_path, monkeypatch):
    ours = write_run_of(case, tmp_path / "run", freeze_params=["vision_projector.newline"])
    command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
    base = CLASSES[case.name].from_pretrained(case.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    sample, inputs = asked(case, SIZES[:2], case.name != "llava_next")
    row = pack([sample], len(sample), case.config)
    with torch.no_grad():
        logits = ours.decoder.head(ours.decoder.norm(ours.hidden(row)), None)
        close(logits, theirs(**inputs).logits[0], f"{case.name} adapters")
    again = AVLM(ours.config)
    init_weights(again, InitFrom(all=str(case.folder), adapter=str(tmp_path / "adapter")), seed=2)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), again.parameters()))


def test_a_newline_that_was_trained_is_not_lost_in_a_folder_of_adapters(case, tmp_path, monkeypatch):
    write_run_of(case, tmp_path / "run")
    with pytest.raises(ValueError, match=r"vision_projector.newline is trained .* --format llava_.* the whole model"):
        command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
