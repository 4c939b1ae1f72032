"""A duplex row on two ranks gives the loss and the gradients of one process, with weights in the loss."""

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
from avlm.training.log import tally
from tests.parallel.small import TREE, Observer, build, make_config
from tests.parallel.spawn import run_ranks
from train import train_step

LAYOUTS = ({"shard": 2}, {"context": 2}, {"shard": 1, "tensor": 2})
PADS = {"pad_token": "<pad>", "begin_token": "<begin>", "end_token": "<end>"}
MODEL = {name: part for name, part in TREE["model"].items() if "vision" not in name}
MODEL |= {
    "audio": {**MODEL["audio"], "max_positions": 20},
    "audio_projector": {"downsample": 4, "add": True},
}


def config_of(**parallel: int) -> Config:
    stages = [{"name": "all", "steps": 20, "train": ["decoder", "audio", "audio_projector"]}]
    data = {**TREE["data"], "duplex": PADS}
    return make_config(model=MODEL, data=data, stages=stages, parallel=parallel, train={"precision": "fp32"})


def rows_of(config: Config) -> list[Batch]:
    """Two packed rows: recordings of different lengths, and a text."""
    torch.manual_seed(0)
    rows = []
    for lengths in ((31, 12), (20,)):
        samples = []
        for length in lengths:
            mels = audio.mels(torch.randn(1280 * length - 100), config.model.audio)
            token_T, target_T = torch.randint(96, (2, length))
            samples.append(EncodedSample("", "audio", token_T, target_T, {"audio": mels}, factor_T=torch.rand(length)))
        samples.insert(1, EncodedSample("", "text", *torch.randint(96, (2, 9))))
        rows.append(pack(samples, 64, config.model))
    return rows


def step(layouts: tuple[dict[str, int], ...]) -> list[dict[str, Any]]:
    """Loss and gradients of one step over both rows, for each layout, on this rank."""
    found, worlds = [], {}
    for parallel in layouts:
        config = config_of(**parallel)
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


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    config = config_of()
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


def test_two_ranks_train_as_one_process(alone):
    """Data, context and tensor parallelism; rows that hear are cut between ranks."""
    for rank in run_ranks(step, 2, LAYOUTS):
        for found in rank:
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert found.keys() == alone.keys()
            for name in alone.keys() - {"loss"}:
                largest = alone[name].abs().max()
                assert largest > 0 or name.endswith("bias"), name
                torch.testing.assert_close(
                    torch.from_numpy(found[name]), alone[name], atol=float(largest) * 1e-5 + 1e-9, rtol=1e-4
                )
