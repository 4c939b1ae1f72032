"""How long training waits for a checkpoint: DCP's save, ours, and ours in the background, in turn, on two ranks.

    python -m tests.measurements.save_wait [HIDDEN_SIZE]

Seconds (the median of five saves after a first one) for a decoder of this width (768: 0.9 GB with its moments), with
everything trained; and with projectors trained alone.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed.checkpoint as dcp

from avlm.config.run import CheckpointConfig
from avlm.parallel import mesh
from avlm.storage.run_folder import Progress
from avlm.training import optimizer
from avlm.training.checkpoint import model_tensors, optimizer_tensors
from avlm.training.saving import Saver
from tests.parallel.small import TREE, build, make_config
from tests.parallel.spawn import run_ranks

SAVES = 6
STAGES = {"everything": list(TREE["stages"][0]["train"]), "projectors": ["vision_projector", "audio_projector"]}


def wait(width: int, train: list[str], folder: str) -> dict[str, float]:
    decoder = {**TREE["model"]["decoder"], "hidden_size": width, "intermediate_size": 4 * width, "num_layers": 8}
    stage = {"name": "all", "steps": 1, "train": train}
    world, model = build(make_config(model={**TREE["model"], "decoder": decoder}, stages=[stage]))
    adam = optimizer.build(model, make_config().stages[0].optimizer)
    saver = Saver(Path(folder), CheckpointConfig(keep=1), world)
    seconds: dict[str, list[float]] = {"DCP": [], "ours": [], "in the background": []}
    for number in range(SAVES):
        for turn, (name, times) in enumerate(seconds.items()):
            world.barrier()
            started = time.perf_counter()
            if name == "DCP":
                state = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, adam)}
                dcp.save(state, checkpoint_id=f"{folder}/dcp", storage_writer=dcp.FileSystemWriter(f"{folder}/dcp"))
            else:
                progress = Progress(step=3 * number + turn)
                assert not saver.save(progress, model, adam, {}, wait=name == "ours")
            times.append(time.perf_counter() - started)
            assert not saver.finish()
    mesh.stop()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 768
    for what, train in STAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, _ = run_ranks(wait, 2, width, train, folder)
        shown = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(f"{what}: {shown}: {seconds['in the background'] / seconds['DCP']:.2f} of the wait")


if __name__ == "__main__":
    main()
