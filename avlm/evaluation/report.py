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
    """The results as a Markdown table; an ablation above its bound is marked. All share their first metric."""
    first = results[0]["metric"]
    others: dict[str, None] = {}
    for result in results:
        others |= dict.fromkeys(result["metrics"])
    others.pop(first, None)
    heads = ["task", "set", "samples", words(first), *ABLATIONS, *map(words, others)]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for result in results:
        cells = [result["task"], result["set"], str(result["count"]), f"**{percent(result['value'])}**"]
        for ablation in ABLATIONS:
            cells.append(_ablation_cell(result, ablation))
        for name in others:
            value = result["metrics"].get(name)
            cells.append("" if value is None else percent(value))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def report(results: list[dict[str, Any]]) -> str:
    """report.md: the table, how to read it, and the first examples of every set."""
    lines = [
        f"# Held-out samples\n\n{table(results)}",
        f"{words(results[0]['metric']).capitalize()} of greedy answers. The columns to its right take away what",
        "images show, what is heard, or the order of frames. Chance is the best score of someone who knows this very",
        "set but lacks that modality; (!) marks a value above the one-sided 95 % bound of chance.\n",
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


def _ablation_cell(result: dict[str, Any], ablation: str) -> str:
    if ablation not in result["ablations"]:
        return ""
    value = result["ablations"][ablation]
    chance = result["ablation_chances"][ablation]
    if chance is None:
        return percent(value)
    flag = " (!)" if value > bound(chance, result["count"]) else ""
    return f"{percent(value)} (chance {percent(chance)}){flag}"


def words(metric: str) -> str:
    return metric.replace("_", " ")
