"""What a token sees where a decoder looks ahead: intervals against masks by their definition, and models with them."""

import dataclasses
import math
import random

import pytest
import torch

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.generation import generate, steps
from avlm.evaluation.kept_cache import KeptCache
from avlm.models.attention import AttentionCore, Scores
from avlm.models.batch import IGNORE, IMAGE, NEWLINE, Batch, seen_segments
from avlm.models.costs import counts
from kernels.segments import Segments
from tests.models.handmade import build
from tests.models.test_avlm import WHOLE

DECODER = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_position=256
)
GEMMA = {
    **{"activation": "gelu_tanh", "norm_offset": True, "post_norms": True, "qk_norm": True, "embedding_scale": True},
    **{"score_size": 5.0, "attention_softcap": 3.0, "logit_softcap": 4.0, "rope_stretch": 3.0},
    **{"sliding_window": 6, "window_layers": [1], "window_rope_theta": 100.0},
}


def sees(i: int, j: int, token: list[int], target_rows: list[int], decoder: DecoderConfig, window: int | None) -> bool:
    """Whether row i of a document sees row j of it."""
    is_seen = j <= i
    is_near = window is None or j > i - window
    if decoder.bidirectional == "images":
        between = token[min(i, j) : max(i, j) + 1]
        return (is_seen or all(each in (IMAGE, NEWLINE) for each in between)) and is_near
    last_of_prefix = min(target_rows, default=-1)
    return (is_seen and is_near) or max(i, j) <= last_of_prefix


def document(draw: random.Random) -> tuple[list[int], list[int]]:
    """Tokens, and the rows that have a target."""
    token = []
    for _ in range(draw.randint(0, 5)):
        kind = draw.choice([1, 1, IMAGE, IMAGE, NEWLINE])
        token += [kind] * draw.randint(1, 7)
    rows = [row for row in range(len(token)) if draw.random() < 0.2]
    return token, draw.choice([rows, rows, []])


def visible(segments: Segments, num_rows: int) -> torch.Tensor:
    """bool (T, T): what intervals say, or the causal mask without them."""
    mask_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for start, length in segments.spans:
        row_L = torch.arange(length)
        first_L, last_L = 0 * row_L, row_L
        if segments.intervals is not None:
            first_L, last_L = (
                x[start : start + length] for x in (segments.intervals.first_T, segments.intervals.last_T)
            )
        inside = slice(start, start + length)
        mask_TT[inside, inside] = (row_L >= first_L[:, None]) & (row_L <= last_L[:, None])
    return mask_TT


@pytest.mark.parametrize("bidirectional", ["images", "prefix"])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_intervals_are_the_masks_of_their_definition(bidirectional, window):
    decoder = dataclasses.replace(DECODER, bidirectional=bidirectional, sliding_window=window)
    draw = random.Random(0)
    num_ahead = 0
    for _ in range(60):
        documents = [document(draw) for _ in range(draw.randint(1, 4))]
        expected = {None: [], window: []}
        for width, masks in expected.items():
            for token, rows in documents:
                L = range(len(token))
                mask = [[sees(i, j, token, rows, decoder, width) for j in L] for i in L]
                masks.append(torch.tensor(mask, dtype=torch.bool).view(len(token), len(token)))
        lengths = [len(token) for token, _ in documents]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        token_T = torch.tensor([each for token, _ in documents for each in token], dtype=torch.int64)
        rows_R = torch.tensor([start + r for start, (_, rows) in zip(starts, documents) for r in rows]).long()
        found = seen_segments(Segments.of(lengths), token_T, rows_R, decoder)
        assert visible(found["segments"], len(token_T)).equal(torch.block_diag(*expected[None]).bool())
        num_ahead += found["segments"].intervals is not None
        if window is None:
            assert found["windowed"] is None
            continue
        mask_TT = torch.block_diag(*expected[window]).bool()
        assert visible(found["windowed"], len(token_T)).equal(mask_TT)
        _compare_attention(found["windowed"], mask_TT)
    assert num_ahead > 30  # else the definition would be compared with causal masks alone


def _compare_attention(segments: Segments, mask_TT: torch.Tensor) -> None:
    """By the formula, in float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, len(mask_TT), 2, 4, dtype=torch.float64)
    found = AttentionCore(True, Scores(0.7, 1.5))(q, k, v, segments)
    scores = 1.5 * torch.tanh(0.7 / 1.5 * torch.einsum("ihe,jhe->hij", q, k))
    p = scores.masked_fill(~mask_TT, -math.inf).softmax(-1)
    assert torch.allclose(found, torch.einsum("hij,jhe->ihe", p, v), atol=1e-12)


def model_of(bidirectional: str, **changes) -> ModelConfig:
    decoder = dataclasses.replace(DECODER, **{**GEMMA, "bidirectional": bidirectional, **changes})
    return dataclasses.replace(WHOLE, decoder=decoder)


def sample(config: ModelConfig, *parts: int | str, num_targets: int = 0) -> EncodedSample:
    """Of tokens and "image"s; each of the last ``num_targets`` tokens is learned."""
    images = list(torch.randint(256, (parts.count("image"), 4, 4, 3 * 4 * 4), dtype=torch.uint8))
    ids = []
    for part in parts:
        ids += placeholders("image", images[:1], config) if part == "image" else [part]
    token_T = torch.tensor(ids)
    target_T = torch.full_like(token_T, IGNORE)
    if num_targets:
        target_T[-num_targets - 1 : -1] = token_T[-num_targets:]
    return EncodedSample("", "image" if images else "text", token_T, target_T, {"image": images, "audio": []})


def losses(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)[1]


@pytest.mark.parametrize("bidirectional", ["images", "prefix"])
def test_packed_documents_equal_separate_ones_and_look_ahead(bidirectional):
    config = model_of(bidirectional)
    model = build(config)
    samples = [
        sample(config, 1, "image", "image", 5, 6, 7, 8, 9, num_targets=3),
        sample(config, *range(1, 20), num_targets=9),
        sample(config, 3, "image", 4, "image", 5, num_targets=1),
    ]
    packed = losses(model, pack(samples, 96, config))
    alone = [pack([each], len(each), config) for each in samples]
    assert torch.allclose(packed, torch.cat([losses(model, batch) for batch in alone]), atol=1e-5)
    causal = build(model_of("none"))
    assert not torch.allclose(packed, losses(causal, pack(samples, 96, causal.config)), atol=1e-2)
    found = pack(samples, 96, config)
    num_pairs = [int(visible(each, 96).sum()) for each in (found.segments, found.windowed)]
    assert [counts(found)[name] for name in ("token_pairs", "window_pairs")] == num_pairs


@pytest.mark.parametrize("bidirectional", ["none", "images", "prefix"])
@pytest.mark.parametrize("window", [None, 6])
def test_answers_token_by_token_are_those_of_one_forward_over_prompt_and_answer(bidirectional, window):
    changes = {} if window else {"sliding_window": None, "window_layers": None, "window_rope_theta": None}
    config = model_of(bidirectional, **changes)
    model = build(config)
    prompts = [sample(config, 1, "image", 2, 3, 4, 5, "image", 6), sample(config, *range(1, 12))]
    answers = generate(model, prompts, stop_ids=[], max_new_tokens=9)
    for asked, answer in zip(prompts, answers):
        token_T = torch.cat([asked.token_T, torch.tensor(answer.token_ids)])
        target_T = torch.full_like(token_T, IGNORE)
        target_T[len(asked) - 1 : -1] = token_T[len(asked) :]
        whole = dataclasses.replace(asked, token_T=token_T, target_T=target_T)
        _, loss_R, likeliest_R = model(pack([whole], len(token_T), config), predict=True)
        assert likeliest_R.tolist() == answer.token_ids
        assert torch.allclose(-loss_R, torch.tensor(answer.logprobs), atol=1e-5)


@pytest.mark.parametrize("bidirectional", ["images", "prefix"])
def test_a_conversation_whose_cache_is_kept_answers_as_one_that_is_run_at_once(bidirectional):
    """Its second turn begins with an image behind another, which then see each other; its third ends one of them."""
    config = model_of(bidirectional)
    model = build(config)
    kept = KeptCache(model)
    lengths = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    first = sample(config, 1, 2, "image")
    images = first.media["image"] + list(torch.randint(256, (1, 4, 4, 3 * 4 * 4), dtype=torch.uint8))
    n = len(first) - 2
    answer: list[int] = []
    turns = [([1, 2, *[IMAGE] * n], 0), ([1, 2, *[IMAGE] * 2 * n, 7, 8], 2), ([1, 2, *[IMAGE] * n, 7], 2)]
    turns.append((None, len(turns[2][0]) + 5))
    for ids, num_held in turns:
        if ids is None:
            ids = [*turns[2][0], *answer, 9, *[IMAGE] * n, 3]
        asked = sample(config, *ids)
        asked = dataclasses.replace(asked, media={"image": images[: ids.count(IMAGE) // n], "audio": []})
        [whole] = generate(model, [asked], stop_ids=[], max_new_tokens=6)
        lengths.clear()
        found = [token for [[token]] in steps(model, [asked], max_new_tokens=6, kept=kept)]
        assert [token for token, _ in found] == whole.token_ids
        assert [logprob for _, logprob in found] == pytest.approx(whole.logprobs, abs=1e-5)
        assert lengths[0] == len(ids) - (0 if bidirectional == "prefix" else num_held)
        answer = whole.token_ids
