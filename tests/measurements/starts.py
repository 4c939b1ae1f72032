"""How long the parts of a start take:  python -m tests.measurements.starts [--records 665000]

random weights   a decoder of 8B without init_from: what one of 8 ranks draws, and what it would draw if each rank drew
                 all
json             a .json of so many records as LLaVA's are: opened as data.train is, and held whole by json.load; each
                 in a process of its own, whose largest memory is read
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.jsonl import Records
from avlm.models.avlm import AVLM
from avlm.models.initial import initial_values

RANKS = 8
LLAMA_8B = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8
)


def random_weights() -> None:
    with torch.device("meta"):
        model = AVLM(ModelConfig(decoder=LLAMA_8B))
    values = list(initial_values(model, seed=1))
    started = time.perf_counter()
    num_drawn = 0
    for _, value in values:
        rows = -(-value.shape[0] // RANKS)
        region = slice(0, rows), *(slice(None) for _ in value.shape[1:])
        num_drawn += value[region].numel()
    of_rank = time.perf_counter() - started
    _, largest = max(values, key=lambda named: named[1].shape.numel())
    started = time.perf_counter()
    largest.whole()
    rate = largest.shape.numel() / (time.perf_counter() - started)
    total = sum(value.shape.numel() for _, value in values)
    print(
        f"random weights: {total / 1e9:.1f}B numbers; a rank of {RANKS} holds {num_drawn / 1e9:.2f}B and takes "
        f"{of_rank:.1f} s, all numbers would take {total / rate:.1f} s"
    )


def write_records(file: Path, count: int) -> None:
    """Conversations of five questions, 1.6 KB each: LLaVA's 665,000 take 1.0 GB."""
    turn = [{"from": "human", "value": "What can be seen? " * 4}, {"from": "gpt", "value": "A street with a car. " * 9}]
    with file.open("w") as content:
        for number in range(count):
            record = {"id": f"{number:09d}", "image": f"coco/{number:012d}.jpg", "conversations": turn * 5}
            content.write(f"{',' if number else '['}\n{json.dumps(record)}")
        content.write("\n]\n")


def opened(file: Path) -> int:
    return len(Records(file, DataConfig(train=str(file))))


def loaded(file: Path) -> int:
    return len(json.loads(file.read_bytes()))


def measured(open_file, file: Path, results: multiprocessing.Queue) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    open_file(file)
    seconds = time.perf_counter() - started
    results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20))


def json_records(count: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.json")
        write_records(file, count)
        for open_file in (opened, loaded):
            results = spawn.Queue()
            process = spawn.Process(target=measured, args=(open_file, file, results))
            process.start()
            seconds, gib = results.get()
            process.join()
            print(
                f"json: {count:,} records, {file.stat().st_size / 1e9:.2f} GB, {open_file.__name__}: {seconds:.1f} s, "
                f"{gib:.2f} GiB"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=665_000)
    arguments = parser.parse_args()
    random_weights()
    json_records(arguments.records)
