"""What rows of a duplex model hold: who says what in 80 ms. Its rules are those of NeMo's DuplexSTTModel."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from avlm.config.model import ModelConfig
from avlm.config.values import NonNegative, Positive, Whole, config, require, shown

ROW_SECONDS = 0.08
Part = Literal["pad", "begin", "end", "word"]


@config
class DuplexConfig:
    """``data.duplex``: the agent listens and speaks at the same time, a token in each row of 80 ms."""

    pad_token: Annotated[str, Field(min_length=1)]  # control token of a row in which the agent says nothing
    begin_token: Annotated[str, Field(min_length=1)]  # control token before the first word of a turn
    end_token: Annotated[str, Field(min_length=1)]  # control token after its last word
    turn_gap: Positive = 1.0  # seconds; words at least this far apart are of two turns
    delay: Whole = 0  # rows by which all words are said later than their times
    weights: dict[Part, NonNegative] = field(default_factory=dict)  # in the loss, of rows of each kind; default: 1

    def __post_init__(self) -> None:
        tokens = [self.pad_token, self.begin_token, self.end_token]
        require(len(set(tokens)) == len(tokens), f"pad_token, begin_token and end_token must differ: {shown(tokens)}")
        require(self.weights.get("word") != 0, "weights.word=0 would train no word: give it more than 0")


def check_duplex(duplex: DuplexConfig | None, model: ModelConfig) -> None:
    """Raise ValueError for a model that does not hear in rows of 80 ms while ``data.duplex`` asks for them, or the
    other way around."""
    adds = model.audio_projector is not None and model.audio_projector.add
    if duplex is None or not adds:
        require(model.codec is None or adds, "model.codec needs data.duplex and model.audio_projector.add=true")
        fix = "set model.audio_projector.add=true" if not adds else "give data.duplex its tokens"
        require(duplex is None and not adds, f"data.duplex and model.audio_projector.add come together: {fix}")
        return
    audio, projector = model.audio, model.audio_projector
    assert audio is not None and projector is not None
    require(
        model.codec is None or not duplex.weights,
        "data.duplex.weights do not go with model.codec: its text_weight and audio_weight weigh the losses",
    )
    require(
        projector.resampler is None or projector.resampler.type == "conformer",
        "data.duplex needs an audio feature for each 80 ms, which model.audio_projector.resampler has only with "
        "type=conformer",
    )
    stacked = audio.pool * projector.downsample
    seconds = audio.seconds_per_row * stacked
    require(
        abs(seconds - ROW_SECONDS) < 1e-6,
        f"data.duplex has rows of {ROW_SECONDS:g} s, and an audio feature is {seconds:g} s: "
        f"model.audio_projector.downsample must be {ROW_SECONDS / audio.seconds_per_row / audio.pool:g}, not "
        f"{projector.downsample}",
    )
    require(
        audio.max_positions % stacked == 0,
        f"model.audio.max_positions={audio.max_positions} is no multiple of the {stacked} rows of the tower that make "
        f"a row of {ROW_SECONDS:g} s",
    )
    for key, value in {"window": "true", "log_mel": "window"}.items():
        given = getattr(audio, key)
        require(given == value, f"data.duplex needs model.audio.{key}={value}, not {given}: rows see no later window")
