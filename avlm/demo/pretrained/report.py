"""What the demo with pretrained towers learned, next to what its towers can do alone:

    python -m avlm.demo.pretrained.report runs/demo_pretrained

Reads the validation at the end of each stage and the evaluation after the last (report.json) from the run, and measures
two ceilings with transformers, from the same folders and on the same held-out samples: a linear classifier on CLIP's
features, fitted to the same training photos, and Whisper's own decoder, greedy. Writes RUN/pretrained.md.
"""

import argparse
import json
from pathlib import Path

import jiwer
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from whisper_normalizer.english import EnglishTextNormalizer

from avlm.data.media import audio
from avlm.process.exit import run_command

METRICS = {"caption": "exact_match", "speech": "wer", "speech_other": "wer"}  # set -> metric
HEADS = ("photos named right", "word error rate, same speaker", "word error rate, another speaker")
BATCH = 20  # photos

Values = dict[str, float]  # set -> value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/pretrained"))
    arguments = parser.parse_args()
    rows = read_stages(arguments.run) | read_evaluation(arguments.run)
    answers = read_answers(arguments.run)
    rows["ceiling: linear probe on CLIP; Whisper's own decoder"] = ceilings(arguments.data)
    text = story(rows, answers)
    (arguments.run / "pretrained.md").write_text(text)
    print(text)


def read_stages(run: Path) -> dict[str, Values]:
    """Label -> values at the end of each stage, from metrics.jsonl. A set that a stage did not measure keeps its value:
    nothing that it depends on was trained."""
    rows, known = {}, {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        found = {name: row[f"val/{name}/{metric}"] for name, metric in METRICS.items() if f"val/{name}/{metric}" in row}
        if found:
            rows[f"after {row['stage']}"] = known = known | found
    if not rows:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no validation yet: train to the end of a stage first")
    return rows


def read_evaluation(run: Path) -> dict[str, Values]:
    """The evaluation of the last checkpoint: speech, and speech with the audio removed."""
    path = run / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: python -m avlm.evaluation writes it (see the Makefile)")
    results = {result["task"]: result for result in json.loads(path.read_text())["results"]}
    return {
        "the end, evaluated again": {name: result["value"] for name, result in results.items()},
        "... with the audio removed": {name: result["ablations"]["no_audio"] for name, result in results.items()},
    }


def read_answers(run: Path) -> list[dict]:
    """The first answers to each set at the end of the run."""
    files = sorted(max((run / "predictions").iterdir()).glob("*.jsonl"))
    return [{"set": file.stem, **json.loads(line)} for file in files for line in file.read_text().splitlines()[:10]]


def ceilings(data: Path) -> Values:
    """What the towers reach without us; sets that are not there are left out."""
    found = {
        "caption": probe(data / "clip", *(read_jsonl(data / f"caption_{part}.jsonl") for part in ("train", "test")))
    }
    for name in ("speech", "speech_other"):
        if (path := data / f"{name}_test.jsonl").is_file():
            found[name] = whisper_word_errors(data / "whisper", read_jsonl(path))
    return found


def read_jsonl(path: Path) -> list[dict]:
    """Records, with their media as paths and their answers as texts."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"media": path.parent / (record.get("image") or record.get("audio")), "text": record["messages"][1]["content"]}
        for record in records
    ]


def probe(folder: Path, train: list[dict], test: list[dict]) -> float:
    """Share of test photos that logistic regression on CLIP's image embeddings, of length 1, names right."""
    classes = sorted({record["text"] for record in train})
    x_ND, x_MD = (embed(folder, records) for records in (train, test))
    y_N, y_M = (torch.tensor([classes.index(record["text"]) for record in records]) for records in (train, test))
    weight_DC = torch.zeros(x_ND.shape[1], len(classes), requires_grad=True)
    solver = torch.optim.LBFGS([weight_DC], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x_ND @ weight_DC, y_N) + 1e-5 * weight_DC.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return ((x_MD @ weight_DC).argmax(1) == y_M).float().mean().item()


@torch.no_grad()
def embed(folder: Path, records: list[dict]) -> Tensor:
    """float32 (photos, 512), each of length 1."""
    processor = CLIPImageProcessor.from_pretrained(folder)
    model = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    parts = []
    for start in range(0, len(records), BATCH):
        images = [Image.open(record["media"]).convert("RGB") for record in records[start : start + BATCH]]
        parts.append(model(**processor(images, return_tensors="pt")).image_embeds)
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def whisper_word_errors(folder: Path, records: list[dict]) -> float:
    """Word error rate of Whisper's own greedy transcripts, in Whisper's normal form as everywhere."""
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    heard = []
    for record in records:
        samples = audio.decode(record["media"].read_bytes(), max_seconds=30).numpy()
        features = extractor(samples, sampling_rate=audio.SAMPLE_RATE, return_tensors="pt").input_features
        ids = model.generate(features, do_sample=False)[0].tolist()
        heard.append(tokenizer.decode(ids, skip_special_tokens=True))
    normal = EnglishTextNormalizer()
    return jiwer.wer([normal(record["text"]) for record in records], [normal(text) for text in heard])


def story(rows: dict[str, Values], answers: list[dict]) -> str:
    """The report as Markdown."""
    lines = [
        "# Pretrained towers, aligned and tuned\n",
        "Held-out photos and sentences, greedy answers. Photos: exact match of the caption, ten classes. Word error",
        "rate: in Whisper's normal form; what the speaker of the training says was never heard in training.\n",
        f"| | {' | '.join(HEADS)} |\n|---|---|---|---|",
    ]
    for label, values in rows.items():
        cells = (f"{100 * values[name]:.1f} %" if name in values else "" for name in METRICS)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines.append("\n| set | truth | answer |\n|---|---|---|")
    for answer in answers:
        texts = (text.replace("\n", " ").replace("|", "/") for text in (answer["references"][0], answer["prediction"]))
        lines.append(f"| {answer['set']} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
