"""The audio-vision language model: encode each modality, write it at its rows, decode, loss.

T tokens   D decoder width   R rows with a target   P rows of a tower, C wide (see ``avlm.models.batch``)
M features of media in a row of their own, for layers of cross-attention
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avlm.config.model import ModelConfig
from avlm.models.batch import PAD, Batch, Media
from avlm.models.contrastive import Contrastive, TextTower
from avlm.models.cross import CrossLayers
from avlm.models.decoder import Decoder, DeepFeatures
from avlm.models.depth import Codec
from avlm.models.lora import apply_lora
from avlm.models.projector import Projector
from avlm.models.vit import VisionTower
from avlm.models.whisper import AudioTower


class Modality(NamedTuple):
    name: str  # the field of ``Batch``
    tower: nn.Module
    projector: Projector


class AVLM(nn.Module):
    """Any of the towers may be absent. A batch without images or clips holds zero of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.cross = CrossLayers(config.cross, config.decoder) if config.cross else None
        self.vision = VisionTower(config.vision) if config.vision else None
        self.audio = AudioTower(config.audio) if config.audio else None
        for name in config.modalities.values():
            tower, projector = getattr(config, name), getattr(config, f"{name}_projector")
            num_deep = tower.width // tower.hidden_size - 1
            gathered = tower.rows_per_feature(projector)
            sizes = tower.hidden_size, gathered, config.decoder.hidden_size
            built = Projector(projector, *sizes, num_deep, has_newline=config.cross is not None)
            self.add_module(f"{name}_projector", built)
        self.text = TextTower(config.text) if config.text else None
        self.contrastive = Contrastive(config) if config.contrastive else None
        self.codec = Codec(config.codec, config.decoder.hidden_size) if config.codec else None
        if config.lora:
            apply_lora(self, config.lora)

    @property
    def modalities(self) -> list[Modality]:
        found = []
        for name, tower in self.config.modalities.items():
            found.append(Modality(name, getattr(self, tower), getattr(self, f"{tower}_projector")))
        return found

    def forward(self, batch: Batch, caches: list | None = None, predict: bool = False) -> Tensor | tuple[Tensor, ...]:
        """The loss summed over target rows, and the loss of each of them without a graph: float32 () and (R,).

        ``predict``, for validation, adds the likeliest token of each, int64 (R,). With ``caches`` it
        returns the logits of the target rows instead, float32 (R, V).

        Of a row of a contrastive stage it is the loss of pairs (``avlm.models.contrastive``).
        """
        if batch.pairs is not None and self.text and self.contrastive:
            return self.contrastive(batch, run(self.text, batch), self.tower_features(batch), predict)
        with_media = caches is None or caches[0].is_prompt  # after the prompt no rank has any
        x_TD = self.hidden(batch, caches, with_media)
        hidden_RD = self.decoder.norm(x_TD[batch.target_rows_R])
        target_R = batch.target_R if caches is None else None
        losses = self.decoder.head(hidden_RD, target_R, predict, batch.factor_R)
        return losses if self.codec is None or caches is not None else self.codec.added_to(losses, hidden_RD, batch)

    def hidden(self, batch: Batch, caches: list | None = None, with_media: bool = True) -> Tensor:
        """What the decoder makes of a row, before its final norm, (T, D)."""
        x_TD, deep, features_MD = self.embed(batch, with_media)
        before = None
        if self.cross is not None:
            of_blocks = caches[len(self.decoder.blocks) :] if caches else None
            before = partial(self.cross, features_MD=features_MD, row=batch.media_row, caches=of_blocks)
        real_T = batch.token_T != PAD if self.config.decoder.experts else None
        return self.decoder(x_TD, batch.position_T, batch.segments, caches, batch.windowed, deep, real_T, before)

    def embed(self, batch: Batch, with_media: bool = True) -> tuple[Tensor, DeepFeatures | None, Tensor | None]:
        """Token features with every media feature at its row, (T, D); what is to be added to the decoder's first
        layers, if the model has DeepStack; and with cross-attention the features of media, (M, D), which then do not
        stand among the tokens. ``with_media`` must be the same on all ranks."""
        x_TD = self.decoder.embedding(batch.token_T)
        num_tokens, row = len(x_TD), batch.media_row if with_media else None
        if row is not None:
            x_TD = torch.cat([x_TD, x_TD.new_zeros(row.num_own, x_TD.shape[1])])
        found = features_MD = None
        for name, tower, projector in self.modalities if with_media else ():
            media = batch.media[name]
            features_PC = run(tower, media)
            if projector.resampler is not None:
                features_PC = projector.resampler(media, features_PC)
            x_TD, deep = projector(x_TD, media, features_PC)
            if deep:
                found = DeepFeatures(media.rows, deep)
        if self.codec is not None and batch.codes is not None:
            of_codes_FD = self.codec.embedded(batch.codes.before_FK).sum(1)
            x_TD = x_TD.index_add(0, batch.codes.rows, of_codes_FD.to(x_TD.dtype))
        if row is not None and self.cross is not None:
            x_TD, own_MD = x_TD.split([num_tokens, row.num_own])
            features_MD = self.cross.features(own_MD, row)
        return x_TD, found, features_MD

    def tower_features(self, batch: Batch) -> dict[str, Tensor]:
        """The rows of each tower whose media are compared with captions, without those of inner layers (DeepStack)."""
        towers = {name: tower for name, tower in self.config.modalities.items() if tower in self.config.pools}
        return {
            tower: run(getattr(self, tower), batch.media[name])[:, : getattr(self.config, tower).hidden_size]
            for name, tower in towers.items()
        }


def run(tower: nn.Module, given: Media | Batch) -> Tensor:
    """Features of a tower. A frozen one runs without a graph."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower)):
        return tower(given)


def trains(module: nn.Module) -> bool:
    """Whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
