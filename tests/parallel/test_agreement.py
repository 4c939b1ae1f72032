"""Ranks that are not about to do the same are told so, all of them, before any collective; and how ranks find each
other after a restart."""

from multiprocessing.pool import ThreadPool

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
    """What this rank is told of three that differ in one thing after the other."""
    world, model = build(cfg)
    [row] = make_rows(cfg, ["both"])
    short = make_rows(make_config(data={"train": "synthetic", "seq_length": 32}), ["text"])[0]
    found = {"nothing": message(agreement.check_step, world, model, 7, [row, row])}
    found["micro-batches"] = message(agreement.check_step, world, model, 7, [row] * (1 + (world.rank == 1)))
    found["rows"] = message(agreement.check_step, world, model, 7, [short if world.rank == 0 else row])
    found["configs"] = message(agreement.check_start, world, f"output_dir: runs/a\nseed: {world.rank}\n")
    if world.rank == 2:
        model.vision.requires_grad_(False)
    found["modules"] = message(agreement.check_step, world, model, 7, [row])
    mesh.stop()
    return found


def test_every_rank_is_told_which_ranks_differ_and_in_what():
    for found in run_ranks(disagreements, 3, make_config()):
        assert not found["nothing"]
        assert found["micro-batches"].startswith(
            "ranks disagree on micro-batches: rank 1 has `2`, most have `1`; every rank has to run every tower"
        )
        assert "token rows: rank 0 has `[32]`, most have `[64]`" in found["rows"]
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
            stores = pool.starmap(mesh.store_of_this_start, [(rank, 3) for rank in (1, 2, 0)])
        assert not stores[0].check(["address"])
        stores[2].set("address", f"of the {start} start")
        assert [store.get("address").decode() for store in stores] == [f"of the {start} start"] * 3
