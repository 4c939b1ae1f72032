"""What the audio tower is. Sizes are whole-model sizes, as in ``avlm.config.model``."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from avlm.config.values import Heads, Layers, Width, WidthOrDefault, config, require


def halved(count: int, times: int) -> int:
    """What convolutions of stride 2 leave, each the half of what it reads, rounded up."""
    for _ in range(times):
        count = math.ceil(count / 2)
    return count


@config
class AudioConfig:
    """Whisper encoder. Audio is cut into windows, which the convolutions and attention do not cross."""

    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    num_mels: Annotated[int, Field(gt=0, le=2**10)] = 80
    max_positions: Annotated[int, Field(gt=0, le=2**20)] = 1500  # rows of a full window: 20 ms each with stem=conv1d
    window: Literal["true", "fixed"] = "true"  # only the clip's rows, or the whole window's even if the clip is shorter
    log_mel: Literal["window", "clip"] = "window"  # made of each window alone, or of the whole clip before it is cut
    edge: Literal["zeros", "silence", "masked"] = "zeros"
    # what is past a clip: zeros or frames of silence before the first convolution; masked: zeros before each of the two
    pool: Literal[1, 2] = 1  # rows whose mean is a row of the output, before the last norm; an odd last row is dropped
    key_bias: bool = False
    stem: Literal["conv1d", "conv2d"] = "conv1d"
    # Whisper's two convolutions over frames; or three over frames and mel bins, each of which halves both (Qwen3-Omni)
    stem_width: WidthOrDefault = 0  # of conv2d: its channels
    stem_frames: Annotated[int, Field(gt=0, le=2**20)] = 100
    # of conv2d: frames that are convolved apart from others, the last ones of a window filled up with zeros

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )
        if self.stem == "conv2d":
            require(self.stem_width > 0, "stem=conv2d needs a stem_width")
            require(
                (self.window, self.edge, self.pool) == ("true", "zeros", 1),
                f"stem=conv2d needs window=true, edge=zeros and pool=1, not {self.window}, {self.edge} and {self.pool}",
            )
            require(self.stem_frames % 2 == 0, f"stem_frames={self.stem_frames} is odd")
            rows = self.rows_of(self.stem_frames)
            require(
                self.max_positions % rows == 0,
                f"max_positions={self.max_positions} is no multiple of the {rows} rows that stem_frames="
                f"{self.stem_frames} make",
            )
        require(self.window == "true" or self.edge == "zeros", f"edge={self.edge} needs window=true")
        require(
            self.max_positions >= self.pool, f"max_positions={self.max_positions} is fewer than pool={self.pool} rows"
        )

    @property
    def num_rows(self) -> int:
        """Rows of a full window in the tower."""
        return self.max_positions

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    @property
    def width(self) -> int:
        """Numbers of an output row."""
        return self.hidden_size

    def item_shape(self, num_frames: int) -> tuple[int, int]:
        """Mel bins, and frames of a window that holds so many of a clip: with edge=silence there are some behind them,
        which the rows of the clip see."""
        if self.edge == "silence":
            return self.num_mels, 2 * self.rows_of(num_frames) + 2
        return self.num_mels, num_frames

    def rows_of(self, num_frames: int) -> int:
        """Rows in the tower of a window with so many frames of a clip."""
        if self.stem == "conv2d":
            whole, rest = divmod(num_frames, self.stem_frames)
            return whole * halved(self.stem_frames, 3) + halved(rest, 3)
        return halved(num_frames, 1)

    @property
    def frames_together(self) -> int:
        """Frames that convolutions read in one piece, or that make a row: windows are padded to a multiple of them."""
        return self.stem_frames if self.stem == "conv2d" else 2

    @property
    def rows_together(self) -> int:
        """Rows that those frames make."""
        return self.rows_of(self.frames_together)

    @property
    def window_frames(self) -> int:
        """Frames of a full window, 10 ms each."""
        return self.max_positions // self.rows_together * self.frames_together

    @property
    def stem_bins(self) -> int:
        """Of conv2d: what is left of the mel bins."""
        return halved(self.num_mels, 3)

    def stem_counts(self, num_frames: int) -> dict[str, int]:
        """How often the parts of the stem compute for a window, by their counts in ``avlm.models.costs``."""
        num_frames += -num_frames % self.frames_together
        rows = self.rows_of(num_frames)
        if self.stem == "conv1d":
            return {"frames": num_frames, "strided_frames": rows}
        pieces = num_frames // self.stem_frames
        found = {f"halved_{n}": pieces * halved(self.num_mels, n) * halved(self.stem_frames, n) for n in (1, 2, 3)}
        return {**found, "stem_rows": rows}

    @property
    def seconds_per_row(self) -> float:
        """Of the tower, before pooling."""
        return 0.01 * self.frames_together / self.rows_together

    def outputs_of(self, num_frames: int) -> int:
        """Rows of the tower's output."""
        return self.rows_of(num_frames) // self.pool

    def rows_per_feature(self, projector: Any) -> int:
        """Output rows that the projector makes one of."""
        return projector.downsample

    def num_features(self, num_frames: int, downsample: int) -> int:
        """Positions in the decoder of a window; the last may be made of fewer rows than the others."""
        return math.ceil(self.outputs_of(num_frames) / downsample)
