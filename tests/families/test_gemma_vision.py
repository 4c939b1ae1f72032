"""Gemma 3 with its tower, PaliGemma and PaliGemma 2 against transformers, from folders as the Hub has them: ids,
pixels, features, logits, gradients and answers; and exports."""

import dataclasses
import json
import warnings

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

from avlm.config.load import dump_config, load_config
from avlm.config.run import InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, Sample
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.families import gemma3
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, read_config, stop_ids
from avlm.weights.load import init_weights, load_weights
from tests.data.small_files import CORPUS, image_file, photo
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_gemma_vision_keys import FAMILIES, config_of, published
from tests.families.test_llava_next import Case, assert_pixels_equal
from tests.models.handmade import adapted, loaded, save
from tests.weights.test_peft import command
from tests.weights.test_sources import write_run

CLASSES = {name: getattr(transformers, family.CLASS) for name, family in FAMILIES.items()}
CONTROL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
# Heights and widths; the first two are those of the longer tests.
SIZES = [(30, 47), (61, 20), (1, 40), (40, 1), (3, 3), (32, 32), (64, 64), (33, 95), (97, 61), (120, 160)]
TEMPLATE = """\
{{ bos_token }}
{%- set prefix = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content -%}
  {%- set prefix = (first if first is string else first[0].text) + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {{- prefix if loop.first else '' -}}
  {%- if message.content is string -%}
    {{ message.content | trim }}
  {%- else -%}
    {%- for part in message.content -%}
      {{ '<start_of_image>' if part.type == 'image' else part.text | trim }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
# The parts of questions: an image where there is None.
QUESTIONS = {
    "one image": [None, "what is one?"],
    "several images": [None, None, "what is two?"],
    "text": ["what is this picture of?"],
    "an image after text": ["hello\n\n", None, "\n\nwhat\n is this picture of? "],
}


def write_gemma_tokenizer(folder, control: list[str], **config) -> None:
    """As Gemma's: BPE over letters with bytes for the rest, blanks as letters, and runs of line breaks that are found
    before a text is split."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    blanks, as_bytes, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([blanks, as_bytes, fuse])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*control, "<unk>", *alphabet]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "user\nmodel\n"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False, special=False) for count in range(1, 6)])
    keys = json.loads(tokenizer.to_str())
    keys["added_tokens"] = [each for each in keys["added_tokens"] if each["content"] not in alphabet]
    (folder / "tokenizer.json").write_text(json.dumps(keys))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>", **config}))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    torch.manual_seed(0)
    name = request.param
    family = FAMILIES[name]
    folder = tmp_path_factory.mktemp(name)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name == "gemma3":
        names |= {"extra_special_tokens": gemma3.TOKEN_NAMES, "chat_template": TEMPLATE}
    write_gemma_tokenizer(folder, [*CONTROL, *family.MEDIA_TOKENS], **names)
    tokenizer = Tokenizer(folder)
    ids = {"image_token_index": tokenizer.find(family.MEDIA_TOKENS[0])}
    if name == "gemma3":
        ids |= {"boi_token_index": tokenizer.find(gemma3.START), "eoi_token_index": tokenizer.find(gemma3.END)}
    theirs = CLASSES[name](config_of(name, tokenizer.size, **ids))
    theirs.set_attn_implementation("eager")  # no other has soft caps
    save(theirs, folder)
    for file, keys in published(name).items():
        if file != "config.json":
            (folder / file).write_text(json.dumps(keys))
    if name == "gemma3":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config, data = model_and_data(folder)
    assert data.template == ("tokenizer" if name == "gemma3" else "paligemma")
    return Case(name, folder, theirs, loaded(config, all=folder), data)


def asked(case: Case, parts: list[str | None], sizes=SIZES[:2], answer: str | None = "two") -> tuple:
    """(our sample, transformers' inputs) of a question, with its answer unless that is to be generated."""
    pictures = [photo(width, height, seed=height) for (height, width), _ in zip(sizes, range(parts.count(None)))]
    content = "".join("<image>" if part is None else part for part in parts)
    messages = [{"role": "user", "content": content}]
    images = [image_file(picture) for picture in pictures]
    if answer is None:
        sample = case.encoder.prompt(messages, images)
    else:
        messages.append({"role": "assistant", "content": answer})
        sample = case.encoder.encode(Sample("a", messages, images))
    more = {"images": [pictures]} if pictures else {}
    if case.name == "gemma3":
        for message in messages:
            message["content"] = message["content"].replace("<image>", gemma3.START)
        chat = {"tokenize": False, "add_generation_prompt": answer is None}
        text = case.processor.apply_chat_template(messages, **chat)
    else:
        *images, last = content.strip().split("<image>")
        text = "<image>".join([*images, last.strip()])
        more |= {} if answer is None else {"suffix": [answer]}
    inputs = case.processor(text=[text], return_tensors="pt", add_special_tokens=False, **more)
    return sample, {key: value for key, value in inputs.items() if key not in ("labels", "num_crops")}


def questions(case: Case, answer: str | None = "two") -> list[tuple]:
    """Those that the processor takes: PaliGemma's asks about images alone."""
    kinds = [parts for parts in QUESTIONS.values() if case.name == "gemma3" or None in parts]
    return [asked(case, parts, answer=answer) for parts in kinds]


def assert_ids_equal(case: Case, sample: EncodedSample, inputs: dict) -> None:
    [ids] = inputs["input_ids"]
    is_image = ids == case.theirs.config.image_token_id
    assert torch.equal(is_image, sample.token_T == IMAGE)
    assert torch.equal(ids[~is_image], sample.token_T[~is_image])


def logits_of(model: AVLM, sample: EncodedSample) -> torch.Tensor:
    row = pack([sample], len(sample), model.config)
    return model.decoder.head(model.decoder.norm(model.hidden(row)), None)


def theirs_of(case: Case, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Logits. PaliGemma 2 was trained with the soft cap of Gemma 2, which its class in transformers 5.17 leaves out."""
    logits = model(**inputs).logits[0]
    cap = case.config.decoder.logit_softcap
    assert (cap is not None) == (case.name == "paligemma2")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def from_folder(case: Case, folder) -> transformers.PreTrainedModel:
    return CLASSES[case.name].from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_of_any_size_gives_the_ids_and_pixels_of_the_processor(case, size):
    sample, inputs = asked(case, [None, "what is one?"], [size])
    assert_ids_equal(case, sample, inputs)
    assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"])


def test_prompts_and_samples_have_the_ids_pixels_and_targets_of_the_processor(case):
    for answer in (None, "two\n\nthree"):
        for sample, inputs in questions(case, answer):
            assert_ids_equal(case, sample, inputs)
            if "pixel_values" in inputs:
                assert_pixels_equal(case, sample.media["image"], inputs["pixel_values"])
            if answer is not None and case.name != "gemma3":
                [is_suffix_T] = inputs["token_type_ids"] == 1
                assert torch.equal(sample.target_T[:-1] >= 0, is_suffix_T[1:])
    note(f"{case.name} prompts")


@pytest.mark.parametrize("case", ["gemma3"], indirect=True)
def test_conversations_of_gemma_3_have_the_text_of_the_folders_template(case):
    talk = [("system", "hello"), ("user", "<image> what?"), ("assistant", "two"), ("user", "one\n<image>")]
    messages = [{"role": role, "content": content} for role, content in talk]
    for start in (0, 1):
        pieces = case.encoder.chat.pieces(messages[start:], prompt=True)
        theirs = case.processor.apply_chat_template(messages[start:], add_generation_prompt=True)
        assert "".join(piece.text for piece in pieces) == theirs
    learned = [piece.text for piece in case.encoder.chat.pieces(messages) if piece.learned]
    assert "".join(learned) == "two<end_of_turn>"


def test_what_a_row_of_prompts_makes_equals_what_transformers_makes_of_each(case):
    """Features among the embeddings of the text, logits, and the gradients of all parameters."""
    asked_of = questions(case)
    row = pack([sample for sample, _ in asked_of], sum(len(sample) for sample, _ in asked_of), case.config)
    seen = []
    hook = case.theirs.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    theirs = torch.cat([theirs_of(case, case.theirs, inputs) for _, inputs in asked_of])
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
    asked_of = questions(case, answer=None)
    answers = generate(case.ours, [sample for sample, _ in asked_of], stop_ids=[], max_new_tokens=16)
    for answer, (_, inputs) in zip(answers, asked_of, strict=True):
        out = case.theirs.generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=None)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note(f"{case.name} answers")


@pytest.mark.parametrize("targets", [[], ["decoder.*", "vision.*"]], ids=["plain", "with adapters"])
def test_an_export_is_read_back_by_transformers_and_by_us_with_equal_logits(case, targets, tmp_path):
    """And its processor makes the prompts that ours makes."""
    ours = adapted(case.config, case.folder, targets)
    out = tmp_path / "out"
    export(ours.config, ours.state_dict(), out, case.name, data=case.data)
    theirs, report = CLASSES[case.name].from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config, again = model_and_data(out)
    assert config == case.config and Tokenizer(case.folder).find("<eos>") in stop_ids(out)
    for key in ("template", "markers", "image_layout", "video"):
        assert getattr(again, key) == getattr(case.data, key)
    read = Case(case.name, out, theirs, loaded(config, all=out), again)
    held, named = ({key: t.shape for key, t in load_file(f / "model.safetensors").items()} for f in (out, case.folder))
    assert held == {key.replace("tower.", "tower.vision_model."): t for key, t in named.items()}
    for sample, inputs in questions(read):
        assert_ids_equal(read, sample, inputs)
        with torch.no_grad():
            expected = theirs_of(case, theirs, inputs)
            for model in (ours, read.ours):
                close(logits_of(model, sample), expected, f"{case.name} export")


def test_the_chat_template_of_an_export_gives_the_prompts_of_ours(case, tmp_path):
    """Of a text with tags, and of a list of parts."""
    export(case.config, case.ours.state_dict(), tmp_path / "out", case.name, data=case.data)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = photo(70, 30)
    sample = case.encoder.prompt([{"role": "user", "content": "<image>\nwhat is one?"}], [image_file(picture)])
    tag = FAMILIES[case.name].MEDIA["image"]
    text = "\nwhat is one?" if case.name == "paligemma" else "what is one?"
    contents = [f"{tag}\nwhat is one?", [{"type": "image"}, {"type": "text", "text": text}]]
    for content in contents if case.name != "gemma3" else contents[:1]:
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
        assert_ids_equal(case, sample, inputs)


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    state = {key: value for key, value in case.theirs.state_dict().items() if key != "lm_head.weight"}
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((case.folder / name).read_text())
    save_file(state, tmp_path / "model.safetensors")
    old = load_file(case.folder / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    torch.save({key.replace("tower.", "tower.vision_model."): t for key, t in old.items()}, tmp_path / "old.pt")
    for source in (tmp_path, tmp_path / "weights.pt", tmp_path / "old.pt"):
        other = loaded(case.config, all=source)
        assert all(a.equal(b) for a, b in zip(case.ours.parameters(), other.parameters()))


def test_a_tower_is_taken_from_a_whole_model(case):
    model = AVLM(read_config(case.folder))
    [report] = load_weights(model, InitFrom(vision=str(case.folder)))
    assert all(each.startswith("vision.") for each in report.names)
    assert "other modules" in report.skipped and report.loaded + sum(report.skipped.values()) == report.total
    assert model.vision.post_norm.weight.equal(case.ours.vision.post_norm.weight)


def test_adapters_and_the_projector_load_onto_their_class(case, tmp_path, monkeypatch, capsys):
    ours = adapted(case.config, case.folder, ["decoder.*.q", "vision.*.up"])
    with torch.no_grad():
        ours.vision_projector.linear.weight.add_(0.1)
    write_run(tmp_path / "run", ours)
    config = load_config(tmp_path / "run" / "config.yaml")
    trains = dataclasses.replace(config.stages[0], train=["lora", "vision_projector"])
    changed = dataclasses.replace(config, stages=[trains], init_from=InitFrom(all=str(case.folder)))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(changed))
    command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
    assert f"transformers.{FAMILIES[case.name].CLASS}" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(from_folder(case, case.folder), tmp_path / "adapter").eval()
    sample, inputs = asked(case, QUESTIONS["several images"])
    with torch.no_grad():
        close(logits_of(ours, sample), theirs_of(case, theirs, inputs), f"{case.name} adapters")
    again = AVLM(ours.config)
    init_weights(again, InitFrom(all=str(case.folder), adapter=str(tmp_path / "adapter")), seed=2)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), again.parameters()))
