"""How images and videos become features: views, tiles, frames, and the text around them."""

import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from avlm.config.values import Pixels, Positive, config, require, shown

Frames = Annotated[int, Field(gt=0, le=2**20)]
Bounds = Annotated[list[Positive], Field(min_length=2, max_length=2)]  # the least and the most
Marks = Annotated[list[str], Field(min_length=2, max_length=2)]  # before and after
TilesOfSide = Annotated[int, Field(gt=0, le=64)]
TileGrid = Annotated[list[TilesOfSide], Field(min_length=2, max_length=2)]  # lines and columns

TIMESTAMP = "<{time} seconds>"  # what ``timestamps: true`` was


def no_marks() -> list[str]:
    return ["", ""]


@config
class ImageLayout:
    """How an image is cut into views, which the vision tower encodes one by one, and what stands between their
    features. By default there is one view, whose features follow each other line by line.

    Markers are as those of ``data.markers``: text with control tokens, {line} and {column} of a tile from 1 on. Control
    tokens are read in texts too.
    """

    tiles: Literal["none", "pinpoints", "aspect", "long_edge"] = "none"
    # for a tower of squares. pinpoints (LLaVA-NeXT): the whole image, then the tiles of one of ``grids``, whose
    # features are joined to one grid without its padding. aspect (InternVL): the tiles of the grid whose shape is
    # nearest, then the whole image if there are several. long_edge (Idefics3): an image whose long side is given
    # longest_edge pixels is cut if it then is larger than a tile; its tiles, then the whole image
    grids: list[TileGrid] = field(default_factory=list)  # of pinpoints: lines and columns of tiles to choose from
    join: bool = True  # false: the tiles of pinpoints follow each other, features of padding included (NeMo's AVLM)
    min_tiles: TilesOfSide = 1  # bounds of aspect
    max_tiles: TilesOfSide = 12
    longest_edge: Pixels | None = None
    # of long_edge, and of a tower with resize=longest. What a tower of squares sees whole, an image or a frame, gets a
    # long side of so many pixels before it becomes a square (Idefics3)
    only_alone: bool = False  # cut an image only if it is the only one of its sample
    tile_markers: Marks = field(default_factory=no_marks)  # around the features of a tile
    line_end: str = ""  # text after each line of tiles
    tiles_end: str = ""  # text after all tiles
    whole_markers: Marks = field(default_factory=no_marks)  # around the features of the whole image
    line_break: str = ""  # between lines of features: text with control tokens

    def __post_init__(self) -> None:
        require((self.tiles == "pinpoints") == bool(self.grids), "grids are given with tiles=pinpoints, and only there")
        require(self.min_tiles <= self.max_tiles, f"min_tiles={self.min_tiles} is above max_tiles={self.max_tiles}")
        require(self.tiles != "long_edge" or self.longest_edge is not None, "tiles=long_edge needs longest_edge")
        require(self.join or self.tiles == "pinpoints", "join=false needs tiles=pinpoints")
        if self.tiles == "none" or self.joins:
            for key in ("tile_markers", "line_end", "tiles_end"):
                value = getattr(self, key)
                require(not any(value), f"{key}={shown(value)} needs tiles that are not joined to one grid")
        if self.tiles == "none":
            require(not self.only_alone, "only_alone needs tiles")
        check_places("tile_markers", self.tile_markers, ["line", "column"])
        others = {"line_end": self.line_end, "tiles_end": self.tiles_end, "line_break": self.line_break}
        for key, text in others.items():
            check_places(key, [text], [])
        check_places("whole_markers", self.whole_markers, [])

    @property
    def joins(self) -> bool:
        """Whether the features of tiles are joined to one grid."""
        return self.tiles == "pinpoints" and self.join


@config
class VideoText:
    """Text around the frames of a video, in which control tokens are read: {count} and {count_in_words} of patches of
    frames, {duration} as H:MM:SS; in ``frame`` the number {n} of a patch of frames, and its {time} in seconds or as
    {clock}, MM:SS."""

    before: str = ""
    frame: str = ""  # before each patch of frames, which then gets the markers of a video of its own
    between: str = ""  # after each patch of frames but the last
    after: str = ""

    def __post_init__(self) -> None:
        for key in ("before", "frame", "between", "after"):
            text = getattr(self, key)
            known = ["count", "count_in_words", "duration", *(["n", "time", "clock"] if key == "frame" else [])]
            try:
                text.format_map(dict.fromkeys(known, ""))
            except (KeyError, ValueError, IndexError, AttributeError):
                raise ValueError(f"{key}={shown(repr(text))}: in braces stand only {', '.join(known)}") from None

    @property
    def of_frames(self) -> bool:
        """Whether each patch of frames stands for itself."""
        return bool(self.frame or self.between)


@config
class VideoConfig:
    num_frames: Frames | None = 8  # spread evenly over the video; give this or fps
    fps: Positive | None = None  # frames per second of video
    min_frames: Frames = 1  # bounds with fps
    max_frames: Frames = 64
    spread: Literal["middles", "starts", "middle_frames", "first_to_last", "inner"] = "middles"
    # which frames. middles: those of equal parts of the video; with fps, one every 1 / fps, unless a bound forbids it.
    # starts: those of equal parts (Qwen2-VL); middle_frames: half a part later (InternVL). first_to_last: evenly, both
    # ends included (Qwen3-VL); inner: likewise, without the first and the last second of a long video (SmolVLM2)
    frame_tokens: Bounds | None = None
    # with model.vision.resize=area: bounds of the features of one patch of frames; null: data.image_tokens
    tokens: Bounds | None = None  # bounds of a whole video: the more frames, the smaller they become (Qwen3-VL)
    text: VideoText = field(default_factory=VideoText)
    newline: bool = False  # end with the learned row of model.vision_projector.newline
    audio: Literal[False, "after", "interleaved", "merged"] = False
    # encode the video's own audio too: after its frames, or in turns of chunk_seconds, each with its frames first
    # (Qwen2.5-Omni), or each patch of frames before the first feature of audio that is not earlier (Qwen3-Omni)
    chunk_seconds: Annotated[float, Field(ge=1e-3)] = 2.0

    def __post_init__(self) -> None:
        require(
            self.text == VideoText() or self.audio in (False, "after"),
            f"text goes with audio=after or false, not with audio={self.audio}",
        )
        require((self.num_frames is None) != (self.fps is None), "give num_frames or fps, and set the other to null")
        require(self.spread != "inner" or self.fps is not None, "spread=inner needs fps")
        require(
            self.min_frames <= self.max_frames, f"min_frames={self.min_frames} is above max_frames={self.max_frames}"
        )
        require(self.frame_tokens is None or self.tokens is None, "give frame_tokens or tokens, not both")
        for name in ("frame_tokens", "tokens"):
            check_bounds(name, getattr(self, name))


def with_new_names(video: Any) -> Any:
    """Runs and exports of before have ``sound: true`` for ``audio: after``, and ``timestamps: true`` for a text."""
    if not isinstance(video, dict):
        return video
    found = dict(video)
    if type(video.get("sound")) is bool and "audio" not in video:
        found["audio"] = "after" if found.pop("sound") else False
    if type(video.get("timestamps")) is bool and "text" not in video:
        found["text"] = {"frame": TIMESTAMP} if found.pop("timestamps") else {}
    return found


def check_places(name: str, texts: Sequence[str], known: Sequence[str]) -> None:
    """A word in braces that stands for nothing would be read as text."""
    for text in texts:
        for word in re.findall(r"\{(\w+)\}", text):
            allowed = " and ".join(f"{{{each}}}" for each in known)
            found = f"{name}={shown(repr(text))}: {{{word}}} stands for nothing here"
            require(word in known, found + (f", only {allowed}" if known else ""))


def check_bounds(name: str, bounds: list[float] | None) -> None:
    """Of features."""
    if bounds is None:
        return
    least, most = bounds
    require(least <= most, f"{name}={bounds}: the least is above the most")
    require(most >= 1, f"{name}={bounds}: at most {most:g} features leave no room for one")
