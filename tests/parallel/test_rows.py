"""Rows reach the ranks that share them whole, ahead of their step, and in few bytes."""

import itertools
import time
from dataclasses import fields, is_dataclass

import pytest
import torch
import torch.distributed as dist

from avlm.models.batch import Batch, empty_batch
from avlm.parallel import rows
from avlm.parallel.apply import own_part
from avlm.parallel.mesh import lay_out
from tests.measurements import rows_to_ranks
from tests.parallel.small import MODELS, make_config, make_rows
from tests.parallel.spawn import run_ranks

LAYOUTS = {"context": (1, 1, 4, 1), "two rows": (1, 2, 2, 1), "context x tensor": (1, 1, 2, 2)}


class Loader:
    """Rows of ``small``; its state is how many it has handed out."""

    def __init__(self, batches):
        self.batches = batches
        self.handed_out = 0

    def __iter__(self):
        for batch in self.batches:
            self.handed_out += 1
            yield batch

    def state(self):
        return {"handed_out": self.handed_out}


def differences(found, expected, path=""):
    """Where two values differ, tensor by tensor, groups of ranks excepted."""
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and torch.equal(found, expected)
        return [] if same else [path]
    if is_dataclass(expected):
        names = [entry.name for entry in fields(expected) if entry.name != "group"]
        return [each for name in names for each in differences(getattr(found, name), getattr(expected, name), name)]
    if isinstance(expected, list | tuple):
        pairs = itertools.zip_longest(found, expected)
        return [each for a, b in pairs for each in differences(a, b, path)]
    return [] if found == expected else [path]


def take_all(name, balance):
    """(differences of the parts from those of rows that every rank holds, states, values of whole rows that a rank
    holds) of three rows."""
    dist.init_process_group("gloo")
    cfg = make_config(model=MODELS["gemma" if name == "two rows" else "square"])  # intervals travel, too
    world = lay_out(LAYOUTS[name], torch.device("cpu"), balance)
    made = make_rows(cfg, ("video", "image", "text", "audio", "video", "image"))
    own = made[world.data_rank :: world.data_size][:3]
    loader = Loader(own) if world.leads_row else None
    taken = list(rows.TrainingRows(loader, cfg.model, world, ahead=2))
    everyone = [own_part(batch, cfg.model, world) for batch in own]
    found = [each for row, part in zip(taken, everyone, strict=True) for each in differences(row.part, part)]
    states = [row.loader_state() for row in taken]
    held = sum(media.values.numel() for row in taken for media in row.batch.media.values())
    leads = world.leads_row
    dist.destroy_process_group()
    return found, states, held, leads


@pytest.mark.parametrize(("name", "balance"), [("context", False), ("two rows", True), ("context x tensor", False)])
def test_every_rank_gets_its_part_and_the_state_of_the_loader_after_each_row(name, balance):
    """Although the thread that fetches rows is two rows ahead."""
    for found, states, held, leads in run_ranks(take_all, 4, name, balance):
        assert not found
        assert states == ([{"handed_out": n} for n in (1, 2, 3)] if leads else [{}] * 3)
        assert (held > 0) == leads


class SlowLoader(Loader):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.5)
            yield batch


def validate_between_rows():
    """Whether the rows of both are those of their loaders, in turn."""
    dist.init_process_group("gloo")
    cfg = make_config()
    world = lay_out((1, 1, 2, 1), torch.device("cpu"))
    made = make_rows(cfg, ("text", "video", "image", "audio"))
    training, validation = made[:2], made[2:]
    taken = rows.TrainingRows(SlowLoader(training) if world.leads_row else None, cfg.model, world, ahead=1)
    found = [next(taken).batch]
    taken.settle()
    found += rows.share_rows(validation if world.leads_row else None, world)
    found += [row.batch for row in taken]
    dist.destroy_process_group()
    expected = [training[0], *validation, training[1]]
    return [torch.equal(batch.token_T, same.token_T) for batch, same in zip(found, expected, strict=True)]


def test_rows_of_validation_and_the_next_row_of_training_do_not_mix():
    assert run_ranks(validate_between_rows, 2) == [[True] * 4] * 2


def test_a_rank_receives_the_tokens_of_the_row_and_its_own_media_alone():
    for rank, (_, received, needed) in enumerate(run_ranks(rows_to_ranks.measure, 4, 8192, 0)):
        assert rank == 0 or received <= 1.1 * needed


def fail_in_the_second(ask):
    dist.init_process_group("gloo")
    cfg = make_config()
    world = lay_out((1, 1, 2, 1), torch.device("cpu"))

    def batches():
        yield empty_batch(64, cfg.model)
        raise ValueError("a sample is damaged")

    loader = Loader(batches()) if world.leads_row else None
    taken = rows.TrainingRows(loader, cfg.model, world, ahead=1)
    next(taken)
    if not world.leads_row:
        return ""  # it ends, as a process does whose peer is gone
    try:
        ask(taken)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("ask", [next, rows.TrainingRows.settle])
def test_an_error_of_the_loader_reaches_the_step_that_asks_for_the_row_or_the_end_of_the_stage(ask):
    assert run_ranks(fail_in_the_second, 2, ask)[0] == "a sample is damaged"


def test_a_row_is_read_as_it_was_written():
    cfg = make_config()
    row = make_rows(cfg, ("video",))[0]
    message, start = rows._message(row)
    again = rows._read(message, start)
    assert isinstance(again, Batch) and not differences(again, row)
