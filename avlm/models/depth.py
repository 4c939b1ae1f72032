"""Codes of speech: the codes of the row before are added to the input of a row, and a depth decoder says its own, one
after the other, from what the decoder makes of the row.

    x_0 = into(hidden)      x_k = into(embedding_k-1(code_k-1))      code_k ~ softmax(head_k(norm(blocks(x)_k)))

It is that of CSM (transformers' CsmDepthDecoderForCausalLM, whose table of codes is the backbone's as well), but says
the first code too, which CSM leaves to its backbone: here that says a token of text. The weights of the two losses are
those of NeMo's DuplexS2SModel.

F rows with codes   K codes of a row   V values of a code, and the one before the first row   D decoder width
C width of the depth decoder
"""

import math

import torch
from torch import Tensor, nn

from avlm.config.codec import CodecConfig
from avlm.models.batch import Batch
from avlm.models.decoder import Block, RMSNorm
from avlm.models.rope import decoder_rope
from kernels.cross_entropy import linear_cross_entropy
from kernels.segments import Segments


class Codec(nn.Module):
    def __init__(self, config: CodecConfig, decoder_size: int):
        super().__init__()
        self.config = config
        K, V, C = config.num_codebooks, config.depth.vocab_size, config.hidden_size
        self.embedding = nn.Embedding(K * V, decoder_size)
        self.into = nn.Linear(decoder_size, C, bias=False)
        self.blocks = nn.ModuleList(Block(config.depth, i) for i in range(config.num_layers))
        self.norm = RMSNorm(C, config.norm_eps)
        self.heads = nn.ModuleList(nn.Linear(C, V, bias=False) for _ in range(K))

    def embedded(self, code_FK: Tensor) -> Tensor:
        """(F, K, D), of the first codes of rows. Each codebook has V rows of the table."""
        first_K = torch.arange(code_FK.shape[1], device=code_FK.device) * self.config.depth.vocab_size
        return self.embedding(code_FK + first_K)

    def forward(self, hidden_FD: Tensor, code_FK: Tensor) -> Tensor:
        """What the heads of the first K codes take, (F, K, C): that of a code sees the codes before it. ``code`` may
        lack the last one of each row, or more."""
        F, K = len(code_FK), code_FK.shape[1] + 1
        x_FKD = torch.cat([hidden_FD[:, None], self.embedded(code_FK)], dim=1)
        x = self.into(x_FKD.flatten(0, 1))
        starts = torch.arange(F + 1, device=x.device, dtype=torch.int32) * K
        segments = Segments(starts, K)
        rope = decoder_rope(self.config.depth, torch.arange(K, device=x.device).repeat(F))
        for block in self.blocks:
            x = block(x, rope, segments)
        return self.norm(x).unflatten(0, (F, K))

    def losses(self, hidden_FD: Tensor, code_FK: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over rows of the mean loss of their codes, and that of each row without a graph: float32 () and
        (F,)."""
        x_FKC = self(hidden_FD, code_FK[:, :-1])
        found = []
        for x_FC, code_F, head in zip(x_FKC.unbind(1), code_FK.unbind(1), self.heads):
            found.append(linear_cross_entropy(x_FC.contiguous(), head.get_parameter("weight"), code_F))
        loss_K, loss_FK = (torch.stack(each, dim=-1) for each in zip(*found))
        return loss_K.mean(), loss_FK.mean(1)

    def added_to(self, losses: tuple[Tensor, ...], hidden_RD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The losses of tokens, and of codes where there are any, with their weights."""
        loss, loss_R, *predicted = losses
        assert batch.codes is not None
        text, audio = self.config.text_weight, self.config.audio_weight
        place_F = torch.searchsorted(batch.target_rows_R, batch.codes.rows)  # each row with codes has a target
        of_codes, loss_F = self.losses(hidden_RD[place_F], batch.codes.code_FK)
        loss_R = (text * loss_R).index_add(0, place_F, audio * loss_F)
        return text * loss + audio * of_codes, loss_R, *predicted

    @torch.no_grad()
    def likeliest(self, hidden_FD: Tensor) -> Tensor:
        """The codes of rows, each the likeliest after those before it, int64 (F, K)."""
        code_FK = torch.empty(len(hidden_FD), 0, dtype=torch.int64, device=hidden_FD.device)
        for head in self.heads:
            x_FC = self(hidden_FD, code_FK)[:, -1]
            code_F = head(x_FC)[:, : self.config.codebook_size].argmax(-1)
            code_FK = torch.cat([code_FK, code_F[:, None]], dim=1)
        return code_FK

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: as in the decoder. Together the codes of a row
        weigh as much as a token."""
        stats = {}
        for name, parameter in self.named_parameters():
            std = parameter.shape[-1] ** -0.5
            if name.endswith("norm.weight"):
                stats[name] = (1.0, 0.0)
                continue
            if name == "embedding.weight":
                std = 0.02 / math.sqrt(self.config.num_codebooks)
            elif name.endswith(("attention.o.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            stats[name] = (0.0, std)
        return stats
