"""Conversations -> pieces of text, control tokens and media, each marked as learned or not.

A template emits pieces, so what is learned follows from its structure: the text of every assistant turn and the token
that ends it. Nothing is searched for in token ids. Text of a sample is never read for control tokens: a user who writes
``<|eot_id|>`` sends eight harmless tokens. ``<image>``, ``<audio>`` and ``<video>`` stand for media in every turn, the
assistant's too, and are never learned.

``data.template`` is one of ``avlm.data.text.templates``, or "tokenizer": the Jinja ``chat_template`` of the tokenizer.
"""

from collections.abc import Iterable, Iterator

from avlm.config.values import shown
from avlm.data.text.jinja_rendering import MARK
from avlm.data.text.jinja_template import JinjaTemplate
from avlm.data.text.pieces import MEDIA, ROLES, Messages, Piece
from avlm.data.text.templates import TEMPLATES, pieces
from avlm.data.text.tokenizer import Tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, key: str = "model.decoder.vocab_size") -> None:
    """Every id must have a row in the embedding; spare rows are fine (checkpoints pad them)."""
    if tokenizer.size > vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.size} ids but {key}={vocab_size}: they belong to different models"
        )


class Chat:
    """A tokenizer with a template. ``system``: the prompt of conversations that have none.

    ``published``: a prompt is what the tokenizer's own template makes it, for a model that we did not train. Otherwise
    it is what stands before an answer in training, which may be more.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, system: str | None = None, *, published: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES.get(template)  # None: the tokenizer's own
        self.system = system
        self.published = published
        if self.template is not None:
            needed = self.template.control_tokens or [tokenizer.eos or "eos_token", tokenizer.bos]
            missing = [token for token in needed if token and token not in tokenizer.control_tokens]
            if missing:
                raise ValueError(
                    f"template {template} needs control tokens that {tokenizer.file} lacks: {shown(', '.join(missing))}"
                )
            return
        self._jinja = JinjaTemplate(tokenizer)
        if tokenizer.make_control(self._jinja.ends):  # so that no answer shows them
            self._jinja = JinjaTemplate(tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an assistant turn."""
        ends = {self.tokenizer.eos} if self.tokenizer.eos else set()
        if self.template is None:
            ends |= self._jinja.ends
        elif self.template.control_tokens:
            ends.add(self.template.end)
        return sorted(self.tokenizer.id_of(token) for token in ends)

    def pieces(self, messages: Messages, *, prompt: bool = False) -> list[Piece]:
        """Pieces of a conversation, neighbouring texts of the same fate as one, none of them empty.

        ``prompt``: nothing is learned, and the conversation ends where the assistant's answer begins.
        """
        messages = self._checked(messages, prompt)
        if self.template is None:
            found = self._jinja.pieces(messages, prompt, self.published)
        else:
            found = pieces(self.template, messages, prompt, self.tokenizer)
        return merged(Piece(piece.kind, piece.text, piece.learned and not prompt) for piece in found)

    def encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        """Each piece with its ids, none for media."""
        continues = False
        for piece in pieces:
            if piece.kind == "control":
                yield piece, [self.tokenizer.id_of(piece.text)]
                continues = not self.tokenizer.blank_after_control
            elif piece.kind in MEDIA:
                yield piece, []
                continues = not self.tokenizer.blank_after_control
            else:
                reads_control = piece.kind == "markup"
                yield piece, self.tokenizer.encode(piece.text, continues=continues, control=reads_control)
                ends_in_control = reads_control and piece.text.endswith(tuple(self.tokenizer.control_tokens))
                continues = not ends_in_control or not self.tokenizer.blank_after_control

    def _checked(self, messages: Messages, prompt: bool) -> Messages:
        for message in messages:
            if message.get("role") not in ROLES:
                raise ValueError(f"unknown role {shown(repr(message.get('role')))}: give one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"content of a {message['role']} turn is not text: {shown(message.get('content'))}")
            if MARK.search(message["content"]):
                raise ValueError("text holds a Unicode noncharacter (U+FDD0 to U+FDD6)")
        roles = [message["role"] for message in messages]
        if prompt and roles[-1:] != ["user"]:
            raise ValueError(f"a prompt must end with a user turn, not with {roles[-1] if roles else 'nothing'}")
        if not prompt and "assistant" not in roles:
            raise ValueError("conversation has no assistant turn: there is nothing to learn")
        system = [{"role": "system", "content": self.system}] if self.system and "system" not in roles else []
        return [*system, *messages]


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbouring texts of the same fate as one, and no empty ones."""
    found: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        last = found[-1] if found else None
        is_text = piece.kind in ("text", "markup")
        if last is not None and is_text and (last.kind, last.learned) == (piece.kind, piece.learned):
            found[-1] = Piece(piece.kind, last.text + piece.text, piece.learned)
        else:
            found.append(piece)
    return found
