import json
import time

import pytest
import transformers

from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from tests.data.small_files import CONTROL, write_tokenizer

TALK = [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "x"}]
FORMS = {  # files next to tokenizer.json -> special tokens of that folder
    "texts": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}},
    "objects": {
        "tokenizer_config.json": {
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False},
            "bos_token": None,
        }
    },
    "the map alone": {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "<|eot_id|>"}}},
    "the map wins": {
        "tokenizer_config.json": {"eos_token": "</s>", "unk_token": "<s>"},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_end|>"}},
    },
    "a list of added tokens wins": {
        "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    },
    "others": {"tokenizer_config.json": {"eos_token": "</s>", "image_token": "<|eot_id|>", "additional": "x"}},
    "others as an object": {
        "tokenizer_config.json": {"eos_token": "</s>", "extra_special_tokens": {"image_token": "<|eot_id|>"}}
    },
}


def write(folder, files):
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_are_those_that_transformers_finds(tmp_path, form):
    folder = write(tmp_path, FORMS[form])
    ours, theirs = Tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.names == theirs.special_tokens_map and ours.names
    assert (ours.bos, ours.eos) == (theirs.bos_token, theirs.eos_token)
    text = "<s>one </s> two <|im_end|><|eot_id|>"
    assert ours.encode(text, control=True) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 330}},
        {
            "tokenizer_config.json": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {"330": {"content": "<|im_end|>", "special": True, "normalized": False}},
            }
        },
    ],
    ids=["added_tokens.json", "added_tokens_decoder"],
)
def test_tokens_that_only_the_files_around_it_know_are_added(tmp_path, files):
    write_tokenizer(tmp_path, CONTROL[:1])
    number = Tokenizer(tmp_path).size
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content).replace("330", str(number)))
    ours, theirs = Tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.id_of("<|im_end|>") == number == theirs.eos_token_id and "<|im_end|>" in ours.control_tokens
    assert ours.encode("a<|im_end|>b", control=True) == theirs("a<|im_end|>b", add_special_tokens=False).input_ids
    assert Chat(ours, "plain").stop_ids == [number]
    name, content = list(files.items())[-1]
    (tmp_path / name).write_text(json.dumps(content).replace("330", "9999"))
    with pytest.raises(ValueError, match=f"the id 9999, but tokenizer.json has {number} for it"):
        Tokenizer(tmp_path)


def test_an_id_that_nothing_needs_asks_for_no_larger_embedding(tmp_path):
    size = Tokenizer(write_tokenizer(tmp_path)).size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    assert Tokenizer(tmp_path).size == size


@pytest.mark.parametrize("listed_in_both", [True, False])
def test_thousands_of_control_tokens_are_read_in_no_time(tmp_path, listed_in_both):
    tokens = [f"<|reserved_{i}|>" for i in range(3000)]
    size = Tokenizer(write_tokenizer(tmp_path)).size
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    if listed_in_both:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        tree["added_tokens"] += [{"id": size + i, "content": token, **flags} for i, token in enumerate(tokens)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    listed = {str(size + i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    config = {"eos_token": "</s>", "added_tokens_decoder": listed, "extra_special_tokens": tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": " ".join(tokens)}))
    begun = time.process_time()
    tokenizer = Tokenizer(tmp_path)
    assert time.process_time() - begun < 2
    assert tokenizer.find(tokens[-1]) == size + 2999 and set(tokens) <= set(tokenizer.control_tokens)


def test_a_vocabulary_word_that_ends_texts_is_a_control_token(tmp_path):
    tree = json.loads((write_tokenizer(tmp_path) / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        tree["model"]["vocab"][token["content"]] = token["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tree, "added_tokens": []}))
    chat = Chat(Tokenizer(tmp_path), "plain")
    assert chat.stop_ids == [chat.tokenizer.id_of("</s>")] and len(chat.tokenizer.encode("</s>")) > 1


def test_an_end_of_turn_that_is_no_special_token_shows_in_no_answer(tmp_path):
    """As in Gemma's first folders; the list of tokenizer_config.json may say that it is one."""
    template = "{% for m in messages %}{{ m.role + '<sep>' + m.content + '<end_of_turn>' }}{% endfor %}"
    tree = json.loads((write_tokenizer(tmp_path, chat_template=template) / "tokenizer.json").read_text())
    number = tree["added_tokens"][-1]["id"] + 1
    entry = {**tree["added_tokens"][-1], "id": number, "content": "<end_of_turn>", "special": False}
    tree["added_tokens"].append(entry)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    chat = Chat(Tokenizer(tmp_path), "tokenizer")
    assert number in chat.stop_ids and chat.tokenizer.decode([number], control=False) == ""
    listed = {"eos_token": "</s>", "added_tokens_decoder": {str(number): {"content": "<end_of_turn>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    ours, theirs = Tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.decode([number], control=False) == theirs.decode([number], skip_special_tokens=True) == ""


def test_a_tokenizer_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Tokenizer("~/mine").file == tmp_path / "mine" / "tokenizer.json"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"null", "must hold keys and values, not None"),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b'{"bos_token": 5}', "bos_token must be a text, or an object with one under content, not 5"),
        (b'{"eos_token": {}}', r"eos_token must be a text, or an object with one under content, not \{\}"),
        (b'{"chat_template": 1.5}', "chat_template must be a text or a list of named ones, not 1.5"),
        (b'{"chat_template": ["x"]}', "chat_template must be a text or a list of named ones"),
        (b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "an added token must have an id and a text"),
        (b'{"added_tokens_decoder": [1]}', "an added token must have an id and a text"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, config, message):
    (write_tokenizer(tmp_path) / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": {"type": "Strip", "content": "x", "start": 10**6, "stop": 10**6}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["b", 0.0]]}},
        {"model": None},
        {"added_tokens": [{"id": "x"}]},
    ],
    ids=["a panic", "a panic of the decoder", "a normalizer", "no unknown token", "no model", "an added token"],
)
def test_what_the_library_says_of_a_tokenizer_is_one_line(tmp_path, change):
    """Panics of Rust, which are no Exception, also those that only a text shows."""
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"tokenizer\.json (is no tokenizer|cannot (en|de)code)") as error:
        chat = Chat(Tokenizer(tmp_path), "plain")
        chat.tokenizer.decode([i for _, ids in chat.encode(chat.pieces(TALK)) for i in ids])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
