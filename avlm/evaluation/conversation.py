"""A conversation with a model: turns with media, the keys and values of earlier turns kept.

chat = Conversation(load("runs/demo"))
chat.say("What is this?", image="a.png")
chat.say("What is it made of?")
"""

from collections.abc import Iterator
from typing import Unpack

from avlm.data.sample import EncodedSample
from avlm.data.text.pieces import MEDIA, TAG, Messages
from avlm.evaluation.answering import Files, Media, Model, Options, RawChat, place_tags, read_media
from avlm.evaluation.generation import NEW_TOKENS
from avlm.evaluation.kept_cache import KeptCache


class Conversation:
    """``messages`` and ``media`` of the turns so far. Every turn is answered to the whole conversation, which the
    template writes anew; what the model has run of it is not run again (``avlm.evaluation.kept_cache``)."""

    def __init__(self, model: Model, **options: Unpack[Options]) -> None:
        if isinstance(model.encoder.chat, RawChat):
            raise ValueError("a conversation needs the chat template: without one there are no turns")
        self.model = model
        self.options = options
        self.reset()

    def reset(self) -> None:
        self.messages: Messages = []
        self.media: Media = {kind: [] for kind in MEDIA}
        self.kept = KeptCache(self.model.network)

    def say(self, prompt: str, *, image: Files = (), audio: Files = (), video: Files = ()) -> str:
        return "".join(self.stream(prompt, image=image, audio=audio, video=video))

    def stream(self, prompt: str, *, image: Files = (), audio: Files = (), video: Files = ()) -> Iterator[str]:
        """The answer in parts, as it grows. One that is left early stays in the conversation as far as it got; without
        any token the question is forgotten too.

        ValueError if the question has no room, which leaves the conversation as it was. An answer that would not fit
        ends where the context does.
        """
        content, new = place_tags(prompt, read_media(image=image, audio=audio, video=video))
        messages = [*self.messages, {"role": "user", "content": content}]
        media = {kind: [*self.media[kind], *new.get(kind, [])] for kind in MEDIA}
        encoded = self.model.encode_turns(messages, media)
        return self._answer(encoded, self._room(encoded), messages, media)

    def _room(self, encoded: EncodedSample) -> int:
        """The most tokens of an answer."""
        most = self.model.network.config.decoder.max_position
        room = most - len(encoded)
        if room < 1:
            raise ValueError(
                f"the conversation would have {len(encoded)} tokens, and the model reads {most} with the answer: begin "
                "a new one (/reset)"
            )
        asked = self.options.get("max_new_tokens")
        return min(room, NEW_TOKENS if asked is None else asked)

    def _answer(self, encoded: EncodedSample, room: int, messages: Messages, media: Media) -> Iterator[str]:
        options = self.options | {"max_new_tokens": room, "seed": self.options.get("seed", 0) + len(messages)}
        ids: list[int] = []

        def noted() -> Iterator[int]:
            for token in self.model.tokens(encoded, self.kept, **options):
                ids.append(token)
                yield token

        try:
            yield from self.model.texts(noted())
        finally:
            if ids:
                said = TAG.sub(r"\1", self.model.text(ids))  # a tag that the model writes stands for no file
                self.messages = [*messages, {"role": "assistant", "content": said}]
                self.media = media
