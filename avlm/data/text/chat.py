"""Conversations -> pieces of text, control tokens and media, each marked as learned or not.

A template emits pieces, so what is learned follows from its structure: the text of every assistant turn and the token
that ends it. Nothing is searched for in token ids. Text of a sample is never read for control tokens: a user who writes
``<|eot_id|>`` sends eight harmless tokens. ``<image>``, ``<audio>`` and ``<video>`` stand for media in every turn, the
assistant's too, and are never learned.

llama3   <bos><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...       (Llama 3, text stripped)
chatml   <|im_start|>ROLE\\nTEXT<|im_end|>\\n...                                    (Qwen, SmolLM2)
llava    <bos>SYSTEM USER: TEXT ASSISTANT: TEXT<eos>USER: ...                       (LLaVA 1.5 and NeMo, text stripped)
plain    <bos>TEXT TEXT<eos>...   no roles and nothing added between the turns      (captions for a base model)
tokenizer  the Jinja ``chat_template`` that comes with the tokenizer
"""

from collections.abc import Iterator

from avlm.config.model import shown
from avlm.data.text.jinja_template import MARK, JinjaTemplate
from avlm.data.text.pieces import MEDIA, ROLES, TAG, Messages, Piece, is_learned
from avlm.data.text.tokenizer import Tokenizer

CONTROL_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every id must have a row in the embedding; spare rows are fine (checkpoints pad them)."""
    if tokenizer.size > vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.size} ids but model.decoder.vocab_size={vocab_size}: "
            "they belong to different models"
        )


class Chat:
    """A tokenizer with a template. ``system``: the prompt of conversations that have none. ``published``: prompts are
    those of the tokenizer's own template, for a model that we did not train; else what stands before an answer in
    training, which may be more."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, system: str | None = None, *, published: bool = False
    ) -> None:
        self.tokenizer, self.template, self.system, self.published = tokenizer, template, system, published
        # llava and plain end a turn with the tokenizer's eos, and open with its bos if it has one.
        own = () if template == "tokenizer" else (tokenizer.eos or "eos_token", tokenizer.bos)
        needed = CONTROL_TOKENS.get(template, own)
        missing = [token for token in needed if token and token not in tokenizer.control_tokens]
        if missing:
            raise ValueError(
                f"template {template} needs control tokens that {tokenizer.file} lacks: {shown(', '.join(missing))}"
            )
        if template == "tokenizer":
            self._jinja = JinjaTemplate(tokenizer)
            if tokenizer.make_control(self._jinja.ends):  # so that no answer shows them
                self._jinja = JinjaTemplate(tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an assistant turn."""
        ends = {CONTROL_TOKENS[self.template][-1]} if self.template in CONTROL_TOKENS else set()
        if self.template == "tokenizer":
            ends = self._jinja.ends
        return sorted(
            self.tokenizer.id_of(token) for token in ends | ({self.tokenizer.eos} if self.tokenizer.eos else set())
        )

    def pieces(self, messages: Messages, *, prompt: bool = False) -> list[Piece]:
        """Pieces of a conversation; ``prompt``: nothing is learned and it ends where the assistant's answer begins."""
        messages = self._checked(messages, prompt)
        if self.template == "tokenizer":
            pieces = self._jinja.pieces(messages, prompt, self.published)
        else:
            builder = {"llama3": _llama3, "chatml": _chatml, "llava": _llava, "plain": _plain}[self.template]
            pieces = builder(messages, prompt, self.tokenizer)
        return [Piece(p.kind, p.text, p.learned and not prompt) for p in pieces]

    def encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        """Each piece with its ids, none for media. Neighbouring texts with the same fate are tokenised as one."""
        merged: list[Piece] = []
        for piece in filter(lambda piece: piece.text, pieces):
            last = merged[-1] if merged else None
            if last and piece.kind in ("text", "markup") and (last.kind, last.learned) == (piece.kind, piece.learned):
                merged[-1] = Piece(piece.kind, last.text + piece.text, piece.learned)
            else:
                merged.append(piece)
        goes_on = False
        for piece in merged:
            if piece.kind == "control":
                yield piece, [self.tokenizer.id_of(piece.text)]
            elif piece.kind in MEDIA:
                yield piece, []
            else:
                yield piece, self.tokenizer.encode(piece.text, goes_on=goes_on, control=piece.kind == "markup")
            in_control = piece.kind == "markup" and piece.text.endswith(tuple(self.tokenizer.control_tokens))
            goes_on = (piece.kind in ("text", "markup") and not in_control) or not self.tokenizer.blank_after_control

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


def _content(text: str, learned: bool = False) -> Iterator[Piece]:
    """Text with its tags cut out."""
    for i, part in enumerate(TAG.split(text)):
        yield Piece(part, f"<{part}>") if i % 2 else Piece("text", part, learned)


def _llama3(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    bos, header, header_end, end = CONTROL_TOKENS["llama3"]
    yield Piece("control", bos)
    for message in [*messages, {"role": "assistant"}] if prompt else messages:
        yield from (Piece("control", header), Piece("text", message["role"]), Piece("control", header_end))
        yield Piece("text", "\n\n")
        if "content" in message:
            learned = is_learned(message)
            yield from _content(message["content"].strip(), learned)
            yield Piece("control", end, learned)


def _chatml(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    start, end = CONTROL_TOKENS["chatml"]
    for message in [*messages, {"role": "assistant"}] if prompt else messages:
        yield from (Piece("control", start), Piece("text", message["role"] + "\n"))
        if "content" in message:
            learned = is_learned(message)
            yield from _content(message["content"], learned)
            yield from (Piece("control", end, learned), Piece("text", "\n"))


def _llava(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    if tokenizer.bos:
        yield Piece("control", tokenizer.bos)
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "system":
            yield from _content(text + " ")
        elif message["role"] == "user":
            yield from _content("USER: " + text + " ")
        else:
            yield Piece("text", "ASSISTANT:")
            yield from _content(" " + text, is_learned(message))
            yield Piece("control", tokenizer.eos, is_learned(message))
    if prompt:
        yield Piece("text", "ASSISTANT:")


def _plain(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    if tokenizer.bos:
        yield Piece("control", tokenizer.bos)
    for message in messages:
        yield from _content(message["content"], is_learned(message))
        if message["role"] == "assistant":
            yield Piece("control", tokenizer.eos, is_learned(message))
