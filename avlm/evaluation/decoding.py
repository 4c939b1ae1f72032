"""The steps of generation: a forward over the prompts, then one forward for each new token of all sequences.

A step after the prompt reads and writes tensors that stay where they are, and nothing in it depends on a number that
the host counts. So a CUDA graph can record one step and repeat it: its hundreds of small kernels take longer to launch
than to run.

B sequences   T tokens of the current forward (all prompt tokens, then B)   S cache slots of a sequence
N new tokens of a sequence, at most   H query heads   K key/value heads   E head dim   V vocabulary
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avlm.models.attention import Scores
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, empty_batch
from avlm.models.reading import MediaRow
from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.segments import Segments


@dataclass
class Slots:
    """Where the tokens of the current forward are stored, shared by the caches of all blocks.

    index_T    int64: index of each token in the flattened (B, S) cache
    length_B   int64: used slots of each sequence, with this forward's tokens
    shift_B    int64 or float64: the position of a new token of each sequence less its slot; not 0 where media take up
               fewer positions than tokens (M-RoPE)
    visible_B  int64: the first slot of each sequence in its sliding window; after the prompt, for layers with one
    features   where the features of prompts are stored, of a model with cross-attention
    held       while the prompt of an only sequence continues what the caches hold: the segment of its keys, old and new
    """

    index_T: Tensor
    length_B: Tensor
    shift_B: Tensor
    size: int
    is_prompt: bool = True
    visible_B: Tensor | None = None
    features: "FeatureSlots | None" = None
    held: Segments | None = None


@dataclass
class FeatureSlots:
    """Where keys and values of the features of media are stored, which new tokens read.

    index_S   int64: index of each feature in the flattened (B, S) cache
    length_B  int64: features of each sequence
    first_B   int64: the first of them that its new tokens see
    """

    index_S: Tensor
    length_B: Tensor
    first_B: Tensor
    size: int

    @staticmethod
    def of(row: MediaRow, device: torch.device) -> "FeatureSlots":
        """Of prompts, a document each. On the host."""
        assert row.tokens.intervals is not None
        length_B = row.features.cu_seqlens.diff().long()
        size = max(1, row.features.max_length)
        start_B = torch.arange(len(length_B)) * size - row.features.cu_seqlens[:-1]
        index_S = torch.arange(int(length_B.sum())) + start_B.repeat_interleave(length_B)
        first_B = row.tokens.intervals.first_T[row.tokens.cu_seqlens[1:].long() - 1].long()
        return FeatureSlots(index_S.to(device), length_B.to(device), first_B.to(device), size)


class FeatureCache:
    """Keys and values of the features that a layer of cross-attention reads, made once, with the prompt."""

    slots: Slots

    def __init__(self) -> None:
        self.k_BSKE = self.v_BSKE = torch.empty(0)

    def hold(self, k_SKE: Tensor, v_SKE: Tensor) -> None:
        slots = self.slots.features
        assert slots is not None
        shape = (len(slots.length_B), slots.size, *k_SKE.shape[1:])
        self.k_BSKE, self.v_BSKE = k_SKE.new_zeros(shape), k_SKE.new_zeros(shape)
        self.k_BSKE.flatten(0, 1).index_copy_(0, slots.index_S, k_SKE)
        self.v_BSKE.flatten(0, 1).index_copy_(0, slots.index_S, v_SKE)

    def attend(self, q_BHE: Tensor) -> Tensor:
        """From each new token to the features of its sequence."""
        slots = self.slots.features
        assert slots is not None
        return decode_attention(q_BHE, self.k_BSKE, self.v_BSKE, slots.length_B, slots.first_B)


class KeyValueCache:
    """Keys and values of one decoder block, with the number of heads and the dtype of the prompt's keys."""

    slots: Slots  # of the forward that runs

    def __init__(self, has_window: bool = False, scores: Scores = Scores()):
        self.has_window = has_window
        self.scores = scores
        self.k_BSKE = self.v_BSKE = torch.empty(0)

    @property
    def is_prompt(self) -> bool:
        return self.slots.is_prompt

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> Tensor:
        """Store keys and values, then attend: within the packed prompts, from one prompt to what is held and itself, or
        from each new token to its sequence."""
        slots = self.slots
        scores = self.scores._asdict()
        if slots.is_prompt:
            self._make_room(k_TKE)
        self.k_BSKE.flatten(0, 1).index_copy_(0, slots.index_T, k_TKE)
        self.v_BSKE.flatten(0, 1).index_copy_(0, slots.index_T, v_TKE)
        if slots.held is not None:
            used = slice(slots.held.num_rows)
            k_SKE, v_SKE = self.k_BSKE[0, used], self.v_BSKE[0, used]
            return attention(q_THE, k_SKE, v_SKE, segments, causal=True, segments_k=slots.held, **scores)
        if slots.is_prompt:
            return attention(q_THE, k_TKE, v_TKE, segments, causal=True, **scores)
        visible_B = slots.visible_B if self.has_window else None
        return decode_attention(q_THE, self.k_BSKE, self.v_BSKE, slots.length_B, visible_B, **scores)

    def _make_room(self, k_TKE: Tensor) -> None:
        """Slots for new sequences, or more slots for the one that is held."""
        slots = self.slots
        kept = self.k_BSKE, self.v_BSKE
        if slots.held is not None and kept[0].shape[1] >= slots.size:
            return
        shape = (len(slots.length_B), slots.size, *k_TKE.shape[1:])
        # Zeros, not empty: unused slots are multiplied by probability 0, so they must be finite.
        self.k_BSKE, self.v_BSKE = k_TKE.new_zeros(shape), k_TKE.new_zeros(shape)
        if slots.held is not None:
            self.k_BSKE[:, : kept[0].shape[1]] = kept[0]
            self.v_BSKE[:, : kept[1].shape[1]] = kept[1]


def caches_for(model: AVLM) -> list[Any]:
    """An empty cache for each block of the decoder, then for each layer of cross-attention."""
    decoder = model.config.decoder
    of_blocks = [KeyValueCache(decoder.has_window(i), Scores.of(decoder)) for i in range(decoder.num_layers)]
    return [*of_blocks, *(FeatureCache() for _ in (model.cross.blocks if model.cross is not None else ()))]


class Decoding:
    """The new tokens of all sequences, and the forwards that add them.

    ``choose_token`` makes tokens (B,) and their log probabilities of logits (B, V) and a row of ``draw_NB``, which are
    uniform numbers. Sequences that have ended keep decoding into their own slots, so that shapes stay fixed.
    ``caches``: those of an only sequence that the prompt continues.
    """

    def __init__(
        self,
        model: AVLM,
        slots: Slots,
        draw_NB: Tensor,
        choose_token: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        caches: list[Any] | None = None,
    ):
        self.model = model
        self.slots = slots
        self.choose_token = choose_token
        self.draw_NB = draw_NB
        self.token_NB = torch.zeros_like(draw_NB, dtype=torch.int64)
        self.logprob_NB = torch.zeros_like(draw_NB, dtype=torch.float32)
        self.count_1 = torch.zeros(1, dtype=torch.int64, device=draw_NB.device)  # new tokens of each sequence
        self.window = model.config.decoder.sliding_window
        self.caches = caches or caches_for(model)
        for cache in self.caches:
            cache.slots = slots

    def prompt(self, batch: Batch) -> None:
        """The first new token of each sequence, from the packed prompts; it is the target of a row's last position."""
        self._add(self.model(batch, self.caches))
        slots = self.slots
        num_sequences = len(slots.length_B)
        slots.is_prompt = False
        slots.held = None
        row_B = torch.arange(num_sequences, device=slots.length_B.device)
        self.first_B = row_B * slots.size
        slots.index_T = torch.empty_like(self.first_B)
        slots.visible_B = torch.empty_like(self.first_B)
        segments = Segments.of([1] * num_sequences, row_B.device)
        self.batch = dataclasses.replace(
            empty_batch(0, self.model.config).to(row_B.device),
            token_T=torch.empty_like(row_B),
            position_T=batch.position_T.new_empty(*batch.position_T.shape[:-1], num_sequences),
            segments=segments,
            windowed=segments,
            target_rows_R=row_B,
            target_R=torch.zeros_like(row_B),
            kind_R=torch.zeros_like(row_B),
        )

    def step(self) -> None:
        """The next token of each sequence."""
        slots = self.slots
        self.batch.token_T.copy_(self.token_NB.index_select(0, self.count_1 - 1).squeeze(0))
        self.batch.position_T.copy_(slots.length_B + slots.shift_B)
        slots.index_T.copy_(self.first_B + slots.length_B)
        slots.length_B.add_(1)
        if self.window is not None:
            torch.clamp(slots.length_B - self.window, min=0, out=slots.visible_B)
        self._add(self.model(self.batch, self.caches))

    def _add(self, logits_BV: Tensor) -> None:
        draw_B = self.draw_NB.index_select(0, self.count_1).squeeze(0)
        token_B, logprob_B = self.choose_token(logits_BV, draw_B)
        self.token_NB.index_copy_(0, self.count_1, token_B.unsqueeze(0))
        self.logprob_NB.index_copy_(0, self.count_1, logprob_B.unsqueeze(0))
        self.count_1.add_(1)

    def read(self, start: int, end: int) -> list[list[tuple[int, float]]]:
        """(token, log probability) of each sequence, for each of the new tokens from ``start`` to ``end``. Here, and
        nowhere else, decoding waits for the device."""
        tokens = self.token_NB[start:end].tolist()
        logprobs = self.logprob_NB[start:end].tolist()
        return [list(zip(*of_step)) for of_step in zip(tokens, logprobs)]


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph. Recording does not run it; it must have run before, which compiles its kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def choose(logits_BV: Tensor, draw_B: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
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
            p_BV.masked_fill_(p_BV.cumsum(-1) - p_BV >= top_p, 0.0)
        sum_BV = p_BV.cumsum(-1)
        index_B = (sum_BV <= draw_B[:, None] * sum_BV[:, -1:]).sum(-1)
        index_B = torch.minimum(index_B, (p_BV > 0).sum(-1) - 1)
        token_B = order_BV.gather(-1, index_B[:, None]).squeeze(-1)
    return token_B, logprob_BV.gather(-1, token_B[:, None]).squeeze(-1)
