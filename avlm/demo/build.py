"""Build the small real dataset of the demo: python -m avlm.demo.build [--out data/demo] [--seed 1]

    data/demo/
      caption/train, caption/test, ...   Energon datasets (crude WebDatasets), one folder per task and split
      .../test*/chance.json              what can be answered without a modality, see `chance`
      language.yaml  vision.yaml  audio.yaml  finetune.yaml      Energon blends, one for each stage of training
      tokenizer/                         byte-level BPE trained on the demo's texts, ChatML template
      recipe.json                        what the set was built from; written last

`avlm.demo.bank.tasks` composes the samples and says what is held out; bank/NOTICE says whose work they are.
"""

import argparse
import collections
import concurrent.futures
import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import uuid
from pathlib import Path

import yaml

from avlm.config.run import Config, shares
from avlm.data.text import training
from avlm.data.text.templates import jinja
from avlm.demo.bank.bank import FOLDER, load
from avlm.demo.bank.shards import write_shard
from avlm.storage import locks

SHARD_SIZE = 500  # samples
VOCABULARY_SIZE = 512  # at most; every word of every answer becomes a token of its own

# Samples of each task and split.  A test set whose size is a multiple of its cases is exactly balanced: 10 classes of
# photos, 100 strings, 6 or 54 pairs of thing and motion (times 10 digits), 10 pairs of digits, 180 and 100 cases of
# written and spoken digit.
SETS = {
    "caption": {"train": 9000, "test": 400},
    "numeral": {"train": 2500, "test": 390},
    "video": {"train": 3600, "test": 240, "test_seen": 216, "test_sound": 540},
    "two_pictures": {"train": 1500, "test": 200},
    "transcribe": {
        "train": 4000,
        **{"test_human": 100, "test_undocumented": 100, "test_synthetic": 200, "test_unheard": 100},
    },
    "two_sounds": {"train": 800, "test": 100},
    "joint": {"train": 3000, "test_same": 180, "test_sum": 200},
    "mixed": {"train": 1000, "test": 200},
    "text": {"train": 12000, "test": 200},
}

# Shares of the tasks in each stage.
BLENDS = {
    "language": {"text": 1},
    "vision": {"caption": 4, "numeral": 4, "two_pictures": 0.5},
    "audio": {"transcribe": 6, "two_sounds": 0.5},
    "finetune": {
        **{"caption": 1.5, "numeral": 1, "video": 4, "two_pictures": 0.3, "transcribe": 3, "two_sounds": 0.3},
        **{"joint": 3.5, "mixed": 0.4, "text": 0.6},
    },
}

CHAT_TEMPLATE = jinja("chatml", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    folder = build(arguments.out, arguments.seed)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB, {time.perf_counter() - start:.1f} s")


def build(out_dir: str | Path, seed: int = 1, sets: dict[str, dict[str, int]] = SETS) -> Path:
    """Build the set unless it is there. Many processes may call this at once: one builds, the others wait.

    Raises ValueError when `out_dir` holds something that is not a demo set; an older demo set is replaced.
    """
    out_dir = Path(out_dir)
    recipe = {"code": fingerprint(), "seed": seed, "sets": sets}
    if read_recipe(out_dir) == recipe:
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(out_dir.parent / f".{out_dir.name}.lock", "w") as lock:
        locks.lock(lock, wait=True)  # released when this process ends, whatever its workers do
        found = read_recipe(out_dir)
        if found == recipe:
            return out_dir
        if found is None and out_dir.exists() and any(out_dir.iterdir()):
            raise ValueError(f"{out_dir} is not empty and no demo set (it has no recipe.json): choose another folder")
        # Nobody else is building, so a folder of that name was left by a build that died.
        unfinished = out_dir.parent / f".{out_dir.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        fill(unfinished, seed, sets)
        (unfinished / "recipe.json").write_text(json.dumps(recipe, indent=2))
        shutil.rmtree(out_dir, ignore_errors=True)
        unfinished.rename(out_dir)
    return out_dir


def ensure(config: Config, folder: str = "data/demo") -> None:
    """Build the set if a stage reads from its folder and it is not there yet."""
    for stage in config.stages:
        data = stage.data
        if any(
            Path(source).is_relative_to(folder)
            for source in [*shares(data.train), data.tokenizer, *data.validation.values()]
        ):
            build(folder)


def fingerprint() -> str:
    """A hash of the code, the bank and the chat template. If it differs, samples may too, so the set is built again."""
    files = sorted(
        [Path(__file__), Path(training.__file__), *FOLDER.glob("*.py"), *FOLDER.glob("*.npz"), *FOLDER.glob("*.tar")]
    )
    content = [CHAT_TEMPLATE.encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"".join(content)).hexdigest()


def read_recipe(folder: Path) -> dict | None:
    path = folder / "recipe.json"
    return json.loads(path.read_text()) if path.is_file() else None


def fill(folder: Path, seed: int, sets: dict[str, dict[str, int]]) -> None:
    load()  # before the fork, so that the workers share it
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, die_with_parent) as pool:
        shards = {}
        for task, split in [(name, split) for name, splits in sets.items() for split in splits]:
            (folder / task / split).mkdir(parents=True)
            for number, start in enumerate(range(0, sets[task][split], SHARD_SIZE)):
                path = folder / task / split / f"shard_{number:03d}.tar"
                indices = range(start, min(start + SHARD_SIZE, sets[task][split]))
                job = pool.submit(write_shard, path, task, split, indices, seed)
                shards.setdefault((task, split), []).append(job)
        records = {name: [record for job in jobs for record in job.result()] for name, jobs in shards.items()}
        for _ in pool.map(prepare, [folder / task / split for task, split in records]):
            pass  # a failed worker raises here
    for (task, split), some in records.items():
        if split != "train":
            (folder / task / split / "chance.json").write_text(json.dumps(chance(some), indent=2))
    for stage, blend in BLENDS.items():
        (folder / f"{stage}.yaml").write_text(metadataset(blend, sets))
    training = [record for (_, split), some in records.items() if split == "train" for record in some]
    write_tokenizer(folder / "tokenizer", training)


def die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def prepare(folder: Path) -> None:
    """What `energon prepare` and its questions do.  A test folder is Energon's `val` and `test` at once."""
    from avlm.data.energon.prepare import index  # a second to import, and only for a build

    index(folder, [("train", ".*")] if folder.name == "train" else [("val", ".*"), ("test", ".*")])
    # Energon names each set at random; this name follows from the content.
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))).hexdigest()
    (folder / ".nv-meta" / "index.uuid").write_text(str(uuid.uuid5(uuid.NAMESPACE_OID, content)))


def chance(records: list[dict]) -> dict[str, float]:
    """The best share of right answers without a modality, for someone who knows this very test set.

    "blind" knows the kind of each question and its most frequent answer. "no_image" also knows all other facts (what is
    heard, say) and the most frequent answer that goes with them; "no_order" knows everything but the order of the
    frames. Without that modality nobody does better, except by luck.
    """
    modalities = sorted({modality for record in records for modality, _ in record["facts"]})
    hidden = {f"no_{name}": {name} for name in modalities} | {"blind": set(modalities)}
    if "video" in modalities:
        hidden["no_video"] = {"video", "order"}
    result = {"count": len(records)}
    for name, masked in sorted(hidden.items()):
        answers = collections.defaultdict(collections.Counter)
        for record in records:
            known = tuple(value for modality, value in record["facts"] if modality not in masked)
            answers[record["kind"], known][record["messages"][1]["content"]] += 1
        result[name] = round(sum(max(counter.values()) for counter in answers.values()) / len(records), 4)
    return result


def metadataset(blend: dict[str, float], sets: dict[str, dict[str, int]]) -> str:
    """Training draws from the train sets by weight; validation goes through all test sets of the same tasks."""
    tests = [f"{task}/{split}" for task in blend for split in sets.get(task, ()) if split != "train"]
    splits = {
        "train": {
            "blend": [{"weight": weight, "path": f"{task}/train"} for task, weight in blend.items() if task in sets]
        },
        "val": {"blend": [{"weight": 1, "path": path} for path in tests]},
    }
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    return yaml.safe_dump(header | {"splits": splits}, sort_keys=False)


def write_tokenizer(folder: Path, records: list[dict]) -> None:
    """Byte-level BPE trained on the words of the training samples, in the files of a Hugging Face tokenizer."""
    texts = [message["content"] for record in records for message in record["messages"]]
    texts = [re.sub(r"<(image|audio|video)>\n", "", text) for text in texts]
    training.train_tokenizer([*texts, *["user\n", "assistant\n"] * len(records)], VOCABULARY_SIZE, "chatml", folder)


if __name__ == "__main__":
    main()
