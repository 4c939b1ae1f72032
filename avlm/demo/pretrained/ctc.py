"""Initialise the audio projector by connectionist temporal classification (Graves et al. 2006) against the decoder's
token embeddings, before anything is trained through the decoder.

    python -m avlm.demo.pretrained.ctc configs/demo_pretrained.yaml --train speech_train.jsonl \\
        --data test=speech_test.jsonl --out P.pt

Trained by the next token, a random projector must learn what a clip says through a frozen decoder that cannot read it
yet, which takes longer than the minutes of a demo. Here each feature f of a clip is classified directly, p(token) ~
exp(f . embedding) and p(blank) ~ exp(BLANK), and the answer's tokens must come in their order with any blanks between
them. So features learn to be the embeddings of what is said. The frozen encoder runs once over all clips, and its
features are kept in memory. One process, on the CPU.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.scores import scorer, total
from avlm.evaluation.sets import find_sets
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, Features, media_of
from avlm.process.exit import run_command
from avlm.weights.load import init_weights
from avlm.weights.model_from import open_config
from avlm.weights.sources import FILES

# Overrides that leave the config's decoder and audio tower: no adapters, and none of its stages.
ONLY_AUDIO = [f"model.{part}=null" for part in ("lora", "vision", "vision_projector")]
ONLY_AUDIO += [f"init_from.{part}=null" for part in ("all", "adapter", "vision")]
ONLY_AUDIO += ["optimizer={lr: 0.0}", "stages=[{name: ctc, steps: 1, freeze_language_model: true}]"]
BLANK = 3.0  # logit of the CTC blank: a feature must match a token better than this
EPOCHS = 3  # rows are drawn with replacement, EPOCHS * len(rows) in all
LEARNING_RATE, WARMUP = 2e-3, 50  # steps; then a linear decay to 0
OTHERS = 1000  # random tokens that a row's own tokens compete with
ROW = 2048  # tokens of a row: some 30 clips


@dataclass(frozen=True)
class Row:
    """What the loss needs of a packed row. K encoder rows, G features, N clips."""

    x_KC: Tensor  # of the encoder
    features: Features  # encoder rows that make each feature
    features_N: list[int]  # of each clip
    answers_N: list[Tensor]  # tokens, without control tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/, with an audio tower and where its weights come from")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--train", required=True, help="clips and what they say, a source as of data.train")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=SOURCE", help="held-out clips")
    parser.add_argument("--out", type=Path, required=True, help="file to write, for init_from.all")
    arguments = parser.parse_args()
    align(arguments.config, arguments.overrides, arguments.train, find_sets(arguments.data), arguments.out)


def align(config: str, overrides: list[str], source: str, held_out: dict[str, str], out: Path) -> None:
    """Train, write the projector's weights, and print the word error rate of features read as tokens. ValueError for a
    config that does not say which decoder and audio tower are to be joined, and for samples that are no clips."""
    if out.suffix not in FILES:
        raise ValueError(f"--out {out}: init_from reads files that end in {', '.join(FILES)}")
    cfg = open_config(config, [*ONLY_AUDIO, *overrides])
    if cfg.model.audio is None or cfg.init_from.decoder is None or cfg.init_from.audio is None:
        raise ValueError(f"{config}: model.audio, init_from.decoder and init_from.audio say what is to be joined")
    torch.manual_seed(cfg.seed)
    model = AVLM(cfg.model)
    for report in init_weights(model, cfg.init_from, cfg.seed):
        print(report, flush=True)
    model.requires_grad_(False)
    rows = list(read(model, source, cfg))
    if not any(len(answer) for row in rows for answer in row.answers_N):
        raise ValueError(f"{source} has no clip with an answer: there is nothing to learn from")
    held_out_rows = {name: list(read(model, clips, cfg, leave_out=False)) for name, clips in held_out.items()}
    train(model, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"audio_projector.{name}": value for name, value in model.audio_projector.state_dict().items()}, out)
    tokenizer = Tokenizer(cfg.stages[0].data.tokenizer)
    for name, clips in held_out_rows.items():
        print(f"{name}: word error rate {word_errors(model, clips, tokenizer):.3f} without the decoder", flush=True)


@torch.no_grad()
def read(model: AVLM, source: str, cfg: Config, leave_out: bool = True) -> Iterator[Row]:
    """Every sample of a source, a clip and its answer, through the encoder once. A sample that cannot be read is left
    out with a line that says why, or is a ValueError."""
    data = replace(cfg.stages[0].data, seq_length=ROW)
    tokenizer = Tokenizer(data.tokenizer)
    control = torch.tensor([tokenizer.id_of(token) for token in tokenizer.control_tokens], dtype=torch.int64)
    stream = Stream(source, data, cfg.model, rank=0, world=1, seed=0, train=False)
    for batch in open_loader(stream):
        for key, reason in batch.skipped:
            if not leave_out:
                raise ValueError(f"{source}, {key}: {reason}")
            print(f"skipped sample {key} of {source}: {reason}", file=sys.stderr)
        if not batch.keys:  # all that were left were skipped
            continue
        x_KC = model.audio(batch.audio)
        features_N, targets_N = (by_clip(rows, batch) for rows in (batch.audio.rows, batch.target_rows_R))
        if 0 in features_N:
            raise ValueError(f"{source}, {batch.keys[features_N.index(0)]}: a sample without audio cannot be aligned")
        answers_N = [answer[~torch.isin(answer, control)] for answer in batch.target_R.split(targets_N)]
        yield Row(x_KC.bfloat16(), batch.audio.features, features_N, answers_N)


def by_clip(rows: Tensor, batch: Batch) -> list[int]:
    """How many of these positions lie in each document, which is one clip and its answer."""
    documents = torch.bucketize(rows, batch.segments.cu_seqlens[1:], right=True)
    return documents.bincount(minlength=len(batch.keys)).tolist()


def project(model: AVLM, row: Row) -> Tensor:
    """Features of a row, float32 (G, D)."""
    G = len(row.features)
    empty_GD = torch.zeros(G, model.config.decoder.hidden_size)
    audio = media_of("audio", [], [], model.config, row.features, torch.arange(G))
    features_GD, _ = model.audio_projector(empty_GD, audio, row.x_KC.float())
    return features_GD


def logits(features_GD: Tensor, embedding_VD: Tensor) -> Tensor:
    """float32 (G, 1 + V): of the blank, then of each token."""
    logits_GV = features_GD @ embedding_VD.T
    return torch.cat([logits_GV.new_full((len(logits_GV), 1), BLANK), logits_GV], dim=1)


def train(model: AVLM, rows: list[Row]) -> None:
    """One row a step. Its tokens compete with each other and with OTHERS tokens of all rows, drawn for each step."""
    model.audio_projector.requires_grad_(True)
    pairs = [pair for row in rows for pair in zip(row.answers_N, row.features_N)]
    short = 0
    for said, num_features in pairs:
        num_blanks = int((said[1:] == said[:-1]).sum())  # CTC needs a blank between repeated tokens
        short += len(said) + num_blanks > num_features
    if short:
        print(f"nothing is learned of {short} of {len(pairs)} clips: they have too few features", flush=True)
    known = torch.cat([answer for row in rows for answer in row.answers_N]).unique()
    adam = torch.optim.AdamW(model.audio_projector.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = EPOCHS * len(rows)
    losses = []

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    for step in range(steps):
        row = rows[torch.randint(len(rows), ()).item()]
        said = torch.cat(row.answers_N)
        drawn = known[torch.randint(len(known), (OTHERS,))]
        tokens, place = torch.cat([said, drawn]).unique(return_inverse=True)
        log_p_GV = logits(project(model, row), model.decoder.embedding(tokens)).log_softmax(1)
        loss = F.ctc_loss(
            pad_sequence(log_p_GV.split(row.features_N)),
            1 + place[: len(said)],
            torch.tensor(row.features_N),
            torch.tensor([len(answer) for answer in row.answers_N]),
            zero_infinity=True,  # of clips with too few features
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.audio_projector.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {sum(losses[-100:]) / 100:.3f} a token", flush=True)


@torch.no_grad()
def greedy(model: AVLM, row: Row) -> list[Tensor]:
    """Tokens of each clip: the most likely one of every feature, without repetitions and blanks."""
    table_VD = model.decoder.embedding(torch.arange(model.config.decoder.vocab_size))
    likeliest_G = logits(project(model, row), table_VD).argmax(1)
    heard_N = (ids.unique_consecutive() for ids in likeliest_G.split(row.features_N))
    return [ids[ids > 0] - 1 for ids in heard_N]


def word_errors(model: AVLM, rows: Iterable[Row], tokenizer: Tokenizer) -> float:
    def text(ids: Tensor) -> str:
        return tokenizer.decode(ids.tolist(), control=False)

    spelled = []
    for row in rows:
        for heard, said in zip(greedy(model, row), row.answers_N):
            spelled.append((text(heard), [text(said)]))
    return total(itertools.starmap(scorer("wer", spelled), spelled))


if __name__ == "__main__":
    run_command(main)
