"""What a model is: towers, projectors and adapters, with their sizes.

Fields stand in the order of their importance; sizes are whole-model sizes, never per-rank sizes. Every number has a
range, so that a typo is reported when the file is read, before anything is computed with it.
"""

import math
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from avlm.config.audio import AudioConfig
from avlm.config.codec import CodecConfig
from avlm.config.connector import CrossConfig, ResamplerConfig
from avlm.config.contrastive import ALIGNMENT, ContrastiveConfig, PoolConfig, TextConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.values import (
    Epsilon,
    FromTheEnd,
    Heads,
    Layers,
    Norm,
    Pixels,
    Positive,
    Share,
    ShareBelowOne,
    Stack,
    Whole,
    Width,
    WidthOrDefault,
    config,
    require,
    shown,
)

MODULES = ("decoder", "cross", "vision", "audio", "vision_projector", "audio_projector", "codec")
Module = Literal["decoder", "cross", "vision", "audio", "vision_projector", "audio_projector", "codec"]
TOWERS = {"image": "vision", "audio": "audio"}  # modality -> its tower, whose projector is called TOWER_projector


@config
class VisionConfig:
    """A ViT. The defaults are CLIP's; SigLIP is the same tower without class token and pre-norm, with a patch bias and
    another GELU. With ``resize: area`` or ``longest`` it takes images and videos of any grid of patches (the towers of
    Qwen-VL and Pixtral)."""

    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    image_size: Pixels | None = None
    # side of all images; of towers of any grid, of the square that the position table covers, null: there is no table
    patch_size: Pixels  # square; pixels past the last whole patch are dropped, as a convolution does
    frames_per_patch: Literal[1, 2] = 1  # 2: a patch spans two frames of a video; an image counts as two equal frames
    feature_layer: FromTheEnd = -2  # -1: output of the last layer, -2: of the one before; later layers are not built
    deepstack_layers: list[Whole] = field(default_factory=list)  # whose output goes into the first decoder layers
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    gated: bool = False  # down(activation(gate(x)) * up(x))
    bias: bool = True  # of the linears of the layers
    qkv_bias: bool = True  # of queries, keys and values, where there is a bias (InternViT 6B has none)
    qk_norm: bool = False  # RMSNorm on queries and keys, over all heads together (InternViT 6B)
    layer_scale: bool = False  # learned factors on what attention and MLP add (InternViT)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: Epsilon = 1e-5
    class_token: bool = True  # dropped from the features
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: bool = False  # normalise the features; SigLIP does where feature_layer is -1
    axial_rope: bool = False  # rotary positions: half of each head turns with a patch's line, half with its column
    axial_offset: bool = False  # lines and columns take turns in one series of speeds (Pixtral), or have the same
    position_table: Literal["bilinear", "bucket"] = "bilinear"
    # of a tower of any grid: stretched over the image, or each patch takes the row of its share of the side (Idefics3)
    window: Stack | None = None  # patches a side of the windows within which layers attend; null: whole images
    full_layers: list[Whole] = field(default_factory=list)  # that attend to whole images although there are windows
    tokens_per_second: Positive | None = None  # steps of M-RoPE's time; null: one for each patch of frames
    fractional_time: bool = False  # those steps are not rounded down (Qwen3-Omni)
    mean: Annotated[list[Share], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.48145466, 0.4578275, 0.40821073]
    )  # of RGB in 0..1
    std: Annotated[list[Annotated[float, Field(ge=1e-3, le=1)]], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.26862954, 0.26130258, 0.27577711]
    )
    resize: Literal["crop", "stretch", "area", "longest"] = "crop"
    # to a square: its shortest side, then the centre (CLIP), or both sides (SigLIP). To whole features, keeping its
    # shape: within the bounds of data.image_tokens (area), or no side above data.image_layout.longest_edge (longest)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"  # SigLIP 2 is bilinear, Idefics3 lanczos

    def __post_init__(self) -> None:
        require(self.any_grid or self.image_size is not None, f"resize={self.resize} needs the image_size of squares")
        require(
            self.image_size is None or self.patch_size <= self.image_size,
            f"patch_size={self.patch_size} is more than image_size={self.image_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}",
        )
        require(
            -self.num_layers <= self.feature_layer <= -1,
            f"feature_layer={self.feature_layer} must lie in -{self.num_layers}..-1",
        )
        if not self.any_grid:
            for key, default in {"axial_rope": False, "window": None, "frames_per_patch": 1}.items():
                value = getattr(self, key)
                require(value == default, f"{key}={value} needs resize=area or longest")
        require(self.resample != "lanczos" or self.resize != "crop", "resample=lanczos does not go with resize=crop")
        require(not (self.any_grid and self.class_token), f"resize={self.resize} goes with class_token=false")
        require(self.axial_rope or not self.axial_offset, "axial_offset needs axial_rope")
        require(
            not self.axial_rope or self.head_dim % 4 == 0,
            f"axial_rope needs heads of a multiple of 4, not hidden_size / num_heads = {self.head_dim}",
        )
        for key in ("deepstack_layers", "full_layers"):
            layers = getattr(self, key)
            require(
                layers == sorted(set(layers)) and all(layer < self.num_blocks for layer in layers),
                f"{key}={shown(layers)} must ascend and lie below the {self.num_blocks} layers that are built",
            )
        require(self.window is not None or not self.full_layers, "full_layers needs a window")

    @property
    def any_grid(self) -> bool:
        """Whether images keep their shape."""
        return self.resize in ("area", "longest")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch: its channels, frames, lines and columns, in this order."""
        return 3 * self.frames_per_patch * self.patch_size**2

    @property
    def patches_per_side(self) -> int:
        """Of a square image, or of the square that the position table covers (0: there is no table)."""
        return (self.image_size or 0) // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def num_rows(self) -> int:
        """Rows of a square image in the tower: its class token, if there is one, then its patches."""
        return self.class_token + self.num_patches

    @property
    def num_blocks(self) -> int:
        """Layers that are built: those above the feature layer would never run."""
        return self.num_layers + 1 + self.feature_layer

    @property
    def width(self) -> int:
        """Numbers of an output row: those of the last layer, then those of each of deepstack_layers."""
        return self.hidden_size * (1 + len(self.deepstack_layers))

    def has_window(self, layer: int) -> bool:
        return self.window is not None and layer not in self.full_layers

    def item_shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Patches and their numbers, of an image of so many lines and columns of patches."""
        return math.prod(grid), self.patch_numbers

    def rows_of(self, grid: tuple[int, int]) -> int:
        """Rows in the tower."""
        return self.class_token + math.prod(grid)

    def outputs_of(self, grid: tuple[int, int]) -> int:
        """Rows of the tower's output."""
        return self.rows_of(grid)

    def rows_per_feature(self, projector: "ProjectorConfig") -> int:
        """Rows that the projector makes one of: n x n patches; where it takes means, of frames or all, at most."""
        return max(projector.downsample**2, 4 * (projector.halve_frames == "mean"))

    def num_features(self, grid: tuple[int, int], downsample: int) -> int:
        """Positions in the decoder of an image of so many lines and columns of patches."""
        lines, columns = grid
        return (lines // downsample) * (columns // downsample)


@config
class ProjectorConfig:
    type: Literal["linear", "mlp2x_gelu", "swiglu"] = "mlp2x_gelu"  # swiglu has no kernel: plain PyTorch
    downsample: Stack = 1  # vision: pixel shuffle of n x n patches; audio: n frames stacked; before the projection
    hidden_size: WidthOrDefault = 0  # 0: the decoder's width; linear has none
    bias: bool = True  # Voxtral has none
    mean: bool = False  # a feature is made of the mean of its tower rows, not of all of them side by side
    merge: bool = False  # a linear without bias first makes one row of a feature's rows side by side (Mistral 3)
    newline: bool = False  # vision: a learned row after each line of joined tiles, and after an image of one view
    halve_frames: Literal["none", "mean", "bilinear"] = "none"
    # vision: of a video, 2 x 2 rows are averaged (LLaVA-NeXT-Video), or its features are stretched to half as many a
    # side (LLaVA-OneVision)
    stretch_above_tiles: Positive | None = None
    # vision: joined tiles with more features than this number of tiles would have are stretched to about that many
    # (LLaVA-OneVision: 9)
    norm: Norm = "none"  # of each tower row, before they are put side by side
    feature_norm: Norm = "none"  # of the rows side by side (Ultravox)
    hidden_norm: Norm = "none"  # of what the last linear takes (Ultravox 0.5)
    output_norm: Norm = "none"  # of the feature (Ultravox before 0.5)
    add: bool = False  # audio: features are added to the embeddings of tokens, of which each has one (data.duplex)
    norm_eps: Epsilon = 1e-6
    output_std: Positive = 0.02  # approximate std of features when initialised; best that of the token embeddings
    resampler: ResamplerConfig | None = None  # what is projected is its queries, not the tower's rows

    def __post_init__(self) -> None:
        require(self.type != "linear" or self.hidden_norm == "none", "a linear projector has no hidden_norm")
        require(not (self.mean and self.merge), "give mean or merge, not both")
        if self.halve_frames == "mean":
            require(self.downsample == 1 and not self.merge, "halve_frames=mean needs downsample=1 and merge=false")

    @property
    def takes_mean(self) -> bool:
        return self.mean or self.halve_frames == "mean"

    def input_width(self, tower: VisionConfig | AudioConfig) -> int:
        """Numbers of a row that it takes."""
        return tower.width if self.resampler is None else self.resampler.width(tower.hidden_size)

    def outputs_of(self, num_rows: int) -> int:
        """Rows of an item that are projected, of so many that the tower makes."""
        return num_rows if self.resampler is None else self.resampler.outputs_of(num_rows)

    @property
    def stretches(self) -> bool:
        """Whether features may be weighted sums of projected rows."""
        return self.halve_frames == "bilinear" or self.stretch_above_tiles is not None

    @property
    def is_fused(self) -> bool:
        """Whether a kernel does all of it but the norm of rows: on GPUs, and with less to keep."""
        return self.type == "mlp2x_gelu" and self.feature_norm == self.hidden_norm == self.output_norm == "none"


@config
class VisionParts:
    """A vision tower and its projector, of a folder whose decoder is none of ours (BLIP-2)."""

    vision: VisionConfig
    vision_projector: ProjectorConfig

    @property
    def modules(self) -> list[str]:
        return ["vision", "vision_projector"]


@config
class LoraConfig:
    """Low-rank adapters (``avlm.models.lora``)."""

    rank: Width = 32
    alpha: Positive = 32.0  # adapters are scaled by alpha / rank
    targets: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: [f"decoder.*.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    )  # patterns of module paths; * matches anything
    dropout: ShareBelowOne = 0.0  # of the adapters' inputs
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # a magnitude for each output, trained apart from the direction
    base: Literal["fp32", "bf16"] = "fp32"  # dtype of adapted towers; bf16: half the memory, no stage trains them

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@config
class ModelConfig:
    decoder: DecoderConfig
    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    vision_projector: ProjectorConfig | None = None
    audio_projector: ProjectorConfig | None = None
    cross: CrossConfig | None = None  # media are read by layers of cross-attention, not written among the tokens
    text: TextConfig | None = None
    contrastive: ContrastiveConfig | None = None
    lora: LoraConfig | None = None
    codec: CodecConfig | None = None  # codes of speech, said next to the tokens of a duplex model

    def __post_init__(self) -> None:
        for tower in TOWERS.values():
            if (getattr(self, tower) is None) != (getattr(self, f"{tower}_projector") is None):
                raise ValueError(f"{tower} and {tower}_projector come together: give both or neither")
            if getattr(self, tower) is not None:
                _check_connector(self, tower)
        require((self.text is None) == (self.contrastive is None), "text and contrastive come together")
        for name, pool in self.pools.items():
            assert self.contrastive is not None
            tower = getattr(self, name)
            pool.check(name, tower.hidden_size, getattr(tower, "class_token", False), self.contrastive.size)
        if self.audio_projector:
            for key, default in {"newline": False, "halve_frames": "none", "stretch_above_tiles": None}.items():
                value = getattr(self.audio_projector, key)
                require(value == default, f"audio_projector.{key}={value} is for vision")
        if self.vision and self.vision_projector:
            projector = self.vision_projector
            require(not projector.add, "vision_projector.add=true is for audio")
            require(
                not self.vision.deepstack_layers
                or not (projector.takes_mean or projector.merge or projector.stretches),
                "vision.deepstack_layers go with a vision_projector without mean, merge, halve_frames and "
                "stretch_above_tiles",
            )
            side = self.vision.window if self.vision.any_grid else self.vision.patches_per_side
            require(
                side is None or side % self.vision_projector.downsample == 0,
                f"vision_projector.downsample={self.vision_projector.downsample} does not divide {side} patches a side"
                + (" of a window" if self.vision.any_grid else ""),
            )
            has_halves = not self.vision.any_grid and self.vision.patches_per_side % 2 == 0
            require(
                self.vision_projector.halve_frames != "mean" or has_halves,
                "vision_projector.halve_frames=mean needs a tower of squares of an even number of patches a side, not "
                f"{side}",
            )
            require(
                len(self.vision.deepstack_layers) <= self.decoder.num_layers,
                f"vision.deepstack_layers has more layers than decoder.num_layers={self.decoder.num_layers}",
            )

    def features_of(self, tower: str, size: Any) -> int:
        """Features of an item of a tower: what the decoder's layers read of it."""
        config, projector = getattr(self, tower), getattr(self, f"{tower}_projector")
        if projector.resampler is None:
            return config.num_features(size, projector.downsample)
        return math.ceil(projector.outputs_of(config.outputs_of(size)) / projector.downsample)

    def tokens_of(self, tower: str, size: Any) -> int:
        """Rows that an item takes among the tokens: its features, or one that stands for it."""
        return self.features_of(tower, size) if self.cross is None else 1

    @property
    def modules(self) -> list[str]:
        return [name for name in (*MODULES, *ALIGNMENT) if getattr(self, name) is not None]

    @property
    def modalities(self) -> dict[str, str]:
        """Modality -> tower, of those that the model has."""
        return {name: tower for name, tower in TOWERS.items() if getattr(self, tower) is not None}

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """Tower -> how its rows are compared with captions, of those whose media are."""
        if self.contrastive is None:
            return {}
        found = {name: getattr(self.contrastive, name) for name in self.modalities.values()}
        return {name: pool for name, pool in found.items() if pool is not None}


def _check_connector(model: ModelConfig, tower: str) -> None:
    """ValueError for a projector that does not go with its resampler, or with layers of cross-attention."""
    config, projector = getattr(model, tower), getattr(model, f"{tower}_projector")
    if projector.resampler is not None:
        projector.resampler.check(config.hidden_size)
        is_heard = tower == "audio" or projector.resampler.type != "conformer"
        require(is_heard, f"{tower}_projector.resampler.type=conformer is for audio, whose rows are a series")
    own = f"{tower}_projector"
    of_both = {
        f"{own}.newline": projector.newline,
        f"{own}.halve_frames": projector.halve_frames != "none",
        f"{own}.stretch_above_tiles": projector.stretch_above_tiles is not None,
        "vision.deepstack_layers": tower == "vision" and bool(config.deepstack_layers),
    }
    refused = {}
    if projector.resampler is not None:
        refused[f"{own}.resampler"] = {**of_both, f"{own}.downsample": tower == "vision" and projector.downsample > 1}
    if model.cross is not None:
        refused["cross"] = {
            **of_both,
            f"{own}.add": projector.add,
            "decoder.mrope_sections": model.decoder.mrope_sections is not None,
            "decoder.bidirectional": model.decoder.bidirectional != "none",
        }
    for key, others in refused.items():
        for name, is_given in others.items():
            require(not is_given, f"{key} does not go with {name}")
