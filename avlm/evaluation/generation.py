"""Generation: one forward over all prompts as a packed row, then one forward for each new token of all sequences.

B sequences   T tokens of the current forward (all prompt tokens, then B)   S cache slots of a sequence
H query heads   K key/value heads   E head dim   V vocabulary
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.segments import Segments


@dataclass(frozen=True)
class Completion:
    """New tokens, with the one that ended the answer; their natural log probabilities, before temperature."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass
class Slots:
    """Where the tokens of the current forward are stored, shared by the caches of all blocks.

    index_T   int64: index of each token in the flattened (B, S) cache
    length_B  int64: used slots of each sequence, with this forward's tokens
    """

    index_T: Tensor
    length_B: Tensor
    size: int
    is_prompt: bool = True


class KeyValueCache:
    """Keys and values of one decoder block, with the number of heads and the dtype of the prompt's keys."""

    def __init__(self, slots: Slots):
        self.slots = slots
        self.k_BSKE = self.v_BSKE = torch.empty(0)

    @property
    def is_prompt(self) -> bool:
        return self.slots.is_prompt

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> Tensor:
        """Store keys and values, then attend: within the packed prompts, or from each new token to its sequence."""
        slots = self.slots
        if slots.is_prompt:
            shape = (len(slots.length_B), slots.size, *k_TKE.shape[1:])
            # Zeros, not empty: unused slots are multiplied by probability 0, so they must be finite.
            self.k_BSKE = k_TKE.new_zeros(shape)
            self.v_BSKE = v_TKE.new_zeros(shape)
        self.k_BSKE.flatten(0, 1).index_copy_(0, slots.index_T, k_TKE)
        self.v_BSKE.flatten(0, 1).index_copy_(0, slots.index_T, v_TKE)
        if slots.is_prompt:
            return attention(q_THE, k_TKE, v_TKE, segments, causal=True)
        return decode_attention(q_THE, self.k_BSKE, self.v_BSKE, slots.length_B)


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


@torch.no_grad()  # inference_mode is incompatible with FSDP2
def generate(
    model: AVLM,
    prompts: list[EncodedSample],
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> list[Completion]:
    """One completion for each prompt. ``temperature`` 0 is greedy; ``top_k`` 0 keeps every token.

    Prompt i draws from its own generator, seeded ``seed + i``. ``on_token(i, id)`` is called for every new token. A
    sharded model needs ``ranks``.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    ranks = ranks or Ranks(model.decoder.embedding.weight.device)
    device = ranks.device
    num_asked = len(prompts)
    prompts = prompts + _fill(prompts, ranks.multiple)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    batch, slots = _prompt_phase(prompts, model, max_new_tokens, ranks)
    empty = pack([], 0, model.config).to(device)
    ones = Segments.of([1] * len(prompts), device)
    caches = [KeyValueCache(slots) for _ in range(model.config.decoder.num_layers)]

    completions = [Completion([], []) for _ in prompts]
    done = [i >= num_asked for i in range(len(prompts))]
    for step in range(max_new_tokens):
        logits_BV = model(batch, caches)
        draw_B = torch.tensor([torch.rand((), generator=generator).item() for generator in generators])
        token_B, logprob_B = choose(logits_BV, temperature, top_k, top_p, draw_B.to(device))
        # The one place where decoding waits for the device.
        for i, (token, logprob) in enumerate(zip(token_B.tolist(), logprob_B.tolist())):
            if not done[i]:
                completions[i].token_ids.append(token)
                completions[i].logprobs.append(logprob)
                done[i] = token in stop_ids
                if on_token is not None:
                    on_token(i, token)
        if step + 1 == max_new_tokens or ranks.everyone_done(all(done)):
            break
        # Finished sequences keep decoding into their own slots and are ignored, so that shapes stay fixed.
        slots.is_prompt = False
        slots.index_T = torch.arange(len(prompts), device=device) * slots.size + slots.length_B
        batch = _next_batch(empty, token_B, slots.length_B, ones)
        slots.length_B = slots.length_B + 1
    return completions[:num_asked]


def choose(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, draw_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each sequence, and its log probability (before temperature); ``draw_B`` is uniform in [0, 1).

    It is drawn from the ``top_k`` most likely tokens, and of those from the fewest whose probabilities add up to
    ``top_p``.
    """
    logprob_BV = logits_BV.log_softmax(-1)
    if temperature == 0.0:
        token_B = logits_BV.argmax(-1)
    else:
        # float64: the sum over a large vocabulary must not stay below a draw close to 1.
        p_BV, order_BV = (logits_BV.double() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
        if top_k:
            p_BV[:, top_k:] = 0.0
            p_BV /= p_BV.sum(-1, keepdim=True)
        if top_p < 1.0:
            p_BV[p_BV.cumsum(-1) - p_BV >= top_p] = 0.0
        sum_BV = p_BV.cumsum(-1)
        index_B = (sum_BV <= draw_B[:, None] * sum_BV[:, -1:]).sum(-1)
        index_B = torch.minimum(index_B, (p_BV > 0).sum(-1) - 1)
        token_B = order_BV.gather(-1, index_B[:, None]).squeeze(-1)
    return token_B, logprob_BV.gather(-1, token_B[:, None]).squeeze(-1)


def _check(model: AVLM, prompts: list[EncodedSample], max_new_tokens, temperature, top_k, top_p) -> None:
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}: "
            "at least 1, at least 0, at least 0, and in (0, 1]"
        )
    longest = max(map(len, prompts), default=0)
    limit = model.config.decoder.max_position
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed model.decoder.max_position={limit}"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without any token cannot be continued")


def _prompt_phase(prompts: list[EncodedSample], model: AVLM, spare: int, ranks: Ranks) -> tuple[Batch, Slots]:
    """All prompts as one packed row, the last position of each as its target; and the slots that they fill."""
    length_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    num_tokens = sum(map(len, prompts))
    size = max(map(len, prompts), default=0) + spare
    batch = pack(prompts, num_tokens, model.config)
    last_B = length_B.cumsum(0) - 1
    unused_B = torch.zeros_like(last_B)
    batch = dataclasses.replace(batch, target_rows_R=last_B, target_R=unused_B, kind_R=unused_B)
    first_T = torch.repeat_interleave(torch.arange(len(prompts)) * size, length_B)
    index_T = first_T + batch.position_T
    slots = Slots(index_T.to(ranks.device), length_B.to(ranks.device), size)
    return ranks.own_part(batch).to(ranks.device), slots


def _fill(prompts: list[EncodedSample], multiple: int) -> list[EncodedSample]:
    """Dummy prompts that bring the number of prompts and the number of their tokens to a multiple."""
    num_tokens = sum(map(len, prompts))
    if num_tokens % multiple == 0 and len(prompts) % multiple == 0:
        return []
    count = multiple - len(prompts) % multiple
    lengths = [1] * (count - 1) + [1 + -(num_tokens + count) % multiple]
    zeros = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    return [EncodedSample("", "text", token_T, token_T) for token_T in zeros]


def _next_batch(empty: Batch, token_B: Tensor, position_B: Tensor, segments: Segments) -> Batch:
    unused_B = torch.zeros_like(token_B)
    return dataclasses.replace(
        empty,
        token_T=token_B,
        position_T=position_B,
        segments=segments,
        target_rows_R=torch.arange(len(token_B), device=token_B.device),
        target_R=unused_B,
        kind_R=unused_B,
    )
