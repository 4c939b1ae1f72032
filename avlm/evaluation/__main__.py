"""Generated answers on held-out sets: scores, with modalities taken away, and against chance.

    torchrun --nproc-per-node 2 -m avlm.evaluation runs/demo --data data/demo
    python -m avlm.evaluation runs/asr --data clean=test.jsonl --metrics wer,cer --step best

Metrics are those of ``avlm.evaluation.scores``. Chance is the best anyone could do in exact match with what an ablation
leaves; it is read from ``chance.json`` beside a set, when there is one. With the needed modality gone accuracy must
stay within the one-sided 95 % bound of chance: otherwise the set can be answered without looking or listening.
Writes report.json and report.md into the run folder, and every answer into predictions/step_STEP/NAME.jsonl.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from avlm.config.run import ParallelConfig
from avlm.evaluation.answers import evaluate, find_sets, predictions_path
from avlm.evaluation.report import report, table, words
from avlm.evaluation.scores import METRICS, check_names
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.process.exit import one_line_errors
from avlm.storage.run_folder import find_checkpoint, read_progress
from avlm.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint of one")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=SOURCE", help="a set, or a folder of sets"
    )
    parser.add_argument("--metrics", metavar="NAME,NAME", help=f"of {', '.join(METRICS)}")
    parser.add_argument("--step", default="latest", help="checkpoint: of a step, best or latest")
    parser.add_argument("--limit", type=int, help="samples of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer")
    arguments = parser.parse_args()
    metrics = None
    if arguments.metrics is not None:
        metrics = [name.strip() for name in arguments.metrics.split(",")]
        check_names(metrics, "--metrics")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves no samples")
    sets = find_sets(arguments.data)
    config, path = find_checkpoint(arguments.run, arguments.step)
    config = dataclasses.replace(config, parallel=ParallelConfig())  # on however many ranks there are
    world = mesh.start(config, mesh.choose_device(config))
    path = world.gather(path)[0]  # the run may go on and save meanwhile
    with torch.device("meta"):
        model = AVLM(config.model)
    apply_parallel(model, world, config)
    model.requires_grad_(False)  # FSDP wants what trains in one dtype, and adapters may stand on a base in bf16
    checkpoint.load_checkpoint(path, model)
    run, step, results = path.resolve().parents[1], read_progress(path).step, []
    with torch.no_grad():
        for name, source in sets.items():
            predictions = predictions_path(run, step, name)
            options = (metrics, arguments.limit, arguments.max_new_tokens, predictions)
            results.append(evaluate(model, name, source, config.stages[-1].data, world, *options))
            if world.is_first:
                values = ", ".join(f"{words(key)} {100 * x:.1f} %" for key, x in results[-1]["metrics"].items())
                print(f"{name}: {values} of {results[-1]['count']}", flush=True)
                (run / "report.json").write_text(json.dumps({"step": step, "results": results}, indent=2))
                (run / "report.md").write_text(report(results))
    if world.is_first:
        print(table(results))
    mesh.stop()


if __name__ == "__main__":
    with one_line_errors():
        main()
