"""What the audio tower is. Sizes are whole-model sizes, as in ``avlm.config.model``."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from avlm.config.values import Heads, Kernel, Layers, Width, WidthOrDefault, config, require


def halved(count: int, times: int) -> int:
    """What convolutions of stride 2 leave, each the half of what it reads, rounded up."""
    for _ in range(times):
        count = math.ceil(count / 2)
    return count


@config
class AudioConfig:
    """An audio encoder: the defaults are Whisper's. Audio is cut into windows, which the convolutions and attention do
    not cross."""

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
    key_bias: bool = False  # of Whisper's blocks
    stem: Literal["conv1d", "conv2d", "depthwise"] = "conv1d"
    # Whisper's two convolutions over frames; or three over frames and mel bins, each of which halves both: whole ones
    # (Qwen3-Omni), or one and two pairs of a depthwise and a pointwise one (FastConformer)
    stem_width: WidthOrDefault = 0  # of conv2d and depthwise: their channels
    stem_frames: Annotated[int, Field(gt=0, le=2**20)] = 100
    # of conv2d: frames that are convolved apart from others, the last ones of a window filled up with zeros
    mel: Literal["whisper", "nemo"] = "whisper"  # see avlm.models.log_mel and avlm.models.nemo_mel
    block: Literal["whisper", "conformer"] = "whisper"
    # a transformer's with fixed positions and a last norm; or attention with relative positions and a convolution
    conv_kernel: Kernel = 9  # of a conformer block: rows that a channel's convolution sees
    bias: bool = True  # of a conformer block: of its linears
    conv_bias: bool = True  # of a conformer block: of its convolutions and the two linears around each
    scale_input: bool = False  # what the stem makes is multiplied by sqrt(hidden_size)

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )
        require(self.stem == "conv1d" or self.stem_width > 0, f"stem={self.stem} needs a stem_width")
        if self.stem == "conv2d":
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
        for key, value in {"stem": "depthwise", "mel": "nemo"}.items():
            masked = self.edge == "masked" or getattr(self, key) != value
            require(masked, f"{key}={value} needs edge=masked, not {self.edge}")
        if self.stem == "depthwise":
            require(self.num_mels % 8 == 0, f"stem=depthwise needs num_mels of a multiple of 8, not {self.num_mels}")
        if self.block == "conformer":
            require(self.hidden_size % 2 == 0, f"block=conformer needs an even hidden_size, not {self.hidden_size}")
            require(self.conv_kernel % 2 == 1, f"conv_kernel={self.conv_kernel} is even: it has no row in its middle")
            require(not self.key_bias, "key_bias=true is for block=whisper: bias is that of a conformer's keys as well")
        else:
            for key, value in {"conv_kernel": 9, "bias": True, "conv_bias": True}.items():
                found = getattr(self, key)
                require(found == value, f"{key}={found} needs block=conformer")
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
        return halved(num_frames, 3 if self.stem == "depthwise" else 1)

    @property
    def frames_together(self) -> int:
        """Frames that convolutions read in one piece, or that make a row: windows are padded to a multiple of them."""
        return {"conv1d": 2, "conv2d": self.stem_frames, "depthwise": 8}[self.stem]

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
        """Of conv2d and depthwise: what is left of the mel bins."""
        return halved(self.num_mels, 3)

    def stem_counts(self, num_frames: int) -> dict[str, int]:
        """How often the parts of the stem compute for a window, by their counts in ``avlm.models.costs``."""
        if self.stem == "depthwise":
            found = {f"halved_{n}": halved(self.num_mels, n) * halved(num_frames, n) for n in (1, 2, 3)}
            return {**found, "stem_rows": halved(num_frames, 3)}
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
