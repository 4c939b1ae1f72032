"""Generation: prompts in, completions out. What runs on the device is in ``avlm.evaluation.decoding``.

B sequences   T tokens of all prompts   N new tokens of a sequence, at most
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.evaluation.decoding import Decoding, FeatureSlots, Slots, choose, recorded
from avlm.evaluation.kept_cache import KeptCache
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, seen_segments
from avlm.models.moe import mixtures
from kernels.grouped import waits_for_device
from kernels.segments import Intervals, Segments

NEW_TOKENS = 256  # of an answer, at most, if nobody says how many
READ_EVERY = 8  # steps: on a GPU, between two looks at the new tokens, for which the device has to be waited for
WARM_UP = 2  # steps that run before one is recorded, so that every kernel has been compiled and loaded

Step = list[tuple[int, float]]  # the token and the log probability of each sequence


@dataclass(frozen=True)
class Completion:
    """New tokens, with the one that ended the answer; their natural log probabilities, before temperature."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a sharded model generate together. All run the same number of forwards.

    everyone_done   (this rank is done) -> whether all ranks are
    own_part        packed prompts -> the same with the media that this rank encodes
    multiple        prompts and their tokens are padded to a multiple of this, because tensor parallelism splits both
    """

    device: torch.device
    everyone_done: Callable[[bool], bool] = lambda done: done
    own_part: Callable[[Batch], Batch] = lambda batch: batch
    multiple: int = 1


def generate(
    model: AVLM, prompts: list[EncodedSample], *, stop_ids: list[int], ranks: Ranks | None = None, **options
) -> list[Completion]:
    """One completion for each prompt, with the options of ``steps``. A sharded model needs ``ranks``."""
    answers = _Answers(len(prompts), stop_ids)
    for found in steps(model, prompts, ranks=ranks, **options):
        answers.add(found)
        if answers.are_complete if ranks is None else ranks.everyone_done(answers.are_complete):
            break
    return answers.completions


@torch.no_grad()  # inference_mode is incompatible with FSDP2
def steps(
    model: AVLM,
    prompts: list[EncodedSample],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    read_every: int | None = None,
    ranks: Ranks | None = None,
    kept: KeptCache | None = None,
) -> Iterator[list[Step]]:
    """The new tokens of all prompts, ``read_every`` steps at a time, until nobody asks for more.

    ``max_new_tokens`` None is ``NEW_TOKENS``, or what the context has room for; ``temperature`` 0 is greedy;
    ``top_k`` 0 keeps every token. Prompt i draws from its own generator, seeded ``seed + i``. Looking at the tokens
    less often changes none of them; the default is every step, and on a GPU ``READ_EVERY``. On a GPU of its own the
    steps are a CUDA graph, if nothing in them waits for it. Ranks must all ask for the same number of steps.

    ``kept`` holds the beginning of an only prompt, and afterwards all of it, with the new tokens but the last.
    """
    if max_new_tokens is None:
        room = model.config.decoder.max_position - max(map(len, prompts), default=0)
        max_new_tokens = max(1, min(NEW_TOKENS, room))
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    weight = model.decoder.embedding.weight
    # Collectives of ranks are not recorded, nor what waits for the host.
    is_recorded = ranks is None and weight.is_cuda and not (mixtures(model) and waits_for_device(weight))
    ranks = ranks or Ranks(model.decoder.embedding.weight.device)
    if read_every is None:
        read_every = READ_EVERY if ranks.device.type == "cuda" else 1
    start, labels = 0, []
    if kept is not None:
        [prompt] = prompts
        rest, labels = kept.cut(prompt)
        start, prompts = len(kept.labels), [rest]
    prompts = prompts + _fill(prompts, ranks.multiple)
    batch, slots = prompt_phase(prompts, model, max_new_tokens, ranks, start)
    draw_NB = draws(len(prompts), max_new_tokens, seed).to(ranks.device)
    chosen = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)
    decoding = Decoding(model, slots, draw_NB, chosen, kept.caches if kept else None)

    decoding.prompt(batch)
    advance = decoding.step
    num_read = 0
    for count in range(1, max_new_tokens + 1):  # new tokens of each sequence
        if count % read_every == 0 or count == max_new_tokens:
            found = decoding.read(num_read, count)
            num_read = count
            if kept is not None:
                kept.add(labels)
                labels = [token for [(token, _)] in found]  # the last of them has not been run
                kept.add(labels[:-1])
                labels = labels[-1:]
            yield found
        if count == max_new_tokens:
            break
        if is_recorded and count == 1 + WARM_UP:
            advance = recorded(decoding.step)
        advance()


class _Answers:
    """Completions of the prompts that were asked for, up to their stop tokens."""

    def __init__(self, count: int, stop_ids: list[int]):
        self.completions = [Completion([], []) for _ in range(count)]
        self.is_done = [False] * count
        self.stop_ids = stop_ids

    @property
    def are_complete(self) -> bool:
        return all(self.is_done)

    def add(self, steps: list[Step]) -> None:
        """The next tokens of all sequences, step by step; what follows a stop token is dropped."""
        for of_step in steps:
            for i, (completion, (token, logprob)) in enumerate(zip(self.completions, of_step)):
                if not self.is_done[i]:
                    completion.token_ids.append(token)
                    completion.logprobs.append(logprob)
                    self.is_done[i] = token in self.stop_ids


def draws(num_sequences: int, num_tokens: int, seed: int) -> Tensor:
    """Numbers from [0, 1), float32 (N, B): a stream of its own for each sequence."""
    draw_NB = torch.empty(num_tokens, num_sequences)
    for i in range(num_sequences):
        draw_NB[:, i] = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed + i))
    return draw_NB


def _check(model: AVLM, prompts: list[EncodedSample], max_new_tokens, temperature, top_k, top_p) -> None:
    rules = {
        f"max_new_tokens={max_new_tokens}: at least 1": max_new_tokens >= 1,
        f"temperature={temperature}: at least 0": temperature >= 0,
        f"top_k={top_k}: at least 0": top_k >= 0,
        f"top_p={top_p}: more than 0, and at most 1": 0 < top_p <= 1,
    }
    for rule, is_kept in rules.items():
        if not is_kept:
            raise ValueError(rule)
    longest = max(map(len, prompts), default=0)
    limit = model.config.decoder.max_position
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed model.decoder.max_position={limit}"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without any token cannot be continued")


def prompt_phase(
    prompts: list[EncodedSample], model: AVLM, spare: int, ranks: Ranks, start: int = 0
) -> tuple[Batch, Slots]:
    """All prompts as one packed row, the last position of each as its target; and the slots that they fill. An only
    prompt may continue ``start`` tokens that are held."""
    length_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    num_tokens = sum(map(len, prompts))
    size = start + max(map(len, prompts), default=0) + spare
    batch = pack(prompts, num_tokens, model.config)
    last_B = length_B.cumsum(0) - 1
    unused_B = torch.zeros_like(last_B)
    seen = seen_segments(Segments.of(length_B.tolist()), batch.token_T, last_B, model.config.decoder)
    batch = dataclasses.replace(batch, **seen, target_rows_R=last_B, target_R=unused_B, kind_R=unused_B)
    slot_T = torch.cat([torch.arange(0), *(torch.arange(start, start + len(prompt)) for prompt in prompts)])
    length_B += start
    shift_B = torch.tensor([_shift(prompt, start) for prompt in prompts], dtype=batch.position_T.dtype)
    index_T = torch.repeat_interleave(torch.arange(len(prompts)) * size, length_B - start) + slot_T
    slots = Slots(index_T.to(ranks.device), length_B.to(ranks.device), shift_B.to(ranks.device), size)
    if batch.media_row is not None:
        slots.features = FeatureSlots.of(batch.media_row, ranks.device)
    if start:
        slots.held = Segments.of([start + num_tokens], ranks.device)
        return _continued(batch, slot_T, model).to(ranks.device), slots
    return ranks.own_part(batch).to(ranks.device), slots


def _shift(prompt: EncodedSample, start: int) -> int | float:
    """By how much the position of a new token differs from its slot: positions continue after the prompt's largest,
    which stands in its end, past the ``start`` tokens that are held."""
    return 0 if prompt.position_T is None else prompt.position_T.max().item() + 1 - start - len(prompt)


def _continued(batch: Batch, slot_T: Tensor, model: AVLM) -> Batch:
    """The row of an only prompt as the end of tokens that are held; it fills these slots."""
    decoder = model.config.decoder
    assert decoder.bidirectional != "prefix", "nothing is held of a prompt whose tokens see each other"
    num_held = int(slot_T[-1]) + 1
    held = Segments.of([num_held])
    seen = batch.segments.intervals
    segments = dataclasses.replace(batch.segments, intervals=None)
    last_T = slot_T if seen is None else seen.last_T + slot_T[0]

    def after(first_T: Tensor) -> Segments:
        return dataclasses.replace(segments, intervals=Intervals.of(first_T, last_T, segments, held))

    full = segments if seen is None else after(torch.zeros_like(slot_T))
    windowed = full
    if decoder.sliding_window is not None and num_held > decoder.sliding_window:
        windowed = after(slot_T - decoder.sliding_window + 1)
    return dataclasses.replace(batch, segments=full, windowed=windowed)


def _fill(prompts: list[EncodedSample], multiple: int) -> list[EncodedSample]:
    """Dummy prompts that bring the number of prompts and the number of their tokens to a multiple."""
    num_tokens = sum(map(len, prompts))
    if num_tokens % multiple == 0 and len(prompts) % multiple == 0:
        return []
    count = multiple - len(prompts) % multiple
    lengths = [1] * (count - 1) + [1 + -(num_tokens + count) % multiple]
    zeros = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    return [EncodedSample("", "text", token_T, token_T) for token_T in zeros]
