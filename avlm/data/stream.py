"""What a loader reads: a source, seen by one of the data ranks."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from avlm.config.contrastive import Objective
from avlm.config.media import TIMESTAMP, VideoText
from avlm.config.model import MODULES, ModelConfig
from avlm.config.run import DataConfig
from avlm.data.sample import Sample

# Settings of a module that change no sample's length.
LENGTH_IS_THE_SAME = ("bias", "qkv_bias", "output_std", "resample")
OF_PROJECTORS = (
    "norm feature_norm hidden_norm output_norm norm_eps mean merge newline halve_frames stretch_above_tiles add "
    "resampler"
)
# Settings that came later. Those that stand at their defaults are left out, so that runs from before can be resumed.
LATER = {
    "data": "image_tokens markers image_layout columns shuffle_buffer_bytes duplex",
    "video": "min_frames spread frame_tokens tokens text newline chunk_seconds",
    "vision": "frames_per_patch deepstack_layers gated norm axial_rope window full_layers tokens_per_second "
    "qk_norm layer_scale axial_offset position_table fractional_time",
    "vision_projector": OF_PROJECTORS,
    "audio": "log_mel edge pool key_bias stem stem_width stem_frames mel block conv_kernel bias conv_bias scale_input",
    "audio_projector": OF_PROJECTORS,
}


@dataclass(frozen=True)
class Stream:
    """The rows that one data rank reads from a source.

    source  an Energon folder or .yaml blend, a .json or .jsonl file, hf://NAME, or "synthetic"; or a blend of these by
            weight
    data    how its samples are encoded and packed
    model   whose towers give the number of placeholders
    rank    of this data rank, one of ``world``; each reads a share of its own
    seed    of the order in which training reads
    train   endless and in random order; False: every sample once, in the order of the source
    dealt   which slots of how many this rank reads, where a checkpoint of other ranks or workers says it
            (``avlm.data.redistribute``); None: as many on each rank as there are workers
    objective  of the stage
    """

    source: str | dict[str, float]
    data: DataConfig
    model: ModelConfig
    rank: int
    world: int
    seed: int
    train: bool
    dealt: tuple[range, int] | None = None
    objective: Objective = "answers"

    @property
    def slots(self) -> range:
        """The numbers of what this rank reads in turn: each slot has a share of the samples of its own."""
        if self.dealt is not None:
            return self.dealt[0]
        return range(self.rank * self.num_workers, (self.rank + 1) * self.num_workers)

    @property
    def num_slots(self) -> int:
        """Of all data ranks."""
        return self.world * self.num_workers if self.dealt is None else self.dealt[1]

    @property
    def num_workers(self) -> int:
        """That read at the same time: the worker processes, or the own one."""
        return max(1, self.data.num_workers)

    @property
    def has_samples(self) -> bool:
        """Whether its rows are made of samples that can be bad; synthetic ones are not."""
        return isinstance(self.source, dict) or not self.source.startswith("synthetic")

    def identity(self) -> dict[str, Any]:
        """What a loader's state belongs to. Only the same stream can continue from it."""
        return {
            "rank": self.rank,
            "world": self.world,
            "workers": self.data.num_workers,
            "seed": self.seed,
            "config": fingerprint(self.data, self.model),
            **({"text": dataclasses.asdict(self.model.text)} if self.objective == "contrastive" else {}),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError if the state belongs to another stream, naming the first difference."""
        for key, value in self.identity().items():
            if state.get(key) == value:
                continue
            fix = "resume with the same seed and data"
            if key == "workers":
                fix = f"set data.num_workers={state['workers']}"
            raise ValueError(
                f"the loader state is for {key}={state.get(key)}, this run has {key}={value}: {fix}, or start from "
                "scratch with resume=never"
            )


@dataclass(frozen=True)
class Drawn:
    """A sample as a source delivers it. ``place``: plain JSON by which the source finds it again; ``reason``: why there
    is none."""

    key: str
    place: Any
    sample: Sample | None
    reason: str = ""


def fingerprint(data: DataConfig, model: ModelConfig) -> str:
    """Changes with every setting that decides what samples encode to and how they are packed, but not with the place
    of files, nor with what may change between a run and its resume."""
    settings = _settings("data", data)
    for field in dataclasses.fields(data):
        if field.metadata.get("may_change") or field.name in ("train", "tokenizer"):
            settings.pop(field.name, None)
    settings["vocab_size"] = model.decoder.vocab_size
    for name in MODULES:
        module = getattr(model, name)
        if name != "decoder" and (name not in ("cross", "codec") or module is not None):
            settings[name] = None if module is None else _settings(name, module)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _settings(name: str, config: Any) -> dict[str, Any]:
    later = LATER.get(name, "").split()
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        is_left_out = field.name in LENGTH_IS_THE_SAME or (field.name in later and value == default)
        if not is_left_out:
            found[field.name] = _settings(field.name, value) if dataclasses.is_dataclass(value) else value
    if name == "video":  # as they were called
        audio = found.pop("audio")
        found["sound"] = True if audio == "after" else audio
        if config.text == VideoText(frame=TIMESTAMP):
            found.pop("text")
            found["timestamps"] = True
    return found
