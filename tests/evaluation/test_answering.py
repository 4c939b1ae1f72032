"""The Python door and the chat: turns, kept caches, and what is said of a prompt that cannot be answered."""

import contextlib
import doctest
import io
import re
import subprocess
import sys

import pytest

import generate as command
from avlm import load
from avlm.evaluation.conversation import Conversation
from avlm.evaluation.generation import generate
from avlm.process.exit import run_command
from tests.data.small_files import image_file, photo, tone
from tests.training.test_train import ROOT

OPTIONS = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(exported):
    return load(exported, device="cpu")


@pytest.fixture
def folder(tmp_path, exported, monkeypatch):
    """What the page about Python asks for."""
    for i, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(image_file(photo(30, 20, seed=i)))
    (tmp_path / "a.wav").write_bytes(tone(0.3))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_about_python_are_true(folder):
    failed, tried = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert tried > 15 and failed == 0


def whole(model, chat) -> str:
    """The answer to the conversation's last question, from all of it at once."""
    prompt = model.encode_turns(chat.messages[:-1], chat.media)
    [completion] = generate(model.network, [prompt], stop_ids=model.stop_ids, **OPTIONS)
    return model.text(completion.token_ids)


def test_every_turn_is_answered_as_the_whole_conversation_run_at_once(model, folder):
    chat = Conversation(model, **OPTIONS)
    turns = [("what?", {"image": "a.png"}), ("and <audio> this?", {"audio": "a.wav"}), ("so?", {}), ("", {})]
    for question, media in turns:
        held = len(chat.kept.labels)
        said = chat.say(question, **media)
        assert said == whole(model, chat) and said
        assert len(chat.kept.labels) > held > 0 or question == "what?"
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"] * 4


def test_an_answer_that_is_left_early_stays_as_far_as_it_got(model):
    chat = Conversation(model, **OPTIONS)
    answer = chat.stream("one")
    begun = next(answer) + next(answer)
    answer.close()
    assert chat.messages[1]["content"].startswith(begun) and len(chat.messages) == 2
    assert chat.say("two") == whole(model, chat)
    never = chat.stream("three")
    never.close()
    assert len(chat.messages) == 4, "an answer without a token"


def test_a_tag_that_the_model_writes_stands_for_no_file(model, monkeypatch):
    chat = Conversation(model, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "text", lambda self, ids: "an <image>")
        assert chat.say("one") == "an <image>"
    assert chat.say("two") == whole(model, chat)


def test_a_template_that_changes_earlier_turns_cuts_the_cache_back(model, monkeypatch):
    """As those do that drop the reasoning of earlier answers."""
    pieces = model.encoder.chat.pieces
    shortened = lambda messages, **how: pieces(
        [turn | {"content": turn["content"][:2]} if turn["role"] == "assistant" else turn for turn in messages], **how
    )
    monkeypatch.setattr(model.encoder.chat, "pieces", shortened)
    chat = Conversation(model, **OPTIONS)
    for question in ("one", "two", "three"):
        assert chat.say(question) == whole(model, chat)


def test_a_full_context_ends_an_answer_and_refuses_a_question(model):
    most = model.network.config.decoder.max_position
    chat = Conversation(model, max_new_tokens=10 * most)
    before, told = [], ""
    while not told:
        before = list(chat.messages)
        try:
            chat.say("a question of some length")
            assert len(chat.kept.labels) < most
        except ValueError as error:
            told = str(error)
    assert before and chat.messages == before
    assert re.match(rf"the conversation would have \d+ tokens, and the model reads {most} with the answer", told)
    with pytest.raises(ValueError, match="max_new_tokens=0: at least 1"):
        Conversation(model, max_new_tokens=0).say("a question")


def typed(exported, lines, monkeypatch, *arguments) -> str:
    """What the chat prints when it reads these lines; an exception among them is raised instead."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(exported), "--device", "cpu", *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_command(command.main)
    return out.getvalue()


def test_the_chat_answers_turns_with_files_and_survives_mistakes(exported, folder, model, monkeypatch):
    lines = ["/image a.png", "what is this?", "/imge a.png", "/image c.png", "/audio", "<image> what?", "", "and now?"]
    lines += [KeyboardInterrupt(), "/reset", "/audio '~/a.wav'", "hm?"]
    monkeypatch.setenv("HOME", str(folder))
    out = typed(exported, lines, monkeypatch, "--max-new-tokens", "12")
    chat = Conversation(model, **OPTIONS)
    expected = [chat.say("what is this?", image="a.png"), chat.say("and now?")]
    chat.reset()
    expected.append(chat.say("hm?", audio="a.wav"))
    places = [out.index(answer) for answer in expected]
    assert places == sorted(places)
    assert "there is no command /imge: /help lists them" in out and "error: there is no image file c.png" in out
    assert "error: /audio needs the name of a file" in out
    assert "error: the prompt has 1 <image> tag but 0 images" in out


def test_ctrl_c_ends_an_answer_and_not_the_chat(exported, model, monkeypatch):
    texts = type(model).texts
    interrupted = []

    def once(self, tokens):
        for i, part in enumerate(texts(self, tokens)):
            if i == 2 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(type(model), "texts", once)
    out = typed(exported, ["one", "two", "/quit", "three"], monkeypatch, "--max-new-tokens", "12")
    assert interrupted and "one" in out and "two" in out and "three" not in out


def test_a_chat_reads_a_pipe_to_its_end(exported):
    command = [sys.executable, str(ROOT / "generate.py"), str(exported), "--device", "cpu", "--max-new-tokens", "3"]
    result = subprocess.run(command, input="hello\nyou?\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "> hello\n" in result.stdout and "> you?\n" in result.stdout and result.stderr == ""
