"""AVLM for transformers: the class that is imported below sees. What it lacks stands here: Whisper's encoder over
windows of any length, projectors that no class has, and the place where audio enters.

N windows, or images   M mel bins   F frames of 10 ms   R rows of a tower, C wide   U features, of S rows each
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig as BaseConfig
from transformers import LlavaForConditionalGeneration as BaseForConditionalGeneration
from transformers import LlavaModel as BaseModel
from transformers import VoxtralEncoder, VoxtralEncoderConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

NORMS = {"none": nn.Identity, "layer": nn.LayerNorm, "rms": nn.RMSNorm}
SEES_VIDEOS = hasattr(BaseModel, "get_video_features")  # else their frames are images
SEEN = {"pixel_values": "image_token_id", "pixel_values_videos": "video_token_id" if SEES_VIDEOS else "frames_token_id"}
REPEATS_MEDIA = "_expand_inputs_for_generation" in vars(BaseForConditionalGeneration)


class AVLMConfig(BaseConfig):
    """``audio_config``: of Whisper's encoder, with edge, pool and key_bias; projectors: the keys of ``Projector``."""

    model_type = "avlm"
    sub_configs = {**BaseConfig.sub_configs, "audio_config": VoxtralEncoderConfig}

    audio_config: dict | VoxtralEncoderConfig | None = None
    audio_token_id: int | None = None
    audio_projector: dict | None = None
    frames_token_id: int | None = None  # of videos that the base does not know
    vision_projector: dict | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.audio_config, dict):
            self.audio_config = VoxtralEncoderConfig(**self.audio_config)
        super().__post_init__(**kwargs)


class AudioTower(VoxtralEncoder):
    def __init__(self, config: VoxtralEncoderConfig):
        super().__init__(config)
        del self.embed_positions  # computed in float32 instead
        for layer in self.layers if config.key_bias else ():
            layer.self_attn.k_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, windows_NMF: Tensor, live_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, R, C) and which of them there are, bool (N, R): one for two ``live`` frames, which come first."""
        x_NCF = F.gelu(self.conv1(windows_NMF.to(self.conv1.weight.dtype)))
        if self.config.edge == "masked":
            x_NCF = x_NCF * live_NF[:, None]
        rows_N1 = (live_NF.sum(1, keepdim=True) + 1) // 2
        x_NRC = F.gelu(self.conv2(x_NCF)).transpose(1, 2)[:, : int(rows_N1.max())]
        row_R, half = torch.arange(x_NRC.shape[1], device=x_NRC.device), x_NRC.shape[2] // 2
        angle = row_R[:, None] * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=x_NRC.device))
        x_NRC = x_NRC + torch.cat([angle.sin(), angle.cos()], dim=1).to(x_NRC.dtype)
        mask = create_bidirectional_mask(self.config, x_NRC, (row_R < rows_N1).long())
        for layer in self.layers:
            x_NRC = layer(x_NRC, mask)
        x_NRC = F.avg_pool1d(x_NRC.mT, self.config.pool, ceil_mode=True).mT
        return self.layer_norm(x_NRC), row_R[: x_NRC.shape[1]] < rows_N1 // self.config.pool


class Projector(nn.Module):
    """Tower rows -> features: n x n patches of a square image make one, or n rows of audio that follow each other."""

    def __init__(self, size: int, decoder_size: int, keys: dict, dimensions: int = 1):
        super().__init__()
        self.keys, eps, bias = keys, keys["norm_eps"], keys["bias"]
        gathered, hidden_size = keys["downsample"] ** dimensions, keys["hidden_size"] or decoder_size
        self.post_norm = nn.LayerNorm(size, keys["post_norm"]) if keys.get("post_norm") else nn.Identity()
        self.norm = NORMS[keys["norm"]](size, eps)
        self.merger = nn.Linear(size * gathered, size, bias=False) if keys["merge"] else nn.Identity()
        wide = size if keys["mean"] or keys["merge"] else size * gathered
        self.feature_norm = NORMS[keys["feature_norm"]](wide, eps)
        if keys["type"] == "linear":
            self.linear = nn.Linear(wide, decoder_size, bias=bias)
        else:
            self.gate = nn.Linear(wide, hidden_size, bias=bias) if keys["type"] == "swiglu" else None
            self.up = nn.Linear(wide, hidden_size, bias=bias)
            self.hidden_norm = NORMS[keys["hidden_norm"]](hidden_size, eps)
            self.down = nn.Linear(hidden_size, decoder_size, bias=bias)
        self.output_norm = NORMS[keys["output_norm"]](decoder_size, eps)

    def forward(self, x_NRC: Tensor, there_NR: Tensor | None = None) -> Tensor:
        """Features of images (N, U, D), or of all rows of audio that are there, one after the other, (K, D)."""
        n = self.keys["downsample"]
        x_NRC = self.norm(self.post_norm(x_NRC))
        if there_NR is None:
            side = math.isqrt(x_NRC.shape[1]) // n
            x_NUSC = x_NRC.unflatten(1, (side, n, side, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            there_NUS = torch.ones_like(x_NUSC[..., 0])
        else:
            missing = -x_NRC.shape[1] % n
            there_NUS = F.pad(there_NR, (0, missing)).unflatten(1, (-1, n)).to(x_NRC.dtype)
            x_NUSC = F.pad(x_NRC, (0, 0, 0, missing)).unflatten(1, (-1, n)) * there_NUS[..., None]
        mean_NUC = x_NUSC.sum(2) / there_NUS.sum(2, keepdim=True).clamp(min=1)
        x_NUC = mean_NUC if self.keys["mean"] else self.merger(x_NUSC.flatten(2))
        x_NUC = self.feature_norm(x_NUC)
        if self.keys["type"] == "linear":
            y_NUD = self.linear(x_NUC)
        else:
            hidden = F.gelu(self.up(x_NUC)) if self.gate is None else F.silu(self.gate(x_NUC)) * self.up(x_NUC)
            y_NUD = self.down(self.hidden_norm(hidden))
        return self.output_norm(y_NUD if there_NR is None else y_NUD[there_NUS.any(2)])


class AVLMModel(BaseModel):
    config_class = AVLMConfig

    def __init__(self, config: AVLMConfig):
        super().__init__(config)
        text, sees = config.get_text_config(), getattr(config, "vision_config", None)
        if text._attn_implementation == "vllm" and getattr(sees, "deepstack_visual_indexes", None):
            raise ValueError("vLLM does not add the features of inner layers (DeepStack): serve this model otherwise")
        if keys := config.vision_projector:
            self.multi_modal_projector = Projector(sees.hidden_size, text.hidden_size, keys, dimensions=2)
        if keys := config.audio_projector:
            self.audio_tower = AudioTower(config.audio_config)
            self.audio_projector = Projector(config.audio_config.hidden_size, text.hidden_size, keys)
        if sees is None:
            self.multi_modal_projector = None  # of a base that hears
        self.post_init()

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **kwargs):
        """Features of all clips, one after the other, as ``pooler_output`` (K, D). A row of ``input_features``, (clips,
        M, F), holds a clip's windows side by side; the mask (clips, F), of vLLM a list, is 1 at frames to hear."""
        whole = min(2 * self.config.audio_config.max_source_positions, input_features.shape[2])
        missing = -input_features.shape[2] % whole
        windows = F.pad(input_features, (0, missing)).unflatten(2, (-1, whole)).transpose(1, 2).flatten(0, 1)
        live = F.pad(torch.stack([*input_features_mask]).bool(), (0, missing)).unflatten(1, (-1, whole)).flatten(0, 1)
        rows, there = self.audio_tower(windows[live.any(1)], live[live.any(1)])
        return BaseModelOutputWithPooling(pooler_output=self.audio_projector(rows, there))

    if not SEES_VIDEOS:  # else generate reads the names of the base's arguments

        def get_video_features(self, pixel_values_videos: Tensor, **kwargs):
            """Features of each video, ``pooler_output``, of frames (videos, frames, 3, height, width)."""
            found = self.get_image_features(pixel_values_videos.flatten(0, 1), return_dict=True).pooler_output
            return BaseModelOutputWithPooling(pooler_output=[*torch.cat([*found]).chunk(len(pixel_values_videos))])

    def get_rope_index(self, input_ids: Tensor, mm_token_type_ids: Tensor, **kwargs):
        """M-RoPE, of bases that have it: audio, type 3, has the positions of text."""
        return super().get_rope_index(input_ids, mm_token_type_ids=mm_token_type_ids % 3, **kwargs)

    def forward(self, input_ids: Tensor | None = None, input_features=None, input_features_mask=None, **kwargs):
        """As the base's, with what ``get_audio_features`` takes, and videos."""
        features, config = {}, self.config
        if input_features is not None:
            features[config.audio_token_id] = self.get_audio_features(input_features, input_features_mask).pooler_output
        if not SEES_VIDEOS and (frames := kwargs.pop("pixel_values_videos", None)) is not None:
            features[config.frames_token_id] = torch.cat(self.get_video_features(frames).pooler_output)
        for token, values in features.items():
            places = 0 if input_ids is None else int((input_ids == token).sum())
            if places != len(values):
                raise ValueError(f"{places} tokens {token} in the prompt, but {len(values)} features")

        def write(module: nn.Module, arguments: tuple, embedded: Tensor) -> Tensor:
            for token, values in features.items():
                embedded = embedded.masked_scatter((input_ids == token)[..., None], values.to(embedded))
            return embedded

        # The base embeds the tokens and writes its images over them; what it does not know is written in between.
        with self.get_input_embeddings().register_forward_hook(write) if features else nullcontext():
            return super().forward(input_ids=input_ids, **kwargs)


class AVLMForConditionalGeneration(BaseForConditionalGeneration):
    config_class = AVLMConfig

    def __init__(self, config: AVLMConfig):
        super().__init__(config)
        self.model = AVLMModel(config)
        self.post_init()

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        media = {"input_features": "audio_token_id", **({} if REPEATS_MEDIA else SEEN)}
        for name in media if expand_size > 1 else ():
            values, token = kwargs.get(name), getattr(self.config, media[name], None)
            if values is not None and (len(values) != len(input_ids) or not (input_ids == token).any(1).all()):
                raise ValueError("beams and several sequences take one medium of a kind, and one tile, in each prompt")
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def prepare_inputs_for_generation(
        self, *args, input_features=None, input_features_mask=None, pixel_values_videos=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):  # else the cache holds all media
            inputs |= {"input_features": input_features, "input_features_mask": input_features_mask}
            inputs |= {} if pixel_values_videos is None else {"pixel_values_videos": pixel_values_videos}
        return inputs
