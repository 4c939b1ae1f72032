"""debug.profile: a trace of some steps, and the time of each part in it."""

import gzip
import json

import pytest

from avlm.config.load import load_config
from avlm.preflight.check import check_layout
from avlm.training.trace import Place, read, table
from tests.parallel.spawn import run_ranks
from tests.training.test_train import losses, train_to_end, write_config

STAGES = [{"name": "all", "steps": 4, "train": ["decoder", "vision", "vision_projector"]}]


def test_profiled_steps_of_two_ranks_have_the_same_losses_and_a_trace_that_names_the_parts(tmp_path):
    folders = [tmp_path / name for name in ("plain", "profiled")]
    for folder, options in zip(folders, [(), ("debug.profile=[2,2]", "debug.profile_ranks=[1]")]):
        run_ranks(train_to_end, 2, write_config(folder, stages=STAGES), options)
    plain, profiled = map(losses, folders)
    assert profiled == plain
    [path] = folders[1].glob("run/profile/*")
    assert path.name == "step_00000002_rank_00001.json.gz"
    times = read(path)
    assert times.num_steps == 2
    assert sum(times.host.values()) == pytest.approx(times.total, rel=0.02)
    for part in ("decoder.blocks", "vision.blocks", "decoder.head", "FSDP"):
        for direction in ("forward", "backward"):
            assert times.host[Place(part, direction)] > 0, (part, direction)
    assert times.host[Place("optimizer", "forward")] > 0 and Place("audio.blocks", "backward") not in times.host
    first, *rows = table(path).splitlines()
    assert first.startswith(f"{path.name}: 2 steps of ") and any(row.startswith("decoder.blocks ") for row in rows)


def test_kernels_belong_to_the_part_that_launched_them(tmp_path):
    def span(name, start, end, kind="cpu_op", thread=1, **arguments):
        return {
            **{"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": kind, "tid": thread, "args": arguments}
        }

    number = {"Sequence number": 5}
    events = [
        span("avlm step 3", 0, 100, "user_annotation"),
        span("avlm/vision", 10, 40, "user_annotation"),
        span("avlm/vision.blocks.1", 20, 30, "user_annotation"),
        span("aten::mm", 21, 29, **number),
        span("launch", 22, 23, "cuda_runtime", correlation=7),
        span("autograd::engine::evaluate_function: MmBackward0", 60, 70, thread=2, **number),
        span("launch", 61, 62, "cuda_runtime", thread=2, correlation=8),
        span("launch", 90, 91, "cuda_runtime", correlation=9),
        *(span("gemm", 50 * i, 50 * i + i, "kernel", "stream 7", correlation=i) for i in (7, 8, 9)),
    ]
    path = tmp_path / "step.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    times = read(path)
    blocks = "vision.blocks"
    assert times.host[Place(blocks, "forward")] == times.host[Place(blocks, "backward")] == 10
    assert times.host[Place("vision", "forward")] == 20, "without its blocks"
    assert [times.device[Place(blocks, direction)] for direction in ("forward", "backward")] == [7, 8]
    assert "GPU backward" in table(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "no trace", "a list", "no steps"])
def test_a_trace_that_cannot_be_read_is_told_in_one_line(tmp_path, damage):
    whole = gzip.compress(json.dumps({"traceEvents": []}).encode(), mtime=0)
    contents = {
        "cut": whole[:-12],
        "changed": whole[:12] + b"\xff\xff" + whole[14:],
        "no trace": b"{}",
        "no steps": whole,
    }
    path = tmp_path / "step_00000001_rank_00000.json.gz"
    path.write_bytes(contents.get(damage, gzip.compress(b"[1]")))
    with pytest.raises(ValueError, match=path.name):
        read(path)


def test_steps_and_ranks_that_a_run_does_not_have_are_told_by_name(tmp_path):
    path = write_config(tmp_path, stages=STAGES)
    with pytest.raises(ValueError, match=r"debug\.profile begins at step 5, and the run has 4 steps"):
        load_config(path, ["debug.profile=[5,1]"])
    cfg = load_config(path, ["debug.profile=[4,1]", "debug.profile_ranks=[0,2]"])
    with pytest.raises(ValueError, match=r"debug\.profile_ranks=\[0, 2\] names rank 2 of 2"):
        check_layout(cfg, 2)
