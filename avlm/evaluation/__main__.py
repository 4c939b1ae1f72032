"""Score generated answers on held-out sets, also with modalities taken away, against chance.

    torchrun --nproc-per-node 2 -m avlm.evaluation runs/demo --data data/demo
    python -m avlm.evaluation runs/asr --data clean=test.jsonl --metrics wer,cer --step best

Writes report.json, report.md and report.html into the run folder, and every answer into
predictions/step_STEP/NAME.jsonl.
"""

import argparse
import json
from pathlib import Path

import torch

from avlm.config.run import ParallelConfig
from avlm.evaluation.answers import evaluate, find_sets
from avlm.evaluation.page import write_page
from avlm.evaluation.report import percent, report, table, words
from avlm.evaluation.scores import METRICS, check_names
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.process.exit import run_command
from avlm.storage.run_folder import find_checkpoint, read_progress
from avlm.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint of one")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=SOURCE", help="a set, or a folder of sets"
    )
    parser.add_argument("--metrics", metavar="NAME,NAME", help=f"of {', '.join(METRICS)}")
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best or latest")
    parser.add_argument("--limit", type=int, help="samples of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="upper bound of an answer's tokens")
    arguments = parser.parse_args()
    metrics = None
    if arguments.metrics is not None:
        metrics = [name.strip() for name in arguments.metrics.split(",")]
        check_names(metrics, "--metrics")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves no samples")
    sets = find_sets(arguments.data)
    config, path = find_checkpoint(arguments.run, arguments.step)
    parallel = ParallelConfig()  # any number of ranks
    world = mesh.start(parallel, mesh.choose_device(config.device))
    path = world.gather(path)[0]  # the run may continue and save meanwhile
    with torch.device("meta"):
        model = AVLM(config.model)
    apply_parallel(model, world, parallel, config.train)
    model.requires_grad_(False)  # FSDP needs one dtype among trained parameters, and adapters may have a bf16 base
    checkpoint.load_model(path, model)
    run = path.resolve().parents[1]
    step = read_progress(path).step
    results = []
    with torch.no_grad():
        for name, source in sets.items():
            options = (metrics, arguments.limit, arguments.max_new_tokens, run, step)
            result = evaluate(model, name, source, config.stages[-1].data, world, *options)
            results.append(result)
            if world.is_first:
                values = [f"{words(metric)} {percent(value)}" for metric, value in result["metrics"].items()]
                print(f"{name}: {', '.join(values)} of {result['count']}", flush=True)
                (run / "report.json").write_text(json.dumps({"step": step, "results": results}, indent=2))
                (run / "report.md").write_text(report(results))
    if world.is_first:
        print(table(results))
        print(f"with images and sounds: {write_page(run)}")
    mesh.stop()


if __name__ == "__main__":
    run_command(main)
