"""Exports as others run them: an engine answers the samples that we answer, from the same folder.

An engine makes a prompt of a sample's messages and files itself. Its answers must be ours but for rounding: where two
part, our log probabilities of the two tokens may differ by the engine's tolerance.
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from avlm.config.values import counted
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.evaluation.answers import prompt_of, text_of
from avlm.evaluation.decoding import caches_for
from avlm.evaluation.generation import Ranks, prompt_phase
from avlm.evaluation.llama_cpp_engine import Engine as LlamaCppEngine
from avlm.evaluation.transformers_engine import Engine as TransformersEngine
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, seen_segments
from avlm.storage.model_folder import read_json
from avlm.weights.gguf_files import MODEL
from avlm.weights.load import OpenModel
from kernels.segments import Segments


class Engine(Protocol):
    tolerance: float  # nats

    def answer(self, samples: list[Sample], max_new_tokens: int) -> list[list[int]]:
        """Greedy ids of the answer to each sample's conversation up to its last turn, without the id that ends it."""
        ...


def open_engine(name: str, folder: Path, opened: OpenModel, device: torch.device) -> Engine:
    """ValueError or FileNotFoundError for a folder that is not the engine's."""
    has_gguf = (folder / MODEL).is_file()
    is_ours_alone = "model_type" not in read_json(folder / "config.json")
    if has_gguf != (name == "llama_cpp") or (is_ours_alone and not has_gguf):
        format = "gguf" if name == "llama_cpp" else "transformers"
        raise ValueError(f"--engine {name} cannot run {folder}: give an export of --format {format}")
    if name == "llama_cpp":
        return LlamaCppEngine(folder, opened.data, opened.config)
    return TransformersEngine(folder, opened.data, opened.config, device)


class Agreement:
    """How the answers of an engine compare with ours, of several sets."""

    def __init__(self, model: AVLM, encoder: SampleEncoder, stop_ids: list[int], tolerance: float) -> None:
        self.model = model
        self.encoder = encoder
        self.stop_ids = stop_ids
        self.tolerance = tolerance
        self.count = 0
        self.equal = 0
        self.parted = 0  # where two tokens were about as likely
        self.first = ""  # difference beyond rounding

    def add(self, name: str, sample: Sample, ours: list[int], theirs: list[int], max_new_tokens: int) -> None:
        """``ours``: with the id that ended it."""
        self.count += 1
        whole = [token for token in ours if token not in self.stop_ids]
        if whole == theirs:
            self.equal += 1
            return
        same = next(
            (i for i, pair in enumerate(zip(whole, theirs)) if pair[0] != pair[1]), min(map(len, (whole, theirs)))
        )
        prompt = prompt_of(self.encoder, sample, max_new_tokens)
        logprobs = next_logprobs(self.model, prompt, whole[:same])
        ends = logprobs[self.stop_ids].max() if self.stop_ids else logprobs.new_tensor(-torch.inf)
        of_each = [logprobs[ids[same]] if same < len(ids) else ends for ids in (whole, theirs)]
        gap = float(of_each[0] - of_each[1])
        if abs(gap) <= self.tolerance:
            self.parted += 1
        elif not self.first:
            texts = [text_of(ids, self.encoder) for ids in (theirs, ours)]
            self.first = (
                f"{name}, {sample.key}: {texts[0]!r} instead of {texts[1]!r}; where they part, its token is {gap:.3g} "
                f"nats less likely by ours, and rounding explains {self.tolerance:g}"
            )

    def __str__(self) -> str:
        found = f"{self.equal:,} of {counted(self.count, 'answer')} equal"
        return found + f", {self.parted} part where two tokens are about equally likely" * bool(self.parted)


@torch.no_grad()
def next_logprobs(model: AVLM, prompt: EncodedSample, token_ids: list[int]) -> torch.Tensor:
    """Natural log probabilities of what follows a prompt and some tokens of its answer, float32 (V,)."""
    added_T = torch.tensor(token_ids, dtype=torch.int64)
    position_T = prompt.position_T
    if position_T is not None:
        following_T = position_T.max() + 1 + torch.arange(len(token_ids))
        position_T = torch.cat([position_T, following_T.expand(3, -1)], 1)
    longer = replace(
        prompt,
        token_T=torch.cat([prompt.token_T, added_T]),
        target_T=torch.cat([prompt.target_T, torch.full_like(added_T, IGNORE)]),
        position_T=position_T,
    )
    device = model.decoder.norm.weight.device
    batch, slots = prompt_phase([longer], model, 0, Ranks(device))
    document, last = Segments.of([len(longer)]), torch.tensor([len(prompt) - 1])  # of the prompt alone
    batch = replace(batch, **seen_segments(document, longer.token_T, last, model.config.decoder)).to(device)
    caches = caches_for(model)
    for cache in caches:
        cache.slots = slots
    return model(batch, caches)[0].log_softmax(-1)
