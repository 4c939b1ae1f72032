"""The sets that models are evaluated on: from the command line's arguments to samples with references."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from avlm.config.run import DataConfig, may_be_there
from avlm.data.loader import open_samples
from avlm.data.sample import Sample
from avlm.evaluation.public_sets import public_set
from avlm.evaluation.scores import VQA_ANSWERS


def find_sets(given: list[str]) -> dict[str, str]:
    """name -> source, from arguments NAME=SOURCE; or a folder, which stands for all its test sets TASK/test*."""
    sets = {}
    for item in given:
        name, equals, source = item.partition("=")
        if equals:
            if not may_be_there(source):
                raise FileNotFoundError(f"--data {item}: there is no {source}")
            found = {name: source}
        else:
            folders = sorted(path.parent for path in Path(item).glob("*/test*/.nv-meta"))
            found = {f"{path.parent.name}/{path.name}": str(path) for path in folders}
        if not found:
            raise ValueError(f"--data {item}: give NAME=SOURCE, or a folder that holds TASK/test*/ sets")
        for name in found.keys() & sets.keys():
            raise ValueError(f"--data {item}: {name} is {sets[name]} already, give it another name")
        sets |= found
    return sets


def open_set(name: str, source: str, data: DataConfig) -> Iterator[Sample]:
    """The samples of a set, in order; by its name it may be a public one."""
    public = public_set(name, source)
    return public.read(Path(source), name.partition("/")[2]) if public else open_samples(source, data)


def read_set(source: str, data: DataConfig, metrics: list[str], limit: int | None, name: str = "") -> list[Sample]:
    """The first ``limit`` samples of a set, each with a question, its answer and the references that the metrics need.
    ValueError with the key of a sample that lacks one of these, and for an empty set."""
    if data.duplex is not None:
        raise ValueError(
            "a model with data.duplex answers no questions: set train.validate_answers=0, and let it listen by "
            "python -m avlm.evaluation.duplex MODEL CLIP"
        )
    samples = list(itertools.islice(open_set(name, source, data), limit))
    if not samples:
        raise ValueError(f"{source} holds no samples to evaluate")
    if "cider" in metrics and len(samples) == 1:
        raise ValueError(f"{source}: cider compares samples of a set with each other, and this is only one")
    for sample in samples:
        last = sample.messages[-2:]
        if [turn["role"] for turn in last] != ["user", "assistant"] or not isinstance(last[-1]["content"], str):
            raise ValueError(f"{source}, {sample.key}: its last two turns must be a user's and an assistant's text")
        if not sample.answers and not last[-1].get("learn", True):
            raise ValueError(
                f"{source}, {sample.key}: its last turn is marked as not to be learned, so it cannot be a reference"
            )
        if "vqa_accuracy" in metrics and len(sample.answers) != VQA_ANSWERS:
            raise ValueError(
                f'{source}, {sample.key}: vqa_accuracy needs {VQA_ANSWERS} texts under "answers", '
                f"one from each person asked, and there are {len(sample.answers) or 'none'}"
            )
    return samples


def references(sample: Sample) -> list[str]:
    return sample.answers or [sample.messages[-1]["content"].strip()]
