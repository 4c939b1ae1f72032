"""Score generated answers on held-out sets, also with modalities taken away, against chance.

    torchrun --nproc-per-node 2 -m avlm.evaluation runs/demo --data data/demo
    python -m avlm.evaluation runs/asr --data clean=test.jsonl --metrics wer,cer --step best
    python -m avlm.evaluation llava-hf/llava-1.5-7b-hf runs/tuned --data vqav2=/data/vqav2 --limit 500
    python -m avlm.evaluation served --engine transformers --data data/demo --out scores

A model is a run of train.py, a checkpoint, an export, or a Hugging Face folder or Hub name, prompted as generate.py
does it. Several are put side by side in one table. A set is a .json or .jsonl file or an Energon folder under any name,
or a folder with the files of a public set under its name (avlm/evaluation/public_sets.py), which brings its questions
and metrics: vqav2, librispeech, valor32k.

Writes report.json, report.md, report.html and every answer into the folder of a run; those of another model into a
folder of its own there, or into --out. comparison.md has the table of several models.

With --engine an export is also answered by transformers or llama.cpp, side by side with ours: answers that differ by
more than rounding are an error (docs/serving.md).
"""

import argparse
from pathlib import Path

from avlm.evaluation.scores import NAMES, check_names
from avlm.process.exit import run_command

ENGINES = ("transformers", "llama_cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=SOURCE", help="a set, or a folder of sets"
    )
    parser.add_argument("--metrics", metavar="NAME,NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results; needed if no model is a run")
    parser.add_argument("--step", default="latest", help="which checkpoint of runs: a step, best or latest")
    parser.add_argument("--limit", type=int, help="samples of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="upper bound of an answer's tokens")
    parser.add_argument("--engine", choices=ENGINES, help="that answers as well, from the folder of an export")
    parser.add_argument("--no-ablations", action="store_true", help="leave out the answers without a modality")
    arguments = parser.parse_args()
    if arguments.metrics is not None:
        arguments.metrics = [name.strip() for name in arguments.metrics.split(",")]
        check_names(arguments.metrics, "--metrics")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves no samples")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    from avlm.evaluation.results import Asked  # torch takes seconds, and --help needs none
    from avlm.evaluation.sets import find_sets
    from avlm.evaluation.side_by_side import evaluate_all, find_candidates

    sets = find_sets(arguments.data)
    candidates = find_candidates(arguments.models, arguments.step, arguments.out, arguments.engine)
    asked = Asked(arguments.metrics, arguments.limit, arguments.max_new_tokens, not arguments.no_ablations)
    evaluate_all(candidates, sets, asked, arguments.out, arguments.engine)


if __name__ == "__main__":
    run_command(main)
