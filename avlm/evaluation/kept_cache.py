"""What a model has run of one conversation, kept so that the next turn runs only the tokens that are new.

Every turn gives the whole conversation as a prompt. What it has in common with the tokens that were run before is not
run again. That may be less than all of them: a template that changes earlier turns (one that drops old reasoning), or
an answer that its own text is not tokenised to, makes them part earlier, and the cache is cut back to where they do.
"""

import dataclasses
import hashlib
from itertools import islice

from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.decoding import caches_for
from avlm.models.avlm import AVLM
from avlm.models.batch import NEWLINE, PLACEHOLDERS, text_positions

Label = int | tuple[str, int]  # a token id; or which feature of an item with this digest


class KeptCache:
    """``labels``: what stands in the slots that are filled, in order."""

    def __init__(self, model: AVLM) -> None:
        self.config = model.config
        self.caches = caches_for(model)
        self.labels: list[Label] = []

    def cut(self, prompt: EncodedSample) -> tuple[EncodedSample, list[Label]]:
        """Forget what the prompt does not begin with. Returns the rest of it, which is at least one token, and whole
        media; and the labels of that rest."""
        labels = labels_of(prompt, self.config)
        start = 0
        for held, wanted in zip(self.labels, labels[:-1]):
            if held != wanted:
                break
            start += 1
        start = _before_media(start, labels)
        if self.config.decoder.bidirectional == "prefix":  # each token has seen all of the shorter prompt
            start = 0
        if self.config.cross is not None:  # features of media are no part of what is held
            start = 0
        if self.config.decoder.bidirectional == "images":  # and each of these all features that stood together
            while start and _is_of_media(labels[start - 1]):
                start -= 1
        self.labels = self.labels[:start]
        return _rest(prompt, start, labels, _positions(prompt, self.config)), labels[start:]

    def add(self, labels: list[Label]) -> None:
        self.labels += labels


def labels_of(prompt: EncodedSample, config: ModelConfig) -> list[Label]:
    """Equal labels at the beginning of two prompts mean equal keys and values there."""
    position_T = _positions(prompt, config)
    labels: list[Label] = prompt.token_T.tolist()
    for modality in prompt.media:
        groups = _groups(prompt, modality, config)
        counts = [count for _, count in groups]
        rows = (prompt.token_T == PLACEHOLDERS[modality]).nonzero().flatten()
        for (items, _), of_group in zip(groups, rows.split(counts)):
            digest = _digest(items, position_T[..., of_group])
            for n, row in enumerate(of_group.tolist()):
                labels[row] = digest, n
    return labels


def _is_of_media(label: Label) -> bool:
    """Or of a clip."""
    return isinstance(label, tuple) or label == NEWLINE


def _groups(prompt: EncodedSample, modality: str, config: ModelConfig) -> list[tuple[list[Tensor], int]]:
    """Items that share their features, and how many features they have."""
    items = prompt.media[modality]
    if modality != "image" or not prompt.groups:
        return [([item], len(placeholders(modality, [item], config))) for item in items]
    unread = iter(items)
    return [(list(islice(unread, group.num_items)), len(group.features)) for group in prompt.groups]


def _before_media(start: int, labels: list[Label]) -> int:
    """The last place up to ``start`` that no medium goes past: one whose features all stand before it or behind it."""
    began: dict[str, int] = {}  # digest of a medium -> its last beginning
    earliest = [0] * len(labels)  # of the medium that a feature belongs to
    for place, label in enumerate(labels):
        if isinstance(label, tuple):
            digest, number = label
            if number == 0:
                began[digest] = place
            earliest[place] = began[digest]
        else:
            earliest[place] = place
    while (first := min(earliest[start:])) < start:
        start = first
    return start


def _digest(items: list[Tensor], position: Tensor) -> str:
    """Of the content of items, their shapes and where they stand: equal bytes of another grid, or of another time of a
    video, are another item. Text after equal items stands at equal positions."""
    found = hashlib.sha256(repr([item.shape for item in items]).encode())
    for tensor in (*items, position):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _positions(prompt: EncodedSample, config: ModelConfig) -> Tensor:
    return text_positions(len(prompt), config.decoder) if prompt.position_T is None else prompt.position_T


def _rest(prompt: EncodedSample, start: int, labels: list[Label], position_T: Tensor) -> EncodedSample:
    """The prompt from token ``start`` on, at its ``position_T``, with the media that begin there."""
    placed = zip(prompt.token_T[:start].tolist(), labels)
    begun = [token for token, label in placed if isinstance(label, tuple) and label[1] == 0]
    num_begun = {name: begun.count(PLACEHOLDERS[name]) for name in prompt.media}
    groups = prompt.groups[num_begun["image"] :]
    if prompt.groups:
        num_begun["image"] = sum(group.num_items for group in prompt.groups[: num_begun["image"]])
    media = {name: items[num_begun[name] :] for name, items in prompt.media.items()}
    return dataclasses.replace(
        prompt,
        groups=groups,
        token_T=prompt.token_T[start:],
        target_T=prompt.target_T[start:],
        media=media,
        position_T=position_T[..., start:],
    )
