"""InternVL3 and 3.5 against transformers, from folders as the Hub has them: ids, pixels, features, logits, gradients,
and answers of images that are cut and of videos; and exports."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers.video_utils import VideoMetadata

from avlm.config.run import InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, Sample
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.families import internvl
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, read_config, stop_ids
from avlm.weights.load import init_weights, load_weights
from tests.data.media.test_area import every_frame
from tests.data.small_files import CONTROL, CORPUS, image_file, photo, write_tokenizer
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_internvl_keys import DECODERS, FILES, TIED, config_of
from tests.families.test_llava_next import RATE, VIDEO, Case, assert_pixels_equal, write_run_of
from tests.models.handmade import adapted, loaded, save
from tests.weights.test_peft import command

CLASS = transformers.InternVLForConditionalGeneration
# Heights and widths; the first two are those of the longer tests. Some fit several grids equally well.
SIZES = [(30, 70), (61, 20), (1, 40), (40, 1), (3, 3), (24, 24), (24, 48), (100, 100), (97, 61), (120, 160)]
QUESTIONS = [(1, 0), (2, 0), (0, 1), (2, 2), (0, 0)]  # images and videos
TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- {'image': '<IMG_CONTEXT>\\n', 'video': '<video>\\n'}[part.type] or part.text -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@pytest.fixture(scope="module", params=DECODERS)
def case(request, tmp_path_factory) -> Case:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    control = [token for token in CONTROL if token != "<s>"]
    corpus = [*CORPUS, "Frame1: Frame2: Frame3:"]
    names = {"bos_token": None, "eos_token": "<|im_end|>", "extra_special_tokens": internvl.TOKEN_NAMES}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    write_tokenizer(folder, [*control, *internvl.MEDIA_TOKENS], corpus, **names)
    tokenizer = Tokenizer(folder)
    theirs = CLASS(config_of(request.param, tokenizer.size, tokenizer.find(internvl.IMAGE)))
    save(theirs, folder)
    for file, keys in FILES.items():
        (folder / file).write_text(json.dumps(keys))
    config, data = model_and_data(folder)
    return Case(request.param, folder, theirs, loaded(config, all=folder), data)


def asked(case: Case, sizes: list[tuple[int, int]], num_videos: int = 0, answer: str | None = "two") -> tuple:
    """(our sample, transformers' inputs) of a question, with its answer unless that is to be generated."""
    pictures = [photo(width, height, seed=height) for height, width in sizes]
    tags = "<video>" * num_videos + "<image>" * len(pictures)
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
        inputs["images"] = pictures
    if num_videos:
        frames = every_frame(VIDEO)
        metadata = [VideoMetadata(total_num_frames=len(frames), fps=float(RATE))] * num_videos
        inputs |= {"videos": [frames] * num_videos, "video_metadata": metadata}
        inputs |= {"do_sample_frames": True, "num_frames": 8}
    text = text.replace("<image>", internvl.IMAGE)
    return sample, dict(case.processor(text=[text], return_tensors="pt", **inputs))


def questions(case: Case, answer: str | None = "two") -> list[tuple]:
    return [asked(case, SIZES[:images], videos, answer) for images, videos in QUESTIONS]


def model_inputs(inputs: dict) -> dict:
    """Those of the model's forward."""
    return {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask", "pixel_values")}


def assert_ids_equal(case: Case, sample: EncodedSample, inputs: dict) -> None:
    [ids] = inputs["input_ids"]
    is_pad = ids == case.theirs.config.image_token_id
    assert torch.equal(is_pad, sample.token_T == IMAGE)
    assert torch.equal(ids[~is_pad], sample.token_T[~is_pad])


def logits_of(model: AVLM, sample: EncodedSample) -> torch.Tensor:
    row = pack([sample], len(sample), model.config)
    return model.decoder.head(model.decoder.norm(model.hidden(row)), None)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_of_any_size_gives_the_ids_and_pixels_of_the_processor(case, size):
    sample, inputs = asked(case, [size])
    assert_ids_equal(case, sample, inputs)
    assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"])


def test_several_images_and_videos_give_the_ids_and_pixels_of_the_processor(case):
    assert case.data.template == "tokenizer"
    sample, inputs = asked(case, SIZES[:2], 2)
    assert_ids_equal(case, sample, inputs)
    assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"])
    assert "Frame8: <img>" in case.processor.decode(inputs["input_ids"][0])
    note("internvl prompts")


def test_what_a_row_of_prompts_makes_equals_what_transformers_makes_of_each(case):
    """Features among the embeddings of the text, logits, and the gradients of all parameters."""
    asked_of = questions(case)
    row = pack([sample for sample, _ in asked_of], sum(len(sample) for sample, _ in asked_of), case.config)
    seen = []
    hook = case.theirs.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    theirs = torch.cat([case.theirs(**model_inputs(inputs)).logits[0] for _, inputs in asked_of])
    hook.remove()
    model = case.ours
    with torch.no_grad():
        x_TD, *_ = model.embed(row)
        close(x_TD, torch.cat([each[0] for each in seen]), f"internvl features of {case.name}")
        logits = model.decoder.head(model.decoder.norm(model.hidden(row)), None)
        close(logits, theirs, f"internvl logits of {case.name}")
    model.zero_grad()
    model(row)[0].backward()
    cross_entropy(theirs[row.target_rows_R], row.target_R, reduction="sum").backward()
    all_gradients_close(model, case.theirs, "internvl")
    case.theirs.zero_grad()


def test_the_features_of_an_earlier_layer_equal_those_of_transformers(case, tmp_path):
    """Whose final norm, if it has one, is not applied to them."""
    keys = json.loads((case.folder / "config.json").read_text()) | {"vision_feature_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    for name in ("preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(case.folder / name)
    config = read_config(tmp_path)
    assert config.vision.num_blocks == case.config.vision.num_layers - 1 and not config.vision.post_norm
    sample, inputs = asked(case, SIZES[:1])
    with torch.no_grad():
        theirs = CLASS.from_pretrained(tmp_path)(**model_inputs(inputs)).logits[0]
        close(logits_of(loaded(config, all=tmp_path), sample), theirs, f"internvl logits of layer -2 of {case.name}")


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    asked_of = questions(case, answer=None)
    answers = generate(case.ours, [sample for sample, _ in asked_of], stop_ids=[], max_new_tokens=12)
    for answer, (_, inputs) in zip(answers, asked_of, strict=True):
        out = case.theirs.generate(**model_inputs(inputs), do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note("internvl answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
def test_an_export_is_read_back_by_transformers_and_by_us_with_equal_logits(case, targets, tmp_path):
    """And its processor makes the prompts that ours makes."""
    ours = adapted(case.config, case.folder, targets)
    export(ours.config, ours.state_dict(), tmp_path / "out", "internvl", data=case.data)
    theirs, report = CLASS.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config, again = model_and_data(tmp_path / "out")
    assert config == case.config and Tokenizer(case.folder).find("<|im_end|>") in stop_ids(tmp_path / "out")
    for key in ("template", "markers", "image_layout", "video"):
        assert getattr(again, key) == getattr(case.data, key)
    out = Case(case.name, tmp_path / "out", theirs, loaded(config, all=tmp_path / "out"), again)
    held = {key: tensor.shape for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    there = {key: tensor.shape for key, tensor in load_file(case.folder / "model.safetensors").items()}
    assert held == {key: shape for key, shape in there.items() if not key.endswith("mask_token")}
    for sample, inputs in questions(out):
        assert_ids_equal(out, sample, inputs)
        with torch.no_grad():
            expected = theirs(**model_inputs(inputs)).logits[0]
            for model in (ours, out.ours):
                close(logits_of(model, sample), expected, f"internvl export of {case.name}")


def test_a_chat_template_of_ours_is_exported_with_the_tokens_of_the_processor(case, tmp_path):
    """For lists of parts as well."""
    folder = tmp_path / "out"
    data = dataclasses.replace(case.data, template="chatml")
    export(case.config, case.ours.state_dict(), folder, "internvl", data=data)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = photo(70, 30)
    parts = [{"type": "image"}, {"type": "text", "text": "what is one?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    config, data = model_and_data(folder)
    again = Case(case.name, folder, case.theirs, loaded(config, all=folder), data)
    question = [{"role": "user", "content": "<image>\nwhat is one?"}]
    assert_ids_equal(again, again.encoder.prompt(question, [image_file(picture)]), inputs)


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    state = {
        key: value for key, value in case.theirs.state_dict().items() if key != "lm_head.weight" or case.name != TIED
    }
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((case.folder / name).read_text())
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    torch.save(load_file(case.folder / "model.safetensors"), tmp_path / "old.pt")
    for source in (tmp_path, tmp_path / "weights.pt", tmp_path / "old.pt"):
        other = loaded(case.config, all=source)
        assert all(a.equal(b) for a, b in zip(case.ours.parameters(), other.parameters()))


def test_a_tower_is_taken_from_a_whole_model(case):
    model = AVLM(read_config(case.folder))
    [report] = load_weights(model, InitFrom(vision=str(case.folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert "other modules" in report.skipped and report.loaded + sum(report.skipped.values()) == report.total
    assert model.vision.position.equal(case.ours.vision.position)


def test_adapters_and_the_projector_load_onto_their_class(case, tmp_path, monkeypatch):
    ours = write_run_of(case, tmp_path / "run")
    command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
    base = CLASS.from_pretrained(case.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    sample, inputs = asked(case, SIZES[:2], 1)
    with torch.no_grad():
        close(logits_of(ours, sample), theirs(**model_inputs(inputs)).logits[0], f"internvl adapters of {case.name}")
    again = AVLM(ours.config)
    init_weights(again, InitFrom(all=str(case.folder), adapter=str(tmp_path / "adapter")), seed=2)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), again.parameters()))
