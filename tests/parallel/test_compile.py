"""train.compile: a few graphs serve any number of documents, images and clips, in each way that blocks are laid out and
recomputed, and their losses are those of blocks that are not compiled. The attention is plain PyTorch, outside the
graphs; tests/kernels/test_train_compile.py has it inside."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from avlm.config.load import resolve_config
from avlm.config.run import Config
from avlm.data.packing import pack
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.initial import init
from avlm.models.lora import is_adapter
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.fsdp import reshard
from avlm.parallel.recompute import apply_recompute
from tests.parallel.small import MODELS, TREE, build, make_sample
from tests.parallel.spawn import run_ranks

DOCUMENTS = [5, 9, 1, 8, 3, 11, 2, 7, 4, 10]
MEDIA = [("both", "image"), ("both", "both"), ("text", "text"), ("image", "image"), ("audio", "text")]
SETTLED = 5  # rows: every mix of media has been seen


def rows_of(cfg: Config) -> list[Batch]:
    """A row for each number of documents, of which the first have media."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, count in enumerate(DOCUMENTS):
        mixes = [*MEDIA[i % len(MEDIA)], *["text"] * count][:count]
        samples = [make_sample(mix, 2 + (i + n) % 3, generator, cfg.model) for n, mix in enumerate(mixes)]
        rows.append(pack(samples, cfg.stages[0].data.seq_length, cfg.model))
    return rows


def make(train: dict, **overrides) -> Config:
    return resolve_config({**TREE, "train": {**train, "compile": True}, **overrides}, "test")


@pytest.fixture
def graphs() -> Iterator[CompileCounterWithBackend]:
    with count_graphs() as counter:
        yield counter


@contextmanager
def count_graphs() -> Iterator[CompileCounterWithBackend]:
    """Blocks are traced, but not compiled to machine code; counts their graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=counter)):
        yield counter


FULL = {"recompute": dict.fromkeys(("decoder", "vision", "audio"), "full")}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [  # keys of train, what does not learn, model
    pytest.param({}, "", "square", id="none"),
    slow({**FULL, "offload_activations": True}, "all but adapters", "square", id="full, offloaded, adapters"),
    slow({"recompute": {"vision": "full"}}, "decoder", "square", id="frozen decoder"),
    slow({"recompute": {"decoder": "full"}}, "vision audio", "square", id="frozen towers"),
    pytest.param({"recompute": {"vision": "selective"}}, "decoder", "windows", id="images of any grid, windows"),
    slow(FULL, "", "deep", id="images of any grid, DeepStack"),
    pytest.param({"recompute": {"decoder": "selective"}}, "vision audio", "gemma", id="tokens that look ahead"),
]


@pytest.mark.parametrize(("train", "frozen", "model"), CASES)
def test_any_number_of_documents_and_media_shares_a_few_graphs(train, frozen, model, graphs):
    with_adapters = frozen == "all but adapters"
    lora = {"rank": 2, "targets": ["decoder.*", "vision.*"]} if with_adapters else None
    cfg = make(train, model={**MODELS[model], "lora": lora})
    plain, compiled = AVLM(cfg.model), AVLM(cfg.model)
    init(plain, seed=0)
    compiled.load_state_dict(plain.state_dict())
    for model in (plain, compiled):
        for name, parameter in model.named_parameters():
            learns = is_adapter(name) if with_adapters else name.split(".")[0] not in frozen.split()
            parameter.requires_grad_(learns)
    apply_recompute(compiled, cfg.train)

    rows = rows_of(cfg)
    counts = []
    for row in rows:
        losses = [model(row)[0] for model in (plain, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss in losses:
            loss.backward()
        counts.append(graphs.frame_count)
    assert counts[0] > 0 and len(set(counts[SETTLED:])) == 1, counts
    for (name, expected), found in zip(plain.named_parameters(), compiled.parameters()):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # validation
        for row in rows:
            torch.testing.assert_close(plain(row)[0], compiled(row)[0], rtol=1e-5, atol=0)
            counts.append(graphs.frame_count)
    assert len(set(counts[len(rows) + SETTLED :])) == 1, counts


LAYOUTS = {  # of two ranks -> keys of parallel, keys of train
    "FSDP": ({"tower_sharding": "block"}, FULL),
    "TP": ({"tensor": 2}, {}),
    "TP, full": ({"tensor": 2}, FULL),
    "ring": ({"context": 2, "context_mode": "ring"}, {}),
    "ring, full": ({"context": 2, "context_mode": "ring"}, FULL),
    "Ulysses": ({"context": 2, "context_mode": "ulysses"}, {}),
}


def losses_on_ranks(names: list[str]) -> dict[str, tuple[list[float], list[float], list[int]]]:
    """layout -> losses of blocks that are not compiled, of blocks that are, and the number of graphs after each row."""
    worlds: dict[tuple, mesh.World] = {}
    found = {}
    for name in names:
        layout, train = LAYOUTS[name]
        cfg = make(train, parallel=layout)
        plain, _ = losses_of(replace(cfg, train=replace(cfg.train, compile=False)), worlds)
        found[name] = plain, *losses_of(cfg, worlds)
    mesh.stop()
    return found


def losses_of(cfg: Config, worlds: dict[tuple, mesh.World]) -> tuple[list[float], list[int]]:
    losses = []
    counts = []
    with count_graphs() as graphs:
        world, model = build(cfg, worlds)
        for row in rows_of(cfg):
            loss, _ = model(own_part(row, cfg.model, world))
            loss.backward()
            losses.append(world.sum([loss.item()])[0])
            counts.append(graphs.frame_count)
        reshard(model)
    return losses, counts


@pytest.mark.parametrize("names", [["ring"], slow(["FSDP", "TP", "TP, full", "ring, full", "Ulysses"])])
def test_compiled_blocks_of_every_layout_have_the_losses_of_others_and_are_compiled_once(names):
    for found in run_ranks(losses_on_ranks, 2, names):
        for name, (plain, compiled, counts) in found.items():
            assert compiled == pytest.approx(plain, rel=1e-5), name
            assert counts[0] > 0 and len(set(counts[SETTLED:])) == 1, (name, counts)
