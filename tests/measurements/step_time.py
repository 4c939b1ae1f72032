"""How long a step takes on paper, for any config, layout and GPU (``avlm.preflight.step_time``).

    python -m tests.measurements.step_time CONFIG [section.key=value ...] --world-size 64 --gpu h100
    python -m tests.measurements.step_time --table

The first prints a line for each stage of a run; --images, --windows, --documents and --targets say what a row holds.
The second prints the table of docs/clusters.md: AVLM-8B, its last stage, on 8, 64 and 512 H100s, and a row of
1,048,576 tokens over 64 of them. It needs no model: sizes are those of tests/config/hub.

Bytes and FLOPs follow from the code. Rates are assumptions (``avlm/preflight/rates.py``): nothing has run on a GPU.
"""

import argparse
import os
from pathlib import Path

from avlm.config.run import Config, StageConfig
from avlm.preflight.described_step import Row, equal_documents, typical_row
from avlm.preflight.rates import GPUS
from avlm.preflight.step_time import StepTime, estimate
from avlm.weights.model_from import open_config

HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(__file__).parents[1] / "config" / "hub")}
COLUMNS = {  # part of a step -> its head in the table
    **{"products": "products", "attention": "attention", "elementwise": "elementw.", "copies": "copies"},
    **{"tensor exchange": "tensor", "expert exchange": "experts", "exposed communication": "exposed"},
    "optimizer": "AdamW",
}
MILLION = 1 << 20
MIX = (8192, 7, 2, 8, 1000)
ONE = (MILLION, 1000, 300, 1, 22_000)
EAGER = ("train.compile=false",)
CONTEXT = ("parallel.context=64", *EAGER)
SHORT, PLAIN = "1M: 500 documents", "64 rows of 16k, FSDP"
# Of the table: name, GPUs, settings, and of a row its tokens, images, windows of audio, documents and targets.
LAYOUTS = [
    ("FSDP", 8, (), MIX),
    ("FSDP, not compiled", 8, EAGER, MIX),
    ("FSDP", 64, (), MIX),
    ("8 copies of 8 shards", 64, ("parallel.replicate=8",), MIX),
    ("FSDP", 512, (), MIX),
    ("64 copies of 8 shards", 512, ("parallel.replicate=64",), MIX),
    ("tensor 8", 8, ("parallel.tensor=8",), MIX),
    ("context 8 (Ulysses)", 8, ("parallel.context=8",), MIX),
    ("tensor 8, FSDP 8", 64, ("parallel.tensor=8",), MIX),
    ("context 8, FSDP 64", 512, ("parallel.context=8",), MIX),
    ("rows of 131k, context 8", 64, ("parallel.context=8", *EAGER), (131_072, 112, 32, 4, 16_000)),
    ("1M: one document", 64, CONTEXT, ONE),
    ("1M: one document, full recompute", 64, (*CONTEXT, "train.recompute.decoder=full"), ONE),
    ("1M: one document, ring alone", 64, (*CONTEXT, "parallel.context_mode=ring"), ONE),
    ("1M: 64 documents", 64, CONTEXT, (MILLION, 1000, 300, 64, 22_000)),
    (SHORT, 64, CONTEXT, (MILLION, 1000, 300, 500, 22_000)),
    (PLAIN, 64, EAGER, (16_384, 15, 5, 8, 350)),
]


def line(name: str, world_size: int, found: StepTime) -> str:
    assert found.parts.keys() == COLUMNS.keys(), "the table shows all of a step"
    parts = [*(found.parts[column] for column in COLUMNS), found.host, found.row]
    cells = [f"{1e3 * seconds:,.0f}" for seconds in parts]
    sent = sum(found.sent.values()) / 1e9
    cells += [f"{found.seconds:.2f} s", f"{found.tokens / found.seconds / 1e3:,.0f}k", f"{100 * found.mfu:.0f} %"]
    cells += [f"{found.memory / 2**30:.1f}", f"{sent:.0f}", f"{found.save:.1f}", found.wall]
    return f"| {' | '.join([name, str(world_size), *cells])} |"


def header() -> str:
    ends = ["step", "tokens/s", "MFU", "GiB", "GB sent", "save, s", "first wall"]
    cells = ["milliseconds", "GPUs", *COLUMNS.values(), "host", "row", *ends]
    return "| " + " | ".join(cells) + " |\n|" + "---|" * len(cells)


def print_table() -> None:
    os.environ |= HUB
    seconds = {}
    print(header())
    for name, world_size, overrides, (tokens, images, windows, documents, targets) in LAYOUTS:
        sizes = [f"data.seq_length={tokens}", f"model.decoder.max_position={tokens}"]
        sizes += ["device=cuda", "train.rows_per_step=null"]
        config = open_config("configs/avlm_8b.yaml", [*sizes, *overrides])
        row = Row(equal_documents(tokens, documents), {"image": images, "audio": windows}, targets)
        found = estimate(config, config.stages[-1], world_size, GPUS["h100"], row)
        seconds[name] = found.seconds
        print(line(name, world_size, found))
    ratio = seconds[SHORT] / seconds[PLAIN]
    print(f"\na row of 500 documents over 64 ranks takes {ratio:.2f} x as long as 64 plain rows of 16k")


def row_of(arguments: argparse.Namespace, config: Config, stage: StageConfig) -> Row:
    """What the command says; the rest as in a typical row."""
    row = typical_row(stage.data, config.model)
    given = {"image": arguments.images, "audio": arguments.windows}
    items = {name: number if given[name] is None else given[name] for name, number in row.items.items()}
    documents = row.documents
    if arguments.documents is not None:
        documents = equal_documents(stage.data.seq_length, arguments.documents)
    return Row(documents, items, row.targets if arguments.targets is None else arguments.targets)


def main() -> None:
    parser = argparse.ArgumentParser(description="The time of a training step on paper.")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--table", action="store_true", help="the table of docs/clusters.md")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    for name in ("images", "windows", "documents", "targets"):
        parser.add_argument(f"--{name}", type=int, help="of a packed row")
    arguments = parser.parse_intermixed_args()
    if arguments.table == (arguments.config is not None):
        parser.error("give a config, or --table")
    if arguments.table:
        print_table()
        return
    config = open_config(arguments.config, arguments.overrides)
    print(header())
    for stage in config.stages:
        row = row_of(arguments, config, stage)
        found = estimate(config, stage, arguments.world_size, GPUS[arguments.gpu], row)
        print(line(stage.name, arguments.world_size, found))
    print("Rates are assumptions (avlm/preflight/rates.py): nothing has run on a GPU.")


if __name__ == "__main__":
    main()
