"""The report of a run as one page that needs no network, report.html.

It shows the curves, every set against chance, and answers with their images, sounds and videos, the wrong ones first.
Media are encoded again and small; a set shows at most ANSWERS answers, and the media of all together take at most
MEDIA_BYTES, so the page stays below about 40 MB.
"""

import html
import json
import math
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from avlm.config.load import load_config
from avlm.config.run import DataConfig
from avlm.data.media.browser import SMALL_IMAGE, audio_uri, data_uri, image_uri, video_uri
from avlm.data.sample import Sample
from avlm.data.text.pieces import TAG
from avlm.evaluation.report import ABLATIONS, bound, percent, shown, words
from avlm.evaluation.scores import LOWER_IS_BETTER
from avlm.evaluation.sets import open_set
from avlm.storage.model_folder import read_json
from avlm.training.curves import panel_images, smoothing
from avlm.weights.load import open_model

ANSWERS = 24  # of a set
RIGHT = 6  # of them that are right, if there are as many
MEDIA_BYTES = 24 * 10**6  # as base64, shared evenly by the sets
TEMPLATE = Path(__file__).with_suffix(".html")
MOST_CIDER = 10 - 1e-6  # that of a caption equal to its references, but for rounding
WITHOUT = {"no_image": "images grey", "no_audio": "sound silent", "shuffled": "frames in random order"}
EXPLANATION = """
<p class="faint">The score is that of greedy answers. The columns to its right ask the same questions with something
taken away: all images grey, all sound silent, or the frames of a video in random order. Chance is the best score of
someone who knows the set but lacks just that. A model that looks and listens falls to chance; where it stays
<span class="flag">above</span> (more than 95 of 100 guessers would reach), the set can be answered without.</p>
"""


def write_page(run: Path) -> Path:
    """Write RUN/report.html from report.json, the predictions that it names and metrics.jsonl. ValueError or
    FileNotFoundError without a report."""
    if not (run / "report.json").is_file():
        raise FileNotFoundError(
            f"{run} holds no report.json: python -m avlm.evaluation {run} --data NAME=SET writes it"
        )
    report = read_json(run / "report.json")
    results = report["results"]
    if not all({"name", "source", "predictions", "kinds"} <= result.keys() for result in results):
        raise ValueError(f"{run / 'report.json'} is of an earlier version: evaluate the run again")
    data = _data(run, report)
    made = report["model"] if report["step"] is None else f"step {report['step']:,}"
    made += f", {report['engine']}" if "engine" in report else ""
    cards = []
    for result in results:
        cards += _cards(run, result, data, MEDIA_BYTES // len(results))
    page = string.Template(TEMPLATE.read_text()).substitute(
        title=html.escape(run.resolve().name),
        subtitle=f"{html.escape(made)}, {sum(result['count'] for result in results):,} held-out samples",
        curves=_curves(run),
        explanation=EXPLANATION,
        table=_table(results),
        bounds=f"Up to {ANSWERS} of each set, the wrong ones first. All answers are in "
        f"<code>{html.escape(str(run / 'predictions'))}</code>.",
        options="\n".join(f"<option>{_name(result)}</option>" for result in results),
        gallery="\n".join(cards),
    )
    (run / "report.html").write_text(page)
    return run / "report.html"


def _data(run: Path, report: dict[str, Any]) -> DataConfig:
    """How the media of the samples are read: by the run, or by the model whose results the folder holds."""
    config = run / "config.yaml"
    return load_config(config).stages[-1].data if config.is_file() else open_model(report["model"]).data


def _name(result: dict[str, Any]) -> str:
    return html.escape(f"{result['task']}/{result['set']}")


def _curves(run: Path) -> str:
    """The first panels of the run's curves; "" for a folder that was not trained here."""
    if not (run / "metrics.jsonl").is_file():
        return ""
    images = [f'<img alt="curves" src="{data_uri(image, "image/png")}">' for image in panel_images(run)]
    heading = f'<h2>Curves</h2>\n<p class="faint">{smoothing().capitalize()}.</p>'
    return f'{heading}\n<div class="curves">{"".join(images)}</div>'


def _table(results: list[dict[str, Any]]) -> str:
    """A row for each set, and one for each kind of samples in it if there are several."""
    firsts = list(dict.fromkeys(result["metric"] for result in results))
    ablations = [ablation for ablation in ABLATIONS if any(ablation in result["ablations"] for result in results)]
    others: dict[str, None] = {}
    for result in results:
        others |= dict.fromkeys(list(result["metrics"])[1:])
    heads = [
        "set",
        "samples",
        " or ".join(map(words, firsts)),
        *(WITHOUT[ablation] for ablation in ablations),
        *map(words, others),
    ]
    lines = [_row("th", heads)]
    for result in results:
        name = f'<a href="#answers" data-set="{_name(result)}">{_name(result)}</a>'
        unit = f" {words(result['metric'])}" if len(firsts) > 1 else ""
        for part in [result, *result["kinds"]]:
            cells = [name if part is result else f"... {part['kind']}", f"{part['count']:,}"]
            score = shown(result["metric"], part["value"]) + unit
            cells.append(_with_chance(score, result["chance"] if part is result else None, _bar(result, part["value"])))
            for ablation in ablations:
                cells.append(_ablation_cell(part, ablation, result["metric"]))
            for metric in others:
                value = part["metrics"].get(metric)
                cells.append("" if value is None or metric == result["metric"] else shown(metric, value))
            lines.append(_row("td", cells))
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"


def _bar(result: dict[str, Any], value: float) -> str:
    if result["metric"] in LOWER_IS_BETTER:
        return ""
    return f'<span class="bar"><i style="width: {min(100, round(100 * value))}%"></i></span>'


def _with_chance(score: str, chance: float | None, before: str = "", flag: str = "") -> str:
    below = "" if chance is None else f'<br><span class="faint">chance {percent(chance)}</span>'
    return f"{before}{score}{flag}{below}"


def _ablation_cell(part: dict[str, Any], ablation: str, metric: str) -> str:
    if ablation not in part["ablations"]:
        return ""
    value, chance = part["ablations"][ablation], part["ablation_chances"][ablation]
    count = part["ablation_counts"][ablation]
    is_above = chance is not None and value > bound(chance, count)
    of = "" if count == part["count"] else f" of {count:,}"
    return _with_chance(shown(metric, value) + of, chance, flag=' <span class="flag">above</span>' if is_above else "")


def _cards(run: Path, result: dict[str, Any], data: DataConfig, media_bytes: int) -> list[str]:
    """A card for each answer of a set that is shown, the worst first. Media stop after ``media_bytes``."""
    metric = result["metric"]
    lines = [json.loads(line) for line in (run / result["predictions"]).read_text().splitlines()]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    lines.sort(key=lambda line: math.inf if line[metric] is None else sign * line[metric])
    wrong = [line for line in lines if _is_wrong(line, metric)]
    right = [line for line in lines if not _is_wrong(line, metric)]
    chosen = [*wrong[: ANSWERS - min(RIGHT, len(right))], *right][:ANSWERS]
    samples, missing = _samples(result, data, {line["key"] for line in chosen})
    cards = []
    for line in chosen:
        media = f'<p class="faint">{html.escape(missing)}</p>'
        if line["key"] in samples:
            media = "".join(_media(samples[line["key"]], data))
            media_bytes -= len(media)
            if media_bytes < 0:
                media = '<p class="faint">media left out: the page would become too large</p>'
        cards.append(_card(line, metric, _name(result), media))
    return cards


def _is_wrong(line: dict[str, Any], metric: str) -> bool:
    """Whether a better score was possible. That of an answer without a score is not known."""
    if line[metric] is None:
        return False
    if metric in LOWER_IS_BETTER:
        return line[metric] > 0
    return line[metric] < (MOST_CIDER if metric == "cider" else 1)


def _samples(result: dict[str, Any], data: DataConfig, keys: set[str]) -> tuple[dict[str, Sample], str]:
    """(the samples of a set by their keys, why some are not there). A set may have moved since it was evaluated."""
    found = {}
    source = result["source"]
    try:
        for sample in open_set(result["name"], source, data):
            if sample.key in keys:
                found[sample.key] = sample
            if len(found) == len(keys):
                break
    except (OSError, ValueError) as error:
        return found, f"{source} cannot be read: {error}"
    return found, f"{source} no longer holds this sample"


def _media(sample: Sample, data: DataConfig) -> Iterator[str]:
    for content in sample.images:
        yield _element(image_uri, content, data, '<img class="{kind}" alt="image" loading="lazy" src="{uri}">')
    for content in sample.videos:
        yield _element(
            video_uri, content, data, '<video class="{kind}" controls loop preload="metadata" src="{uri}"></video>'
        )
    for content in sample.audios:
        yield _element(audio_uri, content, data, '<audio controls preload="none" src="{uri}"></audio>')


def _element(encode: Callable[[bytes, DataConfig], str], content: bytes, data: DataConfig, form: str) -> str:
    try:
        uri = encode(content, data)
    except ValueError as error:
        return f'<p class="faint">{html.escape(str(error))}</p>'
    return form.format(uri=uri, kind="small" if uri.startswith(f"data:{SMALL_IMAGE}") else "")


def _card(line: dict[str, Any], metric: str, name: str, media: str) -> str:
    kind = "wrong" if _is_wrong(line, metric) else "right"
    value = "no score" if line[metric] is None else f"{words(metric)} {shown(metric, line[metric])}"
    if metric == "exact_match":
        value = kind
    texts = {
        "question": TAG.sub("", line["question"]).strip(),
        "truth": " / ".join(line["references"][:3]),
        "answer": line["prediction"],
    }
    rows = "".join(f'<dt>{key}</dt><dd class="{key}">{html.escape(text)}</dd>' for key, text in texts.items())
    return (
        f'<article class="{kind}" data-set="{name}"><div class="media">{media}</div><dl>{rows}</dl>'
        f'<div class="key">{html.escape(line["key"])} · {html.escape(value)}</div></article>'
    )
