"""What a model has run of one conversation, kept so that the next turn runs only the tokens that are new.

Every turn gives the whole conversation as a prompt. What it has in common with the tokens that were run before is not
run again. That may be less than all of them: a template that changes earlier turns (one that drops old reasoning), or
an answer that its own text is not tokenised to, makes them part earlier, and the cache is cut back to where they do.
"""

import dataclasses
import hashlib

from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.decoding import caches_for
from avlm.models.avlm import AVLM
from avlm.models.batch import PLACEHOLDERS

Label = int | tuple[str, int]  # a token id; or which feature of a medium with this digest


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
        while isinstance(labels[start], tuple) and labels[start][1] > 0:
            start -= 1
        self.labels = self.labels[:start]
        return _rest(prompt, start, labels), labels[start:]

    def add(self, labels: list[Label]) -> None:
        self.labels += labels


def labels_of(prompt: EncodedSample, config: ModelConfig) -> list[Label]:
    """Equal labels at the beginning of two prompts mean equal keys and values there."""
    features = {}
    for modality, items in prompt.media.items():
        of_items = [(_digest(item), len(placeholders(modality, [item], config))) for item in items]
        features[PLACEHOLDERS[modality]] = iter([(digest, n) for digest, count in of_items for n in range(count)])
    return [next(features[token]) if token in features else token for token in prompt.token_T.tolist()]


def _digest(item: Tensor) -> str:
    return hashlib.sha256(item.contiguous().numpy().tobytes()).hexdigest()


def _rest(prompt: EncodedSample, start: int, labels: list[Label]) -> EncodedSample:
    """The prompt from token ``start`` on, with the media that begin there."""
    placed = zip(prompt.token_T[:start].tolist(), labels)
    begun = [token for token, label in placed if isinstance(label, tuple) and label[1] == 0]
    media = {name: items[begun.count(PLACEHOLDERS[name]) :] for name, items in prompt.media.items()}
    return dataclasses.replace(prompt, token_T=prompt.token_T[start:], target_T=prompt.target_T[start:], media=media)
