import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from avlm.data.text.chat import Chat, check_vocabulary
from avlm.data.text.tokenizer import Tokenizer
from tests.data.small_files import CONTROL, write_tokenizer

# The templates that the model families publish.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'].strip() + ' ' }}{% elif message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'].strip() + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PUBLIC = {"llama3": LLAMA3, "chatml": CHATML, "llava": LLAVA}
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TALK = [
    {"role": "system", "content": "answer the user"},
    {"role": "user", "content": "hello, what is this?"},
    {"role": "assistant", "content": "one picture"},
    {"role": "user", "content": " and that, two?\n"},
    {"role": "assistant", "content": "three four  "},
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def encode(chat: Chat, messages, prompt=False) -> tuple[list[int], str]:
    """(ids, what is learned)"""
    ids, learned = [], []
    for piece, piece_ids in chat.encode(chat.pieces(messages, prompt=prompt)):
        ids += piece_ids
        learned += piece_ids if piece.learned else []
    return ids, chat.tokenizer.decode(learned)


def reference(folder, template: str, bos="<s>") -> transformers.PreTrainedTokenizerFast:
    file = str(folder / "tokenizer.json")
    names = {"bos_token": bos, "eos_token": "</s>", "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, **names)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", [slice(0, 3), slice(1, 3), slice(0, 5)])
def test_built_in_templates_give_the_ids_of_the_published_ones(tokenizer_folder, name, prompt, turns):
    messages = TALK[turns][: -1 if prompt else None]
    theirs = reference(tokenizer_folder, PUBLIC[name], bos="<|begin_of_text|>" if name == "llama3" else "<s>")
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids, _ = encode(Chat(Tokenizer(tokenizer_folder), name), messages, prompt)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert Tokenizer(tokenizer_folder).decode(ids) == text


@pytest.mark.parametrize(
    "name, learned",
    [
        ("llama3", "one picture<|eot_id|>three four<|eot_id|>"),
        ("chatml", "one picture<|im_end|>three four  <|im_end|>"),
        ("llava", " one picture</s> three four</s>"),
        ("plain", "one picture</s>three four  </s>"),
    ],
)
def test_the_assistants_turns_and_their_end_tokens_are_learned(tokenizer_folder, name, learned):
    chat = Chat(Tokenizer(tokenizer_folder), name)
    assert encode(chat, TALK)[1] == learned
    assert encode(chat, TALK[:4], prompt=True)[1] == ""


def test_an_answer_that_repeats_the_question_is_learned_once(tokenizer_folder):
    messages = [turn("user", "two"), turn("assistant", "two"), turn("user", "two"), turn("assistant", "two ")]
    _, learned = encode(Chat(Tokenizer(tokenizer_folder), "llama3"), messages)
    assert learned == "two<|eot_id|>two<|eot_id|>"


@pytest.mark.parametrize("name", ["llama3", "chatml", "llava", "plain"])
def test_a_prompt_is_the_beginning_of_the_trained_conversation(tokenizer_folder, name):
    chat = Chat(Tokenizer(tokenizer_folder), name)
    whole, prompt = encode(chat, TALK)[0], encode(chat, TALK[:4], prompt=True)[0]
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["llama3", "chatml", "llava", "plain"])
def test_control_tokens_in_a_text_stay_text(tokenizer_folder, name):
    tokenizer = Tokenizer(tokenizer_folder)
    control = {tokenizer.id_of(token) for token in CONTROL}
    count = lambda text: sum(
        i in control for i in encode(Chat(tokenizer, name), [turn("user", text), turn("assistant", text)])[0]
    )
    assert count("".join(CONTROL)) == count("x")
    assert tokenizer.decode(tokenizer.encode("<|eot_id|></s>")) == "<|eot_id|></s>"


@pytest.mark.parametrize("name", ["llama3", "chatml", "llava", "plain"])
def test_tags_are_pieces_of_their_own_in_every_turn_and_never_learned(tokenizer_folder, name):
    messages = [
        turn("system", "<video>"),
        turn("user", "<image><audio> a <image>"),
        turn("assistant", "see <audio> there"),
    ]
    pieces = Chat(Tokenizer(tokenizer_folder), name).pieces(messages)
    media = [piece for piece in pieces if piece.kind in ("image", "audio", "video")]
    assert [piece.kind for piece in media] == ["video", "image", "audio", "image", "audio"]
    assert not any(piece.learned for piece in media)
    assert [p.text for p in pieces if p.learned and p.kind == "text" and p.text.strip()][-2:] == [
        " see " if name == "llava" else "see ",
        " there",
    ]


def test_paligemmas_question_follows_its_images_and_the_bos(tokenizer_folder):
    chat = Chat(Tokenizer(tokenizer_folder), "paligemma")
    question, answer = turn("user", "a <image>b<image> what?"), turn("assistant", "two")
    found = [(piece.kind, piece.text, piece.learned) for piece in chat.pieces([question, answer])]
    images = [("text", "a ", False), ("image", "<image>", False), ("text", "b", False), ("image", "<image>", False)]
    asked = [("control", "<s>", False), ("text", "what?\n", False)]
    assert found == [*images, *asked, ("text", answer["content"], True), ("control", "</s>", True)]
    assert [(piece.kind, piece.text, False) for piece in chat.pieces([question], prompt=True)] == found[:-2]
    text = turn("user", "what?")
    assert [piece.text for piece in chat.pieces([text], prompt=True)] == ["<s>", "what?\n"]
    for turns in ([turn("system", "a"), question, answer], [question, answer] * 2):
        with pytest.raises(ValueError, match="takes one question and its answer, not turns of"):
            chat.pieces(turns)


def test_the_systems_prompt_is_added_only_where_there_is_none(tokenizer_folder):
    chat = Chat(Tokenizer(tokenizer_folder), "chatml", system="be brief")
    assert chat.tokenizer.decode(encode(chat, TALK[1:3])[0]).startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert "be brief" not in chat.tokenizer.decode(encode(chat, TALK)[0])


def test_broken_conversations_are_refused(tokenizer_folder):
    chat = Chat(Tokenizer(tokenizer_folder), "chatml")
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        chat.pieces([turn("tool", "x")])
    with pytest.raises(ValueError, match="no assistant turn"):
        chat.pieces(TALK[:2])
    with pytest.raises(ValueError, match="is not text: None"):
        chat.pieces([turn("user", None)])
    with pytest.raises(ValueError, match="must end with a user turn"):
        chat.pieces(TALK, prompt=True)


def test_missing_control_tokens_are_named(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, ["<|im_end|>"], eos_token=None))
    with pytest.raises(ValueError, match=r"chatml needs control tokens .*lacks: <\|im_start\|>"):
        Chat(tokenizer, "chatml")
    with pytest.raises(ValueError, match=r"plain needs control tokens .* eos_token"):
        Chat(tokenizer, "plain")
    with pytest.raises(ValueError, match="comes with no chat_template"):
        Chat(tokenizer, "tokenizer")


def test_stop_tokens_end_the_assistants_turn(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    stops = lambda name: [tokenizer.decode([i]) for i in Chat(tokenizer, name).stop_ids]
    assert stops("llama3") == ["<|eot_id|>", "</s>"]
    assert stops("chatml") == ["<|im_end|>", "</s>"]
    assert stops("llava") == ["</s>"]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    check_vocabulary(tokenizer, tokenizer.size)
    with pytest.raises(ValueError, match="vocab_size=100"):
        check_vocabulary(tokenizer, 100)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tokenizer_folder / "nowhere")


def sentencepiece_like(folder):
    """Blanks are part of tokens and every text opens with one, as in Llama 2."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special[:3], show_progress=False)
    words = ["USER:", "hello", "what", "is", "this", "ASSISTANT:", "one", "answer", "two", "answers\n"]
    tokenizer.train_from_iterator(words * 5 + special[3:], trainer)  # word by word: no token crosses a blank
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    for byte in special[3:]:
        vocabulary.setdefault(byte, len(vocabulary))
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("name", ["llava", "chatml", "plain", "tokenizer"])
def test_blanks_in_front_of_texts_are_those_of_transformers(scheme, name, tmp_path):
    """Llama 2 opens a text behind a control token with a blank again, newer SentencePiece vocabularies do not."""
    file = tokenizers.Tokenizer(models.BPE())
    file.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    texts = ["user USER: hello there assistant ASSISTANT: what is this? one two three"] * 9
    file.train_from_iterator(texts + list("\n▁"), trainers.BpeTrainer(vocab_size=90, show_progress=False))
    file.add_special_tokens([*CONTROL, "<image>"])
    file.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": ZEPHYR}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    messages = [turn("user", "<image>"), turn("assistant", "one"), turn("user", "hello <image> there <image>what?")]
    messages += [turn("assistant", " two"), turn("user", ""), turn("assistant", "three")]
    chat = Chat(Tokenizer(tmp_path), name)
    ids = [chat.tokenizer.id_of("<image>")]
    for prompt in (False, True):
        pieces = chat.pieces(messages[:-1] if prompt else messages, prompt=prompt)
        found = [piece_ids or ids for _, piece_ids in chat.encode(pieces)]
        text = "".join(piece.text for piece in pieces)
        expected = reference(tmp_path, "")(text, add_special_tokens=False)["input_ids"]
        assert [i for each in found for i in each] == expected


def test_text_that_goes_on_gets_no_blank_from_a_sentencepiece_vocabulary(tmp_path):
    tokenizer = Tokenizer(sentencepiece_like(tmp_path))
    ids, learned = encode(Chat(tokenizer, "llava"), [turn("user", "hello"), turn("assistant", "one answer")])
    whole = tokenizer.encode("USER: hello ASSISTANT: one answer")
    assert ids == [tokenizer.id_of("<s>"), *whole, tokenizer.id_of("</s>")]
    assert learned == " one answer</s>"


def with_template(tmp_path, template):
    return Chat(Tokenizer(write_tokenizer(tmp_path, chat_template=template)), "tokenizer")


def test_generation_blocks_say_what_is_learned_as_in_transformers(tmp_path):
    chat = with_template(tmp_path, GENERATION)
    theirs = reference(tmp_path, GENERATION).apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, learned = encode(chat, TALK)
    assert ids == theirs["input_ids"]
    masked = [i for i, mask in zip(theirs["input_ids"], theirs["assistant_masks"]) if mask]
    assert learned == chat.tokenizer.decode(masked)


@pytest.mark.parametrize("name, template", PUBLIC.items())
def test_templates_without_generation_blocks_learn_what_each_answer_adds(tmp_path, name, template):
    chat = with_template(tmp_path, template)
    built_in = Chat(chat.tokenizer, name)
    ids, learned = encode(chat, TALK)
    text = chat.tokenizer.decode(encode(built_in, TALK)[0])
    assert chat.tokenizer.decode(ids) == (text.replace("<|begin_of_text|>", "<s>") if name == "llama3" else text)
    assert learned == encode(built_in, TALK)[1]
    assert chat.tokenizer.decode(encode(chat, TALK[:4], prompt=True)[0]).endswith(
        chat.tokenizer.decode(encode(built_in, TALK[:4], prompt=True)[0])[-12:]
    )


def test_tags_pass_through_a_jinja_template(tmp_path):
    chat = with_template(tmp_path, GENERATION)
    pieces = chat.pieces([turn("user", "<image> what\n<audio>"), turn("assistant", "that <video>")])
    assert [p.kind for p in pieces if p.kind != "markup"] == ["image", "audio", "video"]
    assert [p.text for p in pieces if p.learned] == ["that ", "<|im_end|>"]


def test_jinja_templates_that_cannot_be_told_apart_are_refused(tmp_path):
    forgetful = "{% for m in messages[-2:] %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        with_template(tmp_path / "a", forgetful).pieces(TALK)
    with pytest.raises(ValueError, match="chat_template fails: no systems"):
        with_template(tmp_path / "b", "{{ raise_exception('no systems') }}").pieces(TALK)
    with pytest.raises(ValueError, match="control token '</s>'"):
        with_template(tmp_path / "c", CHATML).pieces([turn("user", "</s>"), turn("assistant", "x")])


def test_a_jinja_template_cannot_reach_python(tmp_path):
    with pytest.raises(ValueError, match="chat_template fails"):
        with_template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}").pieces(TALK)
