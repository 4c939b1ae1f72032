"""When ranks are about to do different things, all of them are told so before any collective; and how ranks find each
other after a restart."""

from multiprocessing.pool import ThreadPool

import pytest
import torch.distributed as dist

from avlm.parallel import agreement, mesh
from tests.parallel.small import build, make_config, make_rows
from tests.parallel.spawn import run_ranks


def message(check, *arguments) -> str:
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def disagreements(cfg) -> dict[str, str]:
    """The error that this rank gets, of three that differ in one thing after another."""
    world, model = build(cfg)
    [row] = make_rows(cfg, ["both"])
    [short] = make_rows(make_config(data={"train": "synthetic", "seq_length": 32}), ["text"])

    def of_step(*parts) -> str:
        return message(agreement.check_step, world, model, 7, list(parts))

    found = {"nothing": of_step(row, row)}
    found["micro-batches"] = of_step(row, row) if world.rank == 1 else of_step(row)
    found["tokens"] = of_step(short if world.rank == 0 else row)
    found["configs"] = message(agreement.check_start, world, f"output_dir: runs/a\nseed: {world.rank}\n")
    if world.rank == 2:
        model.vision.requires_grad_(False)
    found["modules"] = of_step(row)
    mesh.stop()
    return found


def test_every_rank_is_told_which_ranks_differ_and_in_what():
    for found in run_ranks(disagreements, 3, make_config()):
        assert not found["nothing"]
        assert found["micro-batches"].startswith(
            "ranks disagree on micro-batches: rank 1 has `2`, most have `1`; every rank has to run every tower"
        )
        assert "tokens: rank 0 has `[32]`, most have `[64]`" in found["tokens"]
        assert (
            "config: rank 1 has `seed: 1`, most have `seed: 0`, rank 2 has `seed: 2`, most have `seed: 0`"
            in found["configs"]
        )
        assert "modules, and whether they train: rank 2 has `{" in found["modules"]


def test_ranks_of_a_restart_do_not_find_what_the_start_before_left_in_the_store(monkeypatch):
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher.queue_push("avlm/to_first", "request nonce-of-a-rank-that-is-gone")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launcher.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    for start in ("first", "second"):
        with ThreadPool(3) as pool:
            stores = pool.starmap(mesh.store_of_this_start, [(rank, 3, 60.0) for rank in (1, 2, 0)])
        assert not stores[0].check(["address"])
        stores[2].set("address", f"of the {start} start")
        assert [store.get("address").decode() for store in stores] == [f"of the {start} start"] * 3
    with ThreadPool(2) as pool, pytest.raises(TimeoutError, match=r"rank 1, 3 did not join within .*start=2 s"):
        pool.starmap(mesh.store_of_this_start, [(rank, 4, 2.0) for rank in (0, 2)])
    with pytest.raises(TimeoutError, match=r"rank 0 did not join within .*start=1 s"):
        mesh.store_of_this_start(1, 2, 1.0)
