"""What a contrastive stage holds that other stages do not: captions, and what compares them with media.

Assumed: rows are full of pairs of one modality, with captions of CAPTION tokens, or as long as they are filled.

N pairs of a rank   A of all ranks   C size of an embedding
"""

import math

from avlm.models.batch import PLACEHOLDERS
from avlm.preflight.case import Case
from avlm.preflight.described_step import item_size

CAPTION = 8  # tokens: short, as short ones make the most pairs


def micro_batches(case: Case) -> int:
    """Rows of a rank that are computed together."""
    return case.config.train.micro_batches(case.layout.data_ranks)


def caption_tokens(case: Case) -> int:
    text = case.model.text
    return text.max_position if text.fill_token else min(CAPTION, text.max_position)


def share_of_media(tower: str, case: Case) -> float:
    """Of the length of a row, what the features of media take."""
    modality = next(name for name in PLACEHOLDERS if case.model.modalities.get(name) == tower)
    features = max(1, case.model.features_of(tower, item_size(modality, case.model, case.stage.data)))
    return features / (features + caption_tokens(case))


def num_pairs(case: Case) -> int:
    """N."""
    fewest = min(share_of_media(tower, case) for tower in case.model.pools)
    tokens = micro_batches(case) * case.stage.data.seq_length
    return math.ceil(tokens * (1 - fewest) / caption_tokens(case))


def text_rows(case: Case) -> int:
    """Tokens of captions of a rank."""
    return caption_tokens(case) * num_pairs(case)


def loss_bytes(case: Case) -> int:
    """Embeddings and logits, float32. Of a block of N x A autograd keeps the products, without the scale, and what the
    loss makes of them; two gradients are made at a time. Softmax has two blocks; sigmoid has one, with its signs."""
    contrastive = case.model.contrastive
    own = num_pairs(case)
    of_all = own * case.layout.data_ranks
    blocks = 2 if contrastive.loss == "softmax" else 1
    embeddings = 4 * contrastive.size * (6 * own + 2 * blocks * of_all)
    return embeddings + 4 * own * of_all * (4 + 2)
