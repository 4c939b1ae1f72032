"""A chat on the terminal, or with lines that another program writes."""

import contextlib
import sys
from pathlib import Path
from typing import Unpack

from avlm.data.text.pieces import MEDIA
from avlm.evaluation.answering import Media, Model, Options, read_media
from avlm.evaluation.conversation import Conversation

HELP = """\
/image FILE, /audio FILE, /video FILE   a file for the next question; more than one may be given
/reset                                  forget the conversation
/help                                   this
/quit, or Ctrl-D                        leave; Ctrl-C ends an answer
"""


def chat(model: Model, media: Media, **options: Unpack[Options]) -> None:
    """Answer line after line until there are no more. ``media`` go with the first question."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() editing and a history; not every build of Python has it)
    conversation = Conversation(model, **options)
    waiting = media
    print(HELP)
    while (line := _read_line()) is not None:
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/help":
                print(HELP)
            elif command == "/reset":
                conversation.reset()
                waiting = {kind: [] for kind in MEDIA}
            elif command in [f"/{kind}" for kind in MEDIA]:
                waiting[command[1:]] += _file(command[1:], argument)
            elif command.startswith("/"):
                print(f"there is no command {command}: /help lists them")
            elif line:
                given, waiting = waiting, {kind: [] for kind in MEDIA}
                _answer(conversation, line, given)
        except (ValueError, OSError) as error:
            print(f"error: {error}", flush=True)


def _read_line() -> str | None:
    """The next line; None at the end of the input. Ctrl-C only drops what was typed."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            continue
        if not sys.stdin.isatty():
            print(line)  # so that the output reads as a chat does
        return line.encode(errors="replace").decode()  # bytes of a pipe that are no UTF-8


def _file(kind: str, argument: str) -> list[bytes]:
    name = argument.strip().strip("'\"")
    if not name:
        raise ValueError(f"/{kind} needs the name of a file")
    return read_media(**{kind: Path(name).expanduser()})[kind]


def _answer(conversation: Conversation, question: str, media: Media) -> None:
    answer = conversation.stream(question, **media)
    with contextlib.closing(answer), contextlib.suppress(KeyboardInterrupt):
        for part in answer:
            print(part, end="", flush=True)
    print("\n", flush=True)
