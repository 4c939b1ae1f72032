"""What different ways of training make of the demo's model, in one table:

    python tests/measurements/demo_variants.py [--only NAME ...] [--out runs/variants]   (after make demo)

All but the full finetune, which is `make demo` itself, are runs of train.py with overrides of configs/demo.yaml. Those
that finetune start from the demo's aligned towers, those of fewer modalities from its language stage (text: from
nothing). Then avlm.evaluation asks for the held-out answers. A cell is the share of right ones.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # before tests/, whose folders are named like ours

import torch

from avlm.config.load import load_config
from avlm.models import freezing
from avlm.models.avlm import AVLM

ROOT = Path(__file__).parents[2]
DEMO = "runs/demo"
LANGUAGE, ALIGNED = 200, 550  # steps at the ends of the demo's stages
SETS = (
    "caption/test",
    "video/test",
    "transcribe/test_human",
    "transcribe/test_synthetic",
    "joint/test_same",
    "text/test",
)
PROJECTORS = "vision_projector, audio_projector"
FINETUNE = "optimizer: {{lr: 1.5e-3, warmup_steps: 50}}, data: {{train: data/demo/finetune.yaml}}, train: [{}]"
NO_VISION, NO_AUDIO = (
    [f"model.{tower}=null", f"model.{tower}_projector=null", "data.video.audio=false"] for tower in ("vision", "audio")
)


def stages(steps: int, keys: str) -> str:
    return f"stages=[{{name: finetune, steps: {steps}, {keys}}}]"


VARIANTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "full finetune": ([], SETS),
    "LoRA (rank 16) and projectors": (
        [
            f"init_from.all={DEMO}/checkpoints/step_{ALIGNED:08}",
            "model.lora={rank: 16, alpha: 32}",
            stages(410, FINETUNE.format(f"lora, {PROJECTORS}")),
        ],
        SETS,
    ),
    "frozen decoder": (
        [
            f"init_from.all={DEMO}/checkpoints/step_{ALIGNED:08}",
            stages(410, FINETUNE.format(f"vision, audio, {PROJECTORS}")),
        ],
        SETS,
    ),
    "vision only": (
        [
            f"init_from.decoder={DEMO}/checkpoints/step_{LANGUAGE:08}",
            *NO_AUDIO,
            stages(400, "data: {train: data/demo/vision.yaml}, train: [decoder, vision, vision_projector]"),
        ],
        ("caption/test",),
    ),
    "audio only": (
        [
            f"init_from.decoder={DEMO}/checkpoints/step_{LANGUAGE:08}",
            *NO_VISION,
            # With the decoder trained from the start it learns what answers look like, and not to listen.
            "stages=[{name: audio_alignment, steps: 180, data: {train: data/demo/audio.yaml}, "
            "train: [audio, audio_projector]}, {name: finetune, steps: 120, data: {train: data/demo/audio.yaml}, "
            "train: [decoder, audio, audio_projector], optimizer: {lr: 1.5e-3}}]",
        ],
        ("transcribe/test_human", "transcribe/test_synthetic"),
    ),
    "text only": (
        [*NO_AUDIO, *NO_VISION, stages(300, "data: {train: data/demo/language.yaml}, train: [decoder]")],
        ("text/test",),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [f"| | trained parameters | {' | '.join(SETS)} |", "|---" * (2 + len(SETS)) + "|"]
    for name in options.only:
        overrides, sets = VARIANTS[name]
        run = options.out / name.partition(" (")[0].replace(" ", "_") if overrides else Path(DEMO)
        overrides = [*overrides, f"output_dir={run}"]
        if run != Path(DEMO):
            launch("train.py", "configs/demo.yaml", *overrides)
            launch("-m", "avlm.evaluation", str(run), *(f"--data={each}=data/demo/{each}" for each in sets))
        found = {f"{row['task']}/{row['set']}": row["value"] for row in report(run)}
        cells = [f"{100 * found[each]:.0f} %" if each in found else "" for each in SETS]
        lines.append(f"| {name} | {trained(overrides):,} | {' | '.join(cells)} |")
        print("\n".join(lines), flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")


def launch(*command: str) -> None:
    ranks = str(min(2, torch.cuda.device_count()) or 2)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, *command], check=True, cwd=ROOT
    )


def report(run: Path) -> list[dict]:
    return json.loads((ROOT / run / "report.json").read_text())["results"]


def trained(overrides: list[str]) -> int:
    config = load_config(ROOT / "configs/demo.yaml", overrides)
    with torch.device("meta"):
        model = AVLM(config.model)
    freezing.freeze(model, config.stages[-1])
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
