"""The audio-vision language model: encode each modality, write it at its rows, decode, loss.

T tokens   D decoder width   R rows with a target   I images   K audio rows (see ``avlm.models.batch.Batch``)
"""

import zlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from avlm.config.model import ModelConfig
from avlm.models.batch import Batch
from avlm.models.decoder import Decoder, decoder_start
from avlm.models.log_mel import at_tower
from avlm.models.lora import apply_lora, start_magnitudes
from avlm.models.projector import Projector, projector_start
from avlm.models.vit import VisionTower, vision_start
from avlm.models.whisper import AudioTower, audio_start


class AVLM(nn.Module):
    """Any of the towers may be absent; a batch without images or clips holds zero rows of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.decoder.hidden_size
        self.decoder = Decoder(config.decoder)
        self.vision = VisionTower(config.vision) if config.vision else None
        self.audio = AudioTower(config.audio) if config.audio else None
        if config.vision:
            gathered = config.vision_projector.downsample**2
            self.vision_projector = Projector(config.vision_projector, config.vision.hidden_size, gathered, width)
        if config.audio:
            gathered = config.audio_projector.downsample
            self.audio_projector = Projector(config.audio_projector, config.audio.hidden_size, gathered, width)
        if config.lora:
            apply_lora(self, config.lora)

    def forward(self, batch: Batch, caches: list | None = None, predict: bool = False) -> Tensor | tuple[Tensor, ...]:
        """The loss summed over target rows, and that of every row without a graph: float32 () and (R,). ``predict``,
        for validation, adds the likeliest token of every row, int64 (R,). With ``caches`` the logits of the target
        rows, float32 (R, V)."""
        with_media = caches is None or caches[0].is_prompt  # after the prompt no rank has any
        x_TD = self.decoder(self.embed(batch, with_media), batch.position_T, batch.segments, caches)
        hidden_RD = self.decoder.norm(x_TD[batch.target_rows_R])
        return self.decoder.head(hidden_RD, batch.target_R if caches is None else None, predict)

    def embed(self, batch: Batch, with_media: bool = True) -> Tensor:
        """Token features with every media feature at its row, (T, D). ``with_media`` must be the same on all ranks."""
        x_TD = self.decoder.embedding(batch.token_T)
        if with_media and self.vision is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.vision)):
                features = self.vision(batch.pixels, batch.image_segments)
            x_TD = self.vision_projector(x_TD, batch.image_rows_F, features, batch.patch_rows_F)
        if with_media and self.audio is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.audio)):
                mel_CMW = at_tower(batch.mel, self.config.audio)
                features = self.audio(mel_CMW, batch.mel_rows_K, batch.audio_segments)
            x_TD = self.audio_projector(x_TD, batch.audio_rows_G, features, batch.frame_rows_G)
        return x_TD


def trains(module: nn.Module) -> bool:
    """Whether any parameter of the module is trained; a tower that is not runs without a graph."""
    return any(parameter.requires_grad for parameter in module.parameters())


def initial_values(model: AVLM, seed: int, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The random start, parameter by parameter: (name, whole float32 tensor on the CPU); none for names in ``skip``.

    Every parameter has a generator of its own, seeded by its name: however a model is sharded, it starts alike.
    """
    parts = {"decoder": decoder_start(model.decoder)}
    if model.vision is not None:
        parts |= {"vision": vision_start(model.vision), "vision_projector": projector_start(model.vision_projector)}
    if model.audio is not None:
        parts |= {"audio": audio_start(model.audio), "audio_projector": projector_start(model.audio_projector)}
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        part, _, inner = name.partition(".")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it takes 32 bits
        mean, std = parts[part][inner]
        yield name, torch.empty(parameter.shape).normal_(mean, std, generator=generator)


@torch.no_grad()
def init(model: AVLM, seed: int = 0) -> None:
    """Random start of every part of an unsharded model."""
    for name, value in initial_values(model, seed):
        model.get_parameter(name).copy_(value)
    start_magnitudes(model)
