"""Validation of contrastive stages: the loss over all pairs of a set, and how often a medium finds its caption.

    zero_shot = share of media whose own caption is the nearest among the distinct captions of the set
    chance    = share of the most frequent caption, which a guesser reaches

N pairs of the set   C size of an embedding
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.contrastive import Contrastive, sigmoid_losses, softmax_losses
from avlm.parallel.mesh import World

Captions = list[tuple[int, ...]]  # their token ids


@torch.no_grad()
def zero_shot(model: AVLM, rows: Iterable[Batch], world: World) -> dict[str, float]:
    """Scores of the rows of all ranks together, which have the same number of them: {} if these hold no pair."""
    media, texts, captions = [], [], []
    scale = bias = torch.ones(1)
    for batch in rows:
        media_NC, text_NC, scale, bias = (value.cpu() for value in model(batch, predict=True))
        media.append(media_NC)
        texts.append(text_NC)
        captions += captions_of(batch)
    own = (torch.cat(media), torch.cat(texts), captions) if media else None
    found = [each for each in world.gather(own) if each is not None and len(each[0])]
    if not found:
        return {}
    media_NC, text_NC = (torch.cat([each[i] for each in found]) for i in range(2))
    captions = [caption for each in found for caption in each[2]]
    loss = set_loss(model.contrastive, media_NC, text_NC, scale, bias)
    right = nearest(media_NC, text_NC, captions)
    chance = Counter(captions).most_common(1)[0][1] / len(captions)
    return {"loss": loss, "zero_shot": right / len(captions), "chance": chance}


def captions_of(batch: Batch) -> Captions:
    token_T = batch.token_T.tolist()
    return [tuple(token_T[start : start + length]) for start, length in batch.segments.spans]


def set_loss(contrastive: Contrastive, media_NC: Tensor, text_NC: Tensor, scale: Tensor, bias: Tensor) -> float:
    """A pair's mean loss, against all pairs of the set. On the host, of one process."""
    if contrastive.config.loss == "sigmoid":
        return sigmoid_losses(text_NC @ media_NC.T * scale + bias, 0).mean().item()
    logit_NN = media_NC @ text_NC.T * scale
    return softmax_losses(logit_NN, logit_NN.T, 0).mean().item()


def nearest(media_NC: Tensor, text_NC: Tensor, captions: Captions) -> int:
    """How many media are nearest to their own caption, among the distinct ones."""
    numbers: dict[tuple[int, ...], int] = {}
    own_N = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    firsts = [captions.index(caption) for caption in numbers]
    chosen_N = (media_NC @ text_NC[firsts].T).argmax(1)
    return int((chosen_N == own_N).sum())
