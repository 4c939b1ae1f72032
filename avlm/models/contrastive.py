"""Contrastive alignment: embeddings of media and of captions are compared. CLIP (Radford et al. 2021, section 2.3),
SigLIP (Zhai et al. 2023, algorithm 1) and, of audio, CLAP (Elizalde et al. 2022).

    x_m = unit(head(rows of medium m))     y_n = unit(W row of the last token of caption n)     l_mn = s x_m . y_n + b
    softmax   loss_n = -(ln softmax_k(l_nk)[n] + ln softmax_k(l_kn)[n]) / 2
    sigmoid   loss_n = -sum over k of ln sigmoid(+l_kn if k = n, else -l_kn)

unit(x) = x / |x|, s = exp(logit_scale), and b is 0 for softmax. m, n and k are pairs of a step, of all ranks: each rank
computes the losses of its own against all.

T tokens of all captions   P rows of a tower   K of them that are pooled   M media of a modality   N own pairs
A pairs of all ranks   D width   H heads   E head dim   C size of an embedding
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.contrastive import ContrastiveConfig, PoolConfig, TextConfig
from avlm.config.model import AudioConfig, ModelConfig, VisionConfig
from avlm.models.batch import Batch, Pooled
from avlm.models.encoder import ACTIVATIONS, EncoderBlock, encoder_init_stats


class TextTower(nn.Module):
    """Learned positions, pre-norm blocks, a norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.position = nn.Parameter(torch.empty(config.max_position, D))
        options = {"activation": config.activation, "norm_eps": config.norm_eps, "causal": config.causal}
        self.blocks = nn.ModuleList(EncoderBlock(config, **options) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(D, config.norm_eps)

    def forward(self, captions: Batch) -> Tensor:
        """Features of the last token of each caption, (N, D) in the weights' dtype."""
        x_TD = self.embedding(captions.token_T) + self.position[captions.position_T]
        for block in self.blocks:
            x_TD = block(x_TD, captions.segments)
        return self.norm(x_TD[captions.target_rows_R])

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn; of embeddings and positions CLIP's."""
        stats = encoder_init_stats(self, self.config.num_layers)
        return stats | {"embedding.weight": (0.0, 0.02), "position": (0.0, 0.01)}


class MediumHead(nn.Module):
    """Rows of a tower -> embeddings of media, not yet of length 1."""

    def __init__(self, config: PoolConfig, tower: VisionConfig | AudioConfig, size: int):
        super().__init__()
        self.config = config
        D = tower.hidden_size
        self.pool = AttentionPool(tower) if config.pool == "attention" else None
        self.projection = nn.Linear(D, size, bias=False) if config.projection == "linear" else nn.Identity()

    def forward(self, features_PD: Tensor, pooled: Pooled) -> Tensor:
        """(M, C)"""
        x_KD = features_PD[pooled.rows]
        x_MD = mean_by(x_KD, pooled) if self.pool is None else self.pool(x_KD, pooled)
        return self.projection(x_MD)


class AttentionPool(nn.Module):
    """A learned query attends to the rows of each medium; then y + mlp(norm(y)), of which y is the result."""

    def __init__(self, tower: VisionConfig | AudioConfig):
        super().__init__()
        is_vision = isinstance(tower, VisionConfig)
        D, F_ = tower.hidden_size, tower.intermediate_size
        self.num_heads = tower.num_heads
        self.probe = nn.Parameter(torch.empty(D))
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.norm = nn.LayerNorm(D, tower.norm_eps if is_vision else 1e-5)
        self.up, self.down = nn.Linear(D, F_), nn.Linear(F_, D)
        self.activation = ACTIVATIONS[tower.activation if is_vision else "gelu"]

    def forward(self, x_KD: Tensor, pooled: Pooled) -> Tensor:
        heads = (self.num_heads, -1)
        q_HE = self.q(self.probe[None]).unflatten(-1, heads)[0]
        k_KHE, v_KHE = self.k(x_KD).unflatten(-1, heads), self.v(x_KD).unflatten(-1, heads)
        score_KH = (k_KHE * q_HE).sum(-1, dtype=torch.float32) / math.sqrt(q_HE.shape[-1])
        owner_KH = pooled.owner[:, None].expand_as(score_KH)
        most_MH = score_KH.new_zeros(len(pooled.pairs), self.num_heads)
        most_MH = most_MH.scatter_reduce(0, owner_KH, score_KH.detach(), "amax", include_self=False)
        weight_KH = (score_KH - most_MH[pooled.owner]).exp()
        sum_MH = torch.zeros_like(most_MH).index_add(0, pooled.owner, weight_KH)
        weighted_KHE = weight_KH[..., None] * v_KHE
        out_MHE = weighted_KHE.new_zeros(*most_MH.shape, q_HE.shape[-1]).index_add(0, pooled.owner, weighted_KHE)
        y_MD = self.o((out_MHE / sum_MH[..., None]).flatten(1).to(x_KD.dtype))
        return y_MD + self.down(self.activation(self.up(self.norm(y_MD))))


class TextHead(nn.Module):
    """Features of captions -> embeddings, not yet of length 1."""

    def __init__(self, width: int, config: ContrastiveConfig):
        super().__init__()
        self.projection = nn.Linear(width, config.size, bias=config.text_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.projection(x_ND)


class OfAllRanks(nn.Module):
    """Rows of all ranks, (A, ...), and where the own ones begin. There is one rank, unless parallelism replaces it."""

    def forward(self, own_N: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, int]:
        return own_N, 0


class Contrastive(nn.Module):
    """A head for each tower whose media are aligned, one for captions, and what compares embeddings, in float32."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        assert model.contrastive is not None and model.text is not None
        self.config = model.contrastive
        for name, pool in model.pools.items():
            self.add_module(name, MediumHead(pool, getattr(model, name), self.config.size))
        self.text = TextHead(model.text.hidden_size, self.config)
        self.logit_scale = nn.Parameter(torch.empty(1))  # a vector: FSDP shards no scalar
        self.logit_bias = nn.Parameter(torch.empty(1)) if self.config.loss == "sigmoid" else None
        self.gather = OfAllRanks()

    @property
    def heads(self) -> list[nn.Module]:
        return [module for module in self.children() if isinstance(module, MediumHead | TextHead)]

    def forward(
        self, batch: Batch, text_ND: Tensor, features: dict[str, Tensor], predict: bool = False
    ) -> tuple[Tensor, ...]:
        """The loss summed over pairs, and that of each of them without a graph: float32 () and (N,). ``features``: rows
        of each tower. ``predict`` gives embeddings of media and of captions, float32 (N, C), s and b instead."""
        assert batch.pairs is not None
        text_NC = unit(self.text(text_ND))
        media_NC = torch.zeros_like(text_NC)
        for name, features_PD in features.items():
            pooled = batch.pairs.media[name]
            embedding_MC = unit(getattr(self, name)(features_PD, pooled))
            media_NC = media_NC.index_copy(0, pooled.pairs, embedding_MC)
        scale = self.logit_scale.float().exp()
        bias = torch.zeros_like(scale) if self.logit_bias is None else self.logit_bias.float()
        if predict:
            return media_NC, text_NC, scale, bias
        loss_N = self.losses(media_NC, text_NC, scale, bias, batch.pairs.counts)
        return loss_N.sum(), loss_N.detach()

    def losses(self, media_NC: Tensor, text_NC: Tensor, scale: Tensor, bias: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(N,)"""
        if self.config.loss == "sigmoid":
            media_AC, first = self.gather(media_NC, counts)
            return sigmoid_losses(text_NC @ media_AC.T * scale + bias, first)
        both_AC, first = self.gather(torch.cat([media_NC, text_NC], 1), counts)
        media_AC, text_AC = both_AC.chunk(2, 1)
        return softmax_losses(media_NC @ text_AC.T * scale, text_NC @ media_AC.T * scale, first)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: as in towers, and a query of std 0.02."""
        stats = encoder_init_stats(self, 1)
        for name, _ in self.named_parameters():
            if name.endswith("probe"):
                stats[name] = (0.0, 0.02)
        stats["logit_scale"] = (math.log(self.config.initial_scale), 0.0)
        stats["logit_bias"] = (self.config.initial_bias, 0.0)
        return stats


def softmax_losses(of_media_NA: Tensor, of_text_NA: Tensor, first: int) -> Tensor:
    """(N,): of own media against the captions of all ranks, among which their own begin at ``first``, and of own
    captions against all media."""
    own_N = first + torch.arange(len(of_media_NA), device=of_media_NA.device)
    losses = [F.cross_entropy(logit_NA, own_N, reduction="none") for logit_NA in (of_media_NA, of_text_NA)]
    return (losses[0] + losses[1]) / 2


def sigmoid_losses(logit_NA: Tensor, first: int) -> Tensor:
    """(N,): of own captions against the media of all ranks, among which their own begin at ``first``."""
    own_N = torch.arange(len(logit_NA), device=logit_NA.device)
    sign_NA = -torch.ones_like(logit_NA)
    sign_NA[own_N, first + own_N] = 1.0
    return -F.logsigmoid(sign_NA * logit_NA).sum(1)


def mean_by(x_KD: Tensor, pooled: Pooled) -> Tensor:
    """The mean of the rows of each medium, (M, D)."""
    sum_MD = x_KD.new_zeros(len(pooled.pairs), x_KD.shape[1], dtype=torch.float32).index_add(
        0, pooled.owner, x_KD.float()
    )
    return (sum_MD / pooled.counts[:, None]).to(x_KD.dtype)


def unit(x_NC: Tensor) -> Tensor:
    """Of length 1, in float32."""
    return F.normalize(x_NC.float(), dim=-1)
