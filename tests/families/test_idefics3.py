"""Idefics3 and SmolVLM2 against transformers, from folders as the Hub has them: prompts, ids, pixels, features, logits,
gradients and answers of images that are cut and of videos; and exports."""

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
from avlm.data.text.chat import Chat
from avlm.data.text.pieces import MEDIA
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE
from avlm.models.vit import normalise
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, read_config
from avlm.weights.load import init_weights, load_weights
from tests.data.media.test_area import every_frame
from tests.data.small_files import CORPUS, image_file, photo, video_file, write_tokenizer
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_idefics3_keys import FAMILIES, config_of, published
from tests.models.handmade import adapted, loaded, save
from tests.weights.test_peft import command
from tests.weights.test_sources import write_run

CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
BOS = {"idefics3": "<|begin_of_text|>", "smolvlm": "<|im_start|>"}
CONTROL = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
# Idefics3 has no tokens for the places of tiles.
PLACES = [f"<row_{line}_col_{column}>" for line in range(1, 7) for column in range(1, 7)]
PLACED = {"idefics3": [], "smolvlm": ["<global-img>", *PLACES]}
TEMPLATE = (  # of the folders of both, but for what it begins with
    "{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}"
    "{{ '<video>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
RATE = 8
VIDEO = video_file(1.5, RATE)
# Heights and widths; the first two are those of the longer tests.
SIZES = [(30, 47), (61, 20), (1, 40), (40, 1), (3, 3), (16, 16), (64, 64), (33, 95), (97, 61), (120, 160)]
# The parts of questions: a text, or the kind of a medium.
QUESTIONS = {
    "one image": ["image", "what is one?"],
    "several images": ["hello\n\n", "image", "image", "\n\nwhat is two?\n"],
    "a video": ["video", "\nwhat is one?"],
    "a video after text": ["what\n", "video", "two\n\n", "video", "  three"],
    "text": ["what is this picture of?"],
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
        # By default images are resized by Pillow where torchvision has no Lanczos, whatever filter is asked for.
        self.processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
            self.folder, backend="torchvision"
        )

    @property
    def questions(self) -> dict[str, list[str]]:
        sees_videos = self.name == "smolvlm"
        return {name: parts for name, parts in QUESTIONS.items() if sees_videos or "video" not in parts}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    torch.manual_seed(0)
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end_of_utterance>", "bos_token": BOS[name]}
    corpus = [*CORPUS, "\n\n\n\nUser: Assistant:\nFrame from 00:01:"]
    write_tokenizer(folder, [BOS[name], *CONTROL, *PLACED[name]], corpus, **names)
    tokenizer = Tokenizer(folder)
    theirs = CLASSES[name](config_of(name, name == "smolvlm", tokenizer.size, tokenizer.find("<image>")))
    save(theirs, folder)
    for file, keys in published(name).items():
        if file != "config.json":
            (folder / file).write_text(json.dumps(keys))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": BOS[name] + TEMPLATE}))
    config, data = model_and_data(folder)
    assert data.template == "smolvlm"
    return Case(name, folder, theirs, loaded(config, all=folder), data)


def tagged(parts: list[str]) -> str:
    return "".join(f"<{part}>" if part in MEDIA else part for part in parts)


def as_list(parts: list[str]) -> list[dict[str, str]]:
    return [{"type": part} if part in MEDIA else {"type": "text", "text": part} for part in parts]


def asked(case: Case, parts: list[str], sizes=SIZES[:2], answer: str | None = "two", text: str | None = None) -> tuple:
    """(our sample, transformers' inputs) of a question, with its answer unless that is to be generated. ``text``: the
    prompt, if it is not that of the folder's template."""
    pictures = [photo(width, height, seed=height) for (height, width), _ in zip(sizes, range(parts.count("image")))]
    num_videos = parts.count("video")
    messages, lists = [{"role": "user", "content": tagged(parts)}], [{"role": "user", "content": as_list(parts)}]
    media = {"images": [image_file(picture) for picture in pictures], "videos": [VIDEO] * num_videos}
    if answer is None:
        sample = case.encoder.prompt(messages, **media)
    else:
        messages.append({"role": "assistant", "content": answer})
        lists.append({"role": "assistant", "content": as_list([answer])})
        sample = case.encoder.encode(Sample("a", messages, **media))
    inputs = {}
    if pictures:
        inputs["images"] = [pictures]
    if num_videos:
        frames = every_frame(VIDEO)
        metadata = [
            VideoMetadata(total_num_frames=len(frames), fps=float(RATE), duration=len(frames) / RATE)
            for _ in range(num_videos)
        ]
        inputs |= {"videos": [[frames] * num_videos], "video_metadata": [metadata], "do_sample_frames": True}
        inputs |= {"num_frames": case.processor.video_processor.num_frames, "fps": case.processor.video_processor.fps}
    if text is None:
        text = case.processor.apply_chat_template(lists, add_generation_prompt=answer is None)
    return sample, dict(case.processor(text=[text], return_tensors="pt", add_special_tokens=False, **inputs))


def assert_ids_equal(case: Case, sample: EncodedSample, inputs: dict) -> None:
    [ids] = inputs["input_ids"]
    is_medium = sample.token_T == IMAGE
    assert torch.equal(ids == case.encoder.tokenizer.find("<image>"), is_medium)
    assert torch.equal(ids[~is_medium], sample.token_T[~is_medium])


def assert_pixels_equal(case: Case, items: list[Tensor], theirs: Tensor) -> None:
    """``theirs`` (N, 3, S, S)"""
    side = case.config.vision.patch_size
    assert len(items) == len(theirs)
    for item, view in zip(items, theirs):
        patches = rearrange(view, "c (l y) (k x) -> l k (c y x)", y=side, x=side)
        torch.testing.assert_close(normalise(item, case.config.vision), patches, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_of_any_size_gives_the_ids_and_pixels_of_the_processor(case, size):
    sample, inputs = asked(case, ["image", "what?"], [size])
    assert_ids_equal(case, sample, inputs)
    assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"][0])
    note(f"{case.name} prompts")


@pytest.mark.parametrize("question", QUESTIONS)
def test_several_images_and_videos_give_the_ids_and_pixels_of_the_processor(case, question):
    if question not in case.questions:
        return
    for answer in (None, "two\n\n"):
        sample, inputs = asked(case, QUESTIONS[question], answer=answer)
        assert_ids_equal(case, sample, inputs)
        if question != "text":
            assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"].flatten(0, 1))


def test_an_image_that_is_not_to_be_cut_has_the_pixels_of_the_processor(case):
    layout = dataclasses.replace(case.data.image_layout, tiles="none", tile_markers=["", ""], line_end="", tiles_end="")
    encoder = SampleEncoder(case.config, dataclasses.replace(case.data, image_layout=layout), case.encoder.tokenizer)
    for size in SIZES:
        picture = photo(size[1], size[0])
        sample = encoder.prompt([{"role": "user", "content": "<image>what?"}], [image_file(picture)])
        lists = [{"role": "user", "content": as_list(["image", "what?"])}]
        text = case.processor.apply_chat_template(lists, add_generation_prompt=True)
        more = {"add_special_tokens": False, "do_image_splitting": False, "return_tensors": "pt"}
        inputs = case.processor(text=[text], images=[[picture]], **more)
        assert_ids_equal(case, sample, inputs)
        assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"][0])


def test_conversations_have_the_text_of_the_folders_template(case):
    talk = [("system", ["hello"]), ("user", ["image", "what?"]), ("assistant", ["two"]), ("user", ["one", "image"])]
    messages = [{"role": role, "content": tagged(parts)} for role, parts in talk]
    lists = [{"role": role, "content": as_list(parts)} for role, parts in talk]
    for start in (0, 1):
        pieces = case.encoder.chat.pieces(messages[start:], prompt=True)
        theirs = case.processor.apply_chat_template(lists[start:], add_generation_prompt=True)
        assert "".join(piece.text for piece in pieces) == theirs
    learned = [piece.text for piece in case.encoder.chat.pieces(messages) if piece.learned]
    assert "".join(learned) == " two<end_of_utterance>"


def test_what_a_row_of_prompts_makes_equals_what_transformers_makes_of_each(case):
    """Features among the embeddings of the text, logits, and the gradients of all parameters."""
    asked_of = [asked(case, parts) for parts in case.questions.values()]
    row = pack([sample for sample, _ in asked_of], sum(len(sample) for sample, _ in asked_of), case.config)
    seen = []
    hook = case.theirs.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    theirs = torch.cat([case.theirs(**inputs).logits[0] for _, inputs in asked_of])
    hook.remove()
    model = case.ours
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
    asked_of = [asked(case, parts, answer=None) for parts in case.questions.values()]
    answers = generate(case.ours, [sample for sample, _ in asked_of], stop_ids=[], max_new_tokens=12)
    for answer, (_, inputs) in zip(answers, asked_of, strict=True):
        out = case.theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note(f"{case.name} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
def test_an_export_is_read_back_by_transformers_and_by_us_with_equal_logits(case, targets, tmp_path):
    """And its processor makes the prompts that ours makes, of texts with tags as of lists."""
    ours = adapted(case.config, case.folder, targets)
    layout = dataclasses.replace(case.data.image_layout, longest_edge=40)
    data = dataclasses.replace(case.data, image_layout=layout)
    export(ours.config, ours.state_dict(), tmp_path / "out", case.name, data=data)
    theirs, report = CLASSES[case.name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config, again = model_and_data(tmp_path / "out")
    assert config == case.config and again.template == "tokenizer"
    assert (again.image_layout, again.markers, again.video) == (layout, data.markers, data.video)
    out = Case(case.name, tmp_path / "out", theirs, loaded(config, all=tmp_path / "out"), again)
    held, named = (load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "out", case.folder))
    assert held == named
    for parts in case.questions.values():
        one = out.processor.apply_chat_template(
            [{"role": "user", "content": tagged(parts)}], add_generation_prompt=True
        )
        sample, inputs = asked(out, parts, answer=None, text=one)
        assert_ids_equal(out, sample, inputs)
        ours_too = Chat(Tokenizer(tmp_path / "out"), "smolvlm")
        question = [{"role": "user", "content": tagged(parts)}]
        assert ours_too.pieces(question, prompt=True) and one == "".join(
            piece.text for piece in ours_too.pieces(question, prompt=True)
        )
        row = pack([sample], len(sample), config)
        with torch.no_grad():
            for model in (ours, out.ours):
                logits = model.decoder.head(model.decoder.norm(model.hidden(row)), None)
                close(logits, theirs(**inputs).logits[0], f"{case.name} export")


def test_tensors_in_a_file_without_a_config_are_told_by_their_names(case, tmp_path):
    state = dict(case.theirs.state_dict())
    if case.config.decoder.tie_embedding:
        del state["lm_head.weight"]
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((case.folder / name).read_text())
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    for source in (tmp_path, tmp_path / "weights.pt"):
        other = loaded(case.config, all=source)
        assert all(a.equal(b) for a, b in zip(case.ours.parameters(), other.parameters()))


def test_a_tower_is_taken_from_a_whole_model(case):
    model = AVLM(read_config(case.folder))
    [report] = load_weights(model, InitFrom(vision=str(case.folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert report.loaded + sum(report.skipped.values()) == report.total
    assert model.vision.post_norm.weight.equal(case.ours.vision.post_norm.weight)


def test_adapters_and_the_projector_load_onto_their_class(case, tmp_path, monkeypatch, capsys):
    ours = adapted(case.config, case.folder, ["decoder.*.q", "vision.*.up"])
    with torch.no_grad():
        ours.vision_projector.linear.weight.add_(0.1)
    write_run(tmp_path / "run", ours)
    config = load_config(tmp_path / "run" / "config.yaml")
    trains = dataclasses.replace(config.stages[0], train=["lora", "vision_projector"])
    start = InitFrom(all=str(case.folder))
    changed = dataclasses.replace(config, stages=[trains], init_from=start)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(changed))
    command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
    assert (
        f"transformers.{CLASSES[case.name].__name__}" in capsys.readouterr().out
    )  # not the other's, which has the same
    base = CLASSES[case.name].from_pretrained(case.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    sample, inputs = asked(case, QUESTIONS["several images"])
    row = pack([sample], len(sample), case.config)
    with torch.no_grad():
        logits = ours.decoder.head(ours.decoder.norm(ours.hidden(row)), None)
        close(logits, theirs(**inputs).logits[0], f"{case.name} adapters")
    again = AVLM(ours.config)
    init_weights(again, InitFrom(all=str(case.folder), adapter=str(tmp_path / "adapter")), seed=2)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), again.parameters()))
