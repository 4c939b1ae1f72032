"""A duplex row on two ranks gives the loss and the gradients of one process, with weights in the loss and codes."""

from typing import Any

import pytest
import torch

from avlm.config.run import Config
from avlm.data.media import audio
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.initial import init
from avlm.parallel.apply import own_part
from avlm.parallel.tensor import check_sizes
from avlm.training.log import tally
from tests.parallel.small import TREE, Observer, build, make_config
from tests.parallel.spawn import run_ranks
from train import train_step

CODEC = {"num_codebooks": 2, "codebook_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
CODEC |= {"num_heads": 2, "num_kv_heads": 1}
CASES = (({"shard": 2}, CODEC), ({"context": 2}, CODEC), ({"tensor": 2}, None))  # layout, codec
PADS = {"pad_token": "<pad>", "begin_token": "<begin>", "end_token": "<end>"}
MODEL = {name: part for name, part in TREE["model"].items() if "vision" not in name}
MODEL |= {
    "audio": {**MODEL["audio"], "max_positions": 20},
    "audio_projector": {"downsample": 4, "add": True},
}


def config_of(parallel: dict[str, int], codec: dict | None) -> Config:
    train = ["decoder", "audio", "audio_projector"] + ["codec"] * (codec is not None)
    stages = [{"name": "all", "steps": 20, "train": train}]
    data = {**TREE["data"], "duplex": PADS}
    return make_config(
        model={**MODEL, "codec": codec}, data=data, stages=stages, parallel=parallel, train={"precision": "fp32"}
    )


def rows_of(config: Config) -> list[Batch]:
    """Two packed rows: recordings of different lengths, and a text."""
    torch.manual_seed(0)
    rows = []
    for lengths in ((31, 12), (20,)):
        samples = []
        for length in lengths:
            mels = audio.mels(torch.randn(1280 * length - 100), config.model.audio)
            token_T, target_T = torch.randint(96, (2, length))
            code_TK = torch.randint(12, (length, 2)) if config.model.codec else None
            more = {"factor_T": torch.rand(length), "code_TK": code_TK}
            samples.append(EncodedSample("", "audio", token_T, target_T, {"audio": mels}, **more))
        samples.insert(1, EncodedSample("", "text", *torch.randint(96, (2, 9))))
        rows.append(pack(samples, 64, config.model))
    return rows


def step(cases: tuple) -> list[dict[str, Any]]:
    """Loss and gradients of one step over both rows, for each case, on this rank."""
    found, worlds = [], {}
    for case in cases:
        config = config_of(*case)
        world, model = build(config, worlds)
        own = [row for i, row in enumerate(rows_of(config)) if i % world.data_size == world.shard_of_data["rank"]]
        parts = [own_part(row, config.model, world) for row in own]
        counted = tally(own, {})["target_tokens"] if world.leads_row else 0.0
        num_targets = world.sum([counted])[0]
        observer = Observer(model)
        values = train_step(model, parts, num_targets, observer, None, world)
        found.append(
            {
                "loss": values[:5].sum().item() / num_targets,
                **{name: gradient.numpy() for name, gradient in observer.gradients.items()},
            }
        )
    return found


def alone(codec: dict | None) -> dict[str, Any]:
    config = config_of({}, codec)
    model = AVLM(config.model)
    init(model, config.seed)
    freezing.freeze(model, config.stages[0])
    rows = rows_of(config)
    num_targets = sum(row.num_targets for row in rows)
    total = 0.0
    for row in rows:
        loss, _ = model(row)
        (loss / num_targets).backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": total / num_targets, **gradients}


def test_two_ranks_train_as_one_process():
    """Data, context and tensor parallelism; rows that hear, and codes, are cut between ranks."""
    expected = [alone(codec) for _, codec in CASES]
    for rank in run_ranks(step, 2, CASES):
        for found, wanted in zip(rank, expected, strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found.keys() == wanted.keys()
            for name in wanted.keys() - {"loss"}:
                largest = float(wanted[name].abs().max())
                assert largest > 0 or name.endswith("bias"), name
                given = torch.from_numpy(found[name])
                torch.testing.assert_close(given, wanted[name], atol=largest * 1e-5 + 1e-9, rtol=1e-4)


def test_codes_refuse_tensor_parallelism():
    with pytest.raises(ValueError, match=r"tensor=2 does not go with model\.codec"):
        check_sizes(config_of({}, CODEC).model, 2)
