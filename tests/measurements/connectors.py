"""Four ways from a tower to the decoder, trained alike on the demo's photos and speech, in one table:

    python tests/measurements/connectors.py [--only NAME ...] [--steps N] [--out runs/connectors]

A projector, a Q-Former, a Perceiver and layers of cross-attention of about as many parameters, each after the same
language stage: the towers are aligned, then everything is finetuned, as in configs/demo.yaml with fewer steps. Runs
that are there already are continued or reused. A cell of a task is the share of right held-out answers. Rows of 1,024
tokens hold more or fewer samples, by the rows that media take; learned tokens, FLOPs and the time of a step are
multiples of the projector's; times are those of short runs in turn.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # before tests/, whose folders are named like ours

from avlm.config.load import load_config
from avlm.config.model import ModelConfig
from avlm.models.shapes import parameter_shapes
from avlm.storage.run_folder import read_records
from tests.measurements.demo_variants import ROOT, launch, report

SETS = ("caption/test", "transcribe/test_human", "joint/test_same")
LANGUAGE = 200  # steps
QFORMER = "type: qformer, num_layers: 2, hidden_size: 96, num_heads: 4, num_queries: 4, intermediate_size: 96"
PERCEIVER = "type: perceiver, num_layers: 2, num_heads: 4, num_queries: 4, activation: relu"
CONNECTORS = {
    "projector": [
        "model.vision_projector={downsample: 2, hidden_size: 288}",
        "model.audio_projector={downsample: 6, hidden_size: 288}",
    ],
    "Q-Former": [
        f"model.vision_projector={{type: linear, resampler: {{{QFORMER}}}}}",
        f"model.audio_projector={{type: linear, resampler: {{{QFORMER}, window: 24}}}}",
    ],
    "Perceiver": [
        f"model.vision_projector={{type: linear, resampler: {{{PERCEIVER}, intermediate_size: 288}}}}",
        f"model.audio_projector={{type: linear, resampler: {{{PERCEIVER}, intermediate_size: 128, window: 24}}}}",
    ],
    "cross-attention": [
        "model.cross={every: 2}",
        "model.vision_projector={type: linear}",
        "model.audio_projector={type: linear, downsample: 4}",
    ],
}
GATES = {
    "cross-attention, gates from 1": ["model.cross={every: 2, first_gate: 1.0}", *CONNECTORS["cross-attention"][1:]]
}
ALL = CONNECTORS | GATES
ROUNDS, TIMED = 3, 10  # of all connectors in turn; steps of the finetune, of which the second half counts


def stages(name: str, steps: int) -> str:
    """``steps``: of the finetune; the towers are aligned in 0.4 and 0.5 times as many."""
    cross = ", cross" if name.startswith("cross-attention") else ""
    aligned = [
        f"{{name: {tower}_alignment, steps: {int(share * steps)}, train: [{tower}, {tower}_projector{cross}], "
        f"data: {{train: data/demo/{tower}.yaml}}}}"
        for tower, share in (("vision", 0.4), ("audio", 0.5))
    ]
    finetune = (
        f"{{name: finetune, steps: {steps}, train: [decoder, vision, audio, vision_projector, audio_projector{cross}], "
        "optimizer: {lr: 1.5e-3, warmup_steps: 50}}"
    )
    return f"stages=[{', '.join([*aligned, finetune])}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ALL), choices=list(ALL), metavar="NAME")
    parser.add_argument("--steps", type=int, default=240, help="of the finetune")
    parser.add_argument("--out", type=Path, default=Path("runs/connectors"))
    parser.add_argument("--limit", type=int, default=400, help="samples of each set")
    options = parser.parse_args()
    language = options.out / "language"
    words = (
        f"stages=[{{name: language, steps: {LANGUAGE}, train: [decoder], data: {{train: data/demo/language.yaml}}}}]"
    )
    rows = []
    for name in options.only:
        launch("train.py", "configs/demo.yaml", words, f"output_dir={language}")
        run = options.out / name
        overrides = [*ALL[name], stages(name, options.steps), f"output_dir={run}"]
        overrides.append(f"init_from.decoder={language}")
        launch("train.py", "configs/demo.yaml", *overrides)
        asked = [f"--data={each}=data/demo/{each}" for each in SETS]
        launch("-m", "avlm.evaluation", str(run), *asked, "--no-ablations", f"--limit={options.limit}")
        rows.append(row_of(name, run, load_config(ROOT / "configs/demo.yaml", overrides).model))
    for row, seconds in zip(rows, step_times(options.only, options.out)):
        row["seconds"] = seconds
    print(table(rows))
    (options.out / "table.md").write_text(table(rows) + "\n")


def row_of(name: str, run: Path, model: ModelConfig) -> dict[str, Any]:
    records = read_records(ROOT / run / "metrics.jsonl")
    finetune = [record for record in records if record.get("stage") == "finetune" and "step_seconds" in record]
    found = {f"{row['task']}/{row['set']}": row["value"] for row in report(run)}
    tokens = [model.tokens_of("vision", (4, 4)), model.tokens_of("audio", 100)]
    features = [model.features_of("vision", (4, 4)), model.features_of("audio", 100)]
    return {
        "connector": name,
        **{each: f"{100 * found[each]:.0f} %" for each in SETS},
        "parameters": sum(
            count for path, count in sizes(model).items() if path.split(".")[0] not in ("decoder", "vision", "audio")
        ),
        "rows of a photo": shown(tokens[0], features[0]),
        "rows of a second of speech": shown(tokens[1], features[1]),
        "targets": statistics.mean(record["target_tokens"] for record in finetune),
        "FLOPs": statistics.mean(sum(value for key, value in record.items() if "flops/" in key) for record in finetune),
    }


def step_times(names: list[str], out: Path) -> list[float]:
    """Seconds of a step of the finetune, the best median of some short runs in turn: a machine is never quiet."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names:
            run = out / f"time_{number}" / name
            launch(
                "train.py", "configs/demo.yaml", *ALL[name], stages(name, TIMED), f"output_dir={run}", "resume=never"
            )
            records = [record for record in read_records(ROOT / run / "metrics.jsonl") if "step_seconds" in record]
            found[name].append(statistics.median(record["step_seconds"] for record in records[-TIMED // 2 :]))
    return [min(seconds) for seconds in found.values()]


def sizes(model: ModelConfig) -> dict[str, int]:
    counts = {}
    for path, shape in parameter_shapes(model).items():
        counts[path] = 1
        for size in shape:
            counts[path] *= size
    return counts


def shown(tokens: int, features: int) -> str:
    return str(tokens) if tokens == features else f"{tokens} ({features} features)"


def table(rows: list[dict[str, Any]]) -> str:
    """FLOPs and time as multiples of the first row's."""
    first = rows[0]
    titles = ["connector", *(each.partition("/")[0] for each in SETS), "parameters"]
    titles += ["learned tokens of a step", "FLOPs of a step", "time of a step"]
    titles += ["rows of a photo", "rows of a second of speech"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["connector"], *(row[each] for each in SETS), f"{row['parameters']:,}"]
        cells += [f"{row[key] / first[key]:.2f}" for key in ("targets", "FLOPs", "seconds")]
        cells += [row["rows of a photo"], row["rows of a second of speech"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
