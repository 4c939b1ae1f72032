"""The table of an evaluation: every set whole, with modalities taken away, against chance."""

import math
from typing import Any

ABLATIONS = {
    "no_image": ("no_video", "no_image"),
    "no_audio": ("no_audio",),
    "shuffled": ("no_order",),
}  # -> chance.json


def bound(chance: float, count: int) -> float:
    """The share that a guesser with this chance does not exceed in 95 of 100 sets of this size (exact binomial)."""
    if not 0 < chance < 1:
        return chance
    below, right = 0.0, -1
    while below < 0.95 and right < count:
        right += 1
        wrong = count - right
        log_ways = math.lgamma(count + 1) - math.lgamma(right + 1) - math.lgamma(wrong + 1)
        below += math.exp(log_ways + right * math.log(chance) + wrong * math.log1p(-chance))
    return right / count


def table(results: list[dict[str, Any]]) -> str:
    """The report as Markdown; an ablation above its bound is marked. All results have the same first metric."""
    first = results[0]["metric"]
    others = list(dict.fromkeys(name for result in results for name in result["metrics"] if name != first))
    heads = ["task", "set", "samples", words(first), *ABLATIONS, *map(words, others)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for result in results:
        cells = [result["task"], result["set"], str(result["count"]), f"**{100 * result['value']:.1f} %**"]
        for key in ABLATIONS:
            cells.append(_ablation_cell(result, key))
        values = result["metrics"]
        cells += [f"{100 * values[name]:.1f} %" if name in values else "" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(results: list[dict[str, Any]]) -> str:
    """report.md: the table, how to read it, and the first examples of every set."""
    lines = [
        f"# Held-out samples\n\n{table(results)}",
        f"{words(results[0]['metric']).capitalize()} of greedy answers. The columns to its right take away what",
        "pictures show, what is heard or the order of frames. Chance is the best that anyone could do without it who",
        "knew this very set; (!) marks what lies above the one-sided 95 % bound of chance.\n",
        "| set | question | truth | answer |\n|---|---|---|---|",
    ]
    for result in results:
        for example in result["examples"][:3]:
            cells = [f"{result['task']}/{result['set']}", *(example[key] for key in ("question", "truth", "answer"))]
            lines.append("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _ablation_cell(result: dict[str, Any], key: str) -> str:
    if key not in result["ablations"]:
        return ""
    value, chance = result["ablations"][key], result["ablation_chances"][key]
    if chance is None:
        return f"{100 * value:.1f} %"
    flag = " (!)" if value > bound(chance, result["count"]) else ""
    return f"{100 * value:.1f} % (chance {100 * chance:.1f} %){flag}"


def words(metric: str) -> str:
    return metric.replace("_", " ")
