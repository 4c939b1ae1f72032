"""The report of an evaluation: every set whole and with modalities taken away, against chance."""

import math
from typing import Any

# ablation -> the names that chance.json may have for it
ABLATIONS = {
    "no_image": ("no_video", "no_image"),
    "no_audio": ("no_audio",),
    "shuffled": ("no_order",),
}


def bound(chance: float, count: int) -> float:
    """The share of right answers that a guesser does not exceed in 95 of 100 sets of this size (exact binomial)."""
    if not 0 < chance < 1:
        return chance
    below = 0.0  # probability of at most ``right`` right answers
    right = -1
    while below < 0.95 and right < count:
        right += 1
        wrong = count - right
        log_ways = math.lgamma(count + 1) - math.lgamma(right + 1) - math.lgamma(wrong + 1)
        below += math.exp(log_ways + right * math.log(chance) + wrong * math.log1p(-chance))
    return right / count


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, a table for each first metric; an ablation above its bound is marked. A set of several
    kinds of samples has a row for each."""
    firsts = dict.fromkeys(result["metric"] for result in results)
    return "\n".join(_table_of([result for result in results if result["metric"] == first]) for first in firsts)


def _table_of(results: list[dict[str, Any]]) -> str:
    first = results[0]["metric"]
    others: dict[str, None] = {}
    for result in results:
        others |= dict.fromkeys(result["metrics"])
    others.pop(first, None)
    taken_away = [name for name in ABLATIONS if any(name in result["ablations"] for result in results)]
    heads = ["task", "set", "samples", words(first), *taken_away, *map(words, others)]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for result in results:
        for part in [result, *result["kinds"]]:
            kind = f", {part['kind']}" if "kind" in part else ""
            cells = [result["task"], f"{result['set']}{kind}", str(part["count"]), f"**{shown(first, part['value'])}**"]
            cells += [_ablation_cell(part, ablation, first) for ablation in taken_away]
            cells += [shown(name, part["metrics"][name]) if name in part["metrics"] else "" for name in others]
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def comparison(results: dict[str, list[dict[str, Any]]]) -> str:
    """Models side by side, as Markdown, of model -> its entries, all of the same sets. A row for each metric, and for
    the first one without each modality; if a set has several kinds of samples, each has its rows."""
    columns = list(results.values())
    lines = [_row(["set", "samples", "metric", *results]), "|---" * (3 + len(results)) + "|"]
    for entries in zip(*columns):
        name = f"{entries[0]['task']}/{entries[0]['set']}"
        parts = [(name, list(entries))]
        for i, kind in enumerate(entries[0]["kinds"]):
            parts.append((f"{name}, {kind['kind']}", [entry["kinds"][i] for entry in entries]))
        for label, of_models in parts:
            first = next(iter(of_models[0]["metrics"]))
            for metric in of_models[0]["metrics"]:
                values = [shown(metric, each["metrics"][metric]) for each in of_models]
                lines.append(_row([label, str(of_models[0]["count"]), words(metric), *values]))
            for ablation in ABLATIONS:
                if any(ablation in each["ablations"] for each in of_models):
                    lines.append(_ablated_row(label, of_models, ablation, first))
    return "\n".join(lines) + "\n"


def _ablated_row(label: str, of_models: list[dict[str, Any]], ablation: str, metric: str) -> str:
    """The number of samples is that of all models, or stands with each: not every model hears a video's sound."""
    counts = [each["ablation_counts"].get(ablation) for each in of_models]
    is_same = len(set(counts) - {None}) == 1
    values = []
    for each, count in zip(of_models, counts):
        of = "" if is_same else f" of {count}"
        values.append("" if count is None else shown(metric, each["ablations"][ablation]) + of)
    common = str(max(filter(None, counts))) if is_same else ""
    return _row([label, common, f"{words(metric)}, {ablation}", *values])


def report(results: list[dict[str, Any]]) -> str:
    """report.md: the table, how to read it, and the first examples of every set."""
    lines = [
        f"# Held-out samples\n\n{table(results)}",
        f"{words(results[0]['metric']).capitalize()} of greedy answers. The columns to its right take away what",
        "images show, what is heard, or the order of frames, from the samples that have it. Chance is the best score",
        "of someone who knows this very set but lacks that modality; (!) marks a value above the one-sided 95 % bound",
        "of chance.\n",
        "| set | question | truth | answer |\n|---|---|---|---|",
    ]
    for result in results:
        for example in result["examples"][:3]:
            cells = [f"{result['task']}/{result['set']}", example["question"], example["truth"], example["answer"]]
            lines.append(_row([cell.replace("\n", " ").replace("|", "\\|") for cell in cells]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shown(metric: str, value: float) -> str:
    """A share in percent. CIDEr is no share; papers give a hundred times its value too."""
    return f"{100 * value:.1f}" if metric == "cider" else percent(value)


def _ablation_cell(part: dict[str, Any], ablation: str, metric: str) -> str:
    if ablation not in part["ablations"]:
        return ""
    value, count = part["ablations"][ablation], part["ablation_counts"][ablation]
    chance = part["ablation_chances"][ablation]
    of = "" if count == part["count"] else f" of {count}"
    if chance is None:
        return f"{shown(metric, value)}{of}"
    flag = " (!)" if value > bound(chance, count) else ""
    return f"{shown(metric, value)}{of} (chance {percent(chance)}){flag}"


def words(metric: str) -> str:
    """As prose has it, where it does not look like a name; others as ``--metrics`` takes them."""
    return "exact match" if metric == "exact_match" else metric
