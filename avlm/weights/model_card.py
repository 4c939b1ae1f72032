"""The model card of an export, its README.md: what was trained on what, how well it does, and how it is loaded.

Numbers are those of the run's config, marker, metrics.jsonl and report.json. A card is made to be published:
absolute paths, and links other than the Hub's, are cut to their last two parts. It claims no license.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from avlm.config.model import TOWERS, ModelConfig
from avlm.config.run import Config, StageConfig, hf_name, is_hf, shares
from avlm.families import door
from avlm.models.freezing import parts_of, trained_names
from avlm.models.shapes import parameter_shapes
from avlm.storage.hub import may_be_on_hub
from avlm.storage.model_folder import read_json
from avlm.storage.run_folder import Progress, Record, read_records
from avlm.storage.weight_files import local
from avlm.weights import served

NAME = "README.md"
SHORT = {"no_image": "without images", "no_audio": "without audio", "shuffled": "frames shuffled"}


OF_MEDIA = {
    "image": ("image", 'Image.new("RGB", (224, 224), "red")  # or Image.open("a.png")'),
    "audio": (
        "audio",
        'numpy.zeros(16_000, numpy.float32)  # a second at 16 kHz; or librosa.load("a.wav", sr=16_000)[0]',
    ),
}
WITH_MEDIA = """\
IMPORTS
from transformers import CLASS, AutoProcessor

name = "FOLDER"  # this folder, or its name on the Hub
processor = AutoProcessor.from_pretrained(nameTRUST)
model = CLASS.from_pretrained(name, dtype="auto"TRUST)
FILES
content = [
PARTS
    {"type": "text", "text": "What is this?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
OF_TEXT = """\
from transformers import CLASS, AutoTokenizer

name = "FOLDER"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = CLASS.from_pretrained(name, dtype="auto")
messages = [{"role": "user", "content": "What is this?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
OF_OURS = """\
from avlm import load

model = load("FOLDER")
print(model.answer("What is this?"FILES))"""


def write_card(config: Config, progress: Progress, run: Path, folder: Path, format: str) -> None:
    """Into ``folder``, an export of the checkpoint of a run where ``progress`` stands."""
    media = _media(config, format)
    held = config.model
    if format in door.TEXT_FORMATS:
        held = ModelConfig(decoder=held.decoder)
    held = dataclasses.replace(held, lora=None)  # adapters are merged
    records = [record for record in read_records(run / "metrics.jsonl") if record["step"] <= progress.step]
    sections = [
        f"---\n{yaml.safe_dump(_header(config, format, media), sort_keys=False)}---\n\n# {folder.resolve().name}",
        _opening(held, media),
        _parts(held),
        _training(config, progress, records),
        _scores(run, progress.step, records),
        _use(format, folder.resolve(), config, media),
        _limits(format, config, media),
    ]
    text = "\n\n".join(section for section in sections if section)
    (folder / NAME).write_text(f"{text}\n", encoding="utf-8")


def _media(config: Config, format: str) -> list[str]:
    """The kinds of media that prompts of an export take, of image, audio and video."""
    model, data = config.model, config.stages[-1].data
    if format == served.FORMAT:
        kinds = served.tokens(served.choose(model, data), model, data)
    elif format in door.FORMATS:
        kinds = door.FORMATS[format].MEDIA
    else:
        kinds = {"image": model.vision, "audio": model.audio, "video": model.vision and format == "avlm"}
        kinds = {kind: tower for kind, tower in kinds.items() if tower}
    return [kind for kind in ("image", "audio", "video") if kind in kinds]


def _header(config: Config, format: str, media: list[str]) -> dict[str, Any]:
    """What the Hub reads. It has no task for what sees and hears: the others are tags."""
    is_theirs = format == served.FORMAT or (format in door.FORMATS and door.FORMATS[format].CLASS)
    tasks = [f"{kind}-text-to-text" for kind in media] or ["text-generation"]
    header = {"library_name": "transformers" if is_theirs else "avlm", "pipeline_tag": tasks[0]}
    header["tags"] = ["avlm", *tasks[1:], *(["gguf"] if format == "gguf" else [])]
    has_towers = format not in door.TEXT_FORMATS
    initial = [(entry, name) for entry, name in _initial(config) if has_towers or entry not in TOWERS.values()]
    bases = dict.fromkeys(name for _, name in initial if _is_on_hub(name))
    if bases:
        header["base_model"] = list(bases)
    sources = dict.fromkeys(source for stage in config.stages for source in shares(stage.data.train))
    sets = [hf_name(source) for source in sources if is_hf(source) and _is_on_hub(hf_name(source))]
    if sets:
        header["datasets"] = list(dict.fromkeys(sets))
    return header


def _is_on_hub(name: str) -> bool:
    """Whether a name is the Hub's, and not that of a folder that is no longer here, such as runs/base."""
    return may_be_on_hub(name) and not local(name).exists() and not local(name).parent.exists()


def _initial(config: Config) -> list[tuple[str, str]]:
    """(entry of init_from, source) of those that are given."""
    named = {entry: getattr(config.init_from, entry) for entry in ("all", "decoder", "vision", "audio", "adapter")}
    return [(entry, name) for entry, name in named.items() if name is not None]


def published(source: str) -> str:
    """A data source or a model as a card names it."""
    if is_hf(source):
        source = hf_name(source)
    path = PurePosixPath(source)
    if "://" in source or path.is_absolute() or path.parts[:1] == ("~",) or ".." in path.parts:
        return "/".join(("…", *path.parts[-2:]))
    return source


def _opening(model: ModelConfig, media: list[str]) -> str:
    kinds = {"image": "images", "audio": "audio", "video": "videos"}
    listed = [kinds[kind] for kind in media] + ["text"]
    takes = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
    return (
        f"A language model that takes {takes}, and answers with text: a decoder of the Llama family"
        f"{' with towers' if model.modalities else ''}, trained with AVLM."
    )


def _parts(model: ModelConfig) -> str:
    counts = dict.fromkeys(model.modules, 0)
    for name, shape in parameter_shapes(model).items():
        counts[name.split(".")[0]] += math.prod(shape)
    rows = [[f"`{module}`", _sizes(model, module), f"{count:,}"] for module, count in counts.items()]
    return _table(["part", "", "parameters"], [*rows, ["together", "", f"{sum(counts.values()):,}"]])


def _sizes(model: ModelConfig, module: str) -> str:
    decoder, vision, audio = model.decoder, model.vision, model.audio
    if module == "decoder":
        return (
            f"{decoder.num_layers} layers of width {decoder.hidden_size}, {decoder.num_heads} heads "
            f"({decoder.num_kv_heads} of keys and values), {decoder.vocab_size:,} tokens, "
            f"{decoder.max_position:,} positions"
        )
    if module == "vision":
        side = "images of any shape" if vision.any_grid else f"squares of {vision.image_size} pixels"
        layers = f"{vision.num_blocks} layers of width {vision.hidden_size}"
        return f"{layers}, {side} in patches of {vision.patch_size}"
    if module == "audio":
        window = f"windows of {audio.window_frames / 100:g} s" + " at most" * (audio.window == "true")
        layers = f"{audio.num_layers} layers of width {audio.hidden_size}"
        kind = {"whisper": "Whisper's encoder", "conformer": "Conformer blocks"}[audio.block]
        return f"{kind}, {layers}, {audio.num_mels} mels, {window}"
    if module == "text":
        return f"{model.text.num_layers} layers of width {model.text.hidden_size}, {model.text.vocab_size:,} tokens"
    if module == "contrastive":
        return f"embeddings of {model.contrastive.size} numbers, compared by {model.contrastive.loss}"
    if module == "cross":
        layers = f"{model.cross.num_blocks(decoder.num_layers)} layers of gated cross-attention"
        return f"{layers}, one before every {model.cross.every} of the decoder"
    if module == "codec":
        codec = model.codec
        return f"{codec.num_layers} layers of width {codec.hidden_size}, {codec.num_codebooks} codes for 80 ms"
    projector = getattr(model, module)
    n = projector.downsample
    if projector.resampler is not None:
        if projector.resampler.type == "conformer":
            return f"{projector.resampler.num_layers} Conformer blocks; `{projector.type}`"
        kind = {"qformer": "Q-Former", "perceiver": "Perceiver"}[projector.resampler.type]
        read = f"{projector.resampler.window} rows" if projector.resampler.window else "an item"
        layers = f"{projector.resampler.num_layers} layers, {projector.resampler.num_queries} queries for {read}"
        return f"{kind} of {layers}; `{projector.type}`"
    if module == "vision_projector":
        made_of = f"{n} x {n} patches" if n > 1 else "a patch"
    else:
        made_of = f"{1000 * n * audio.pool * audio.seconds_per_row:.3g} ms"
    return f"`{projector.type}`, a feature for {made_of}"


def _training(config: Config, progress: Progress, records: list[Record]) -> str:
    heads = ["stage", "trains", "steps", "tokens", "learned", "passes", "learning rate", "data"]
    stages = [_stage(config, i, progress, records) for i in range(progress.stage + 1)]
    named = [
        f"{entry if entry != 'all' else 'everything'} from `{published(name)}`" for entry, name in _initial(config)
    ]
    weights = f"{'; '.join(named)}; what these lack at random" if named else "random"
    return (
        f"## Training\n\n{_table(heads, stages)}\n\n"
        f"Step {progress.step:,} of {config.total_steps:,}, after {progress.read - progress.skipped:,.0f} samples in "
        f"packed rows of {config.stages[progress.stage].data.seq_length:,} tokens. Tokens include features of media; "
        f"learned are those with a loss. Initial weights: {weights}."
    )


def _stage(config: Config, i: int, progress: Progress, records: list[Record]) -> list[str]:
    """Of a stage that ran, as far as ``progress``."""
    stage: StageConfig = config.stages[i]
    done = stage.steps if i < progress.stage else progress.stage_step
    logged = [record for record in records if record["stage"] == stage.name and "tokens" in record]
    counts = ["", "", ""]
    if done and len(logged) == done:  # a run that continues another has only its own steps
        counts = [f"{sum(record[key] for record in logged):,.0f}" for key in ("tokens", "target_tokens")]
        counts.append(f"{logged[-1]['epoch']:.2f}" if "epoch" in logged[-1] else "")
    rates = stage.optimizer
    least = rates.lr / 10 if rates.min_lr is None else rates.min_lr
    trained = parts_of(trained_names(stage, config.model, parameter_shapes(config.model).keys()))
    drawn = shares(stage.data.train)
    data = [f"`{published(name)}`" for name in drawn]
    if len(drawn) > 1:
        data = [f"{source} ({100 * share:.3g} %)" for source, share in zip(data, drawn.values())]
    return [stage.name, ", ".join(trained), f"{done:,}", *counts, f"{rates.lr:g} to {least:g}", ", ".join(data)]


def _scores(run: Path, step: int, records: list[Record]) -> str:
    """Of this very step: those of others are not this model's."""
    sections = []
    validated = [record for record in records if any(key.startswith("val/") for key in record)]
    if validated and validated[-1]["step"] == step:
        found = {key.removeprefix("val/"): value for key, value in validated[-1].items() if key.startswith("val/")}
        rows = [[*key.rpartition("/")[::2], f"{value:.4g}"] for key, value in found.items()]
        sections.append(f"## Validation\n\n{_table(['set', 'metric', 'value'], rows)}")
    path = run / "report.json"
    report: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    if report.get("step") == step and report.get("results"):
        sections.append(_held_out(report["results"]))
    return "\n\n".join(sections) or "No scores of this step are among the files of its run."


def _held_out(results: list[dict[str, Any]]) -> str:
    taken_away = [name for name in SHORT if any(name in result["ablations"] for result in results)]
    rows = []
    for result in results:
        chance = result.get("chance")
        first = [result["name"], f"{result['count']:,}", *_score(result["metric"], result["value"])]
        first.append("" if chance is None else f"{100 * chance:.1f} %")
        for name in taken_away:
            value = result["ablations"].get(name)
            first.append("" if value is None else _score(result["metric"], value)[1])
        rows.append(first)
        for metric, value in result["metrics"].items():
            if metric != result["metric"]:
                rows.append(["", "", *_score(metric, value), *[""] * (1 + len(taken_away))])
    heads = ["set", "samples", "metric", "score", "chance", *(SHORT[name] for name in taken_away)]
    return (
        f"## Held-out samples\n\n{_table(heads, rows)}\n\nOf greedy answers of the run's own checkpoint. Chance is the "
        "best score of someone who knows the set but neither sees nor hears."
    )


def _score(metric: str, value: float) -> list[str]:
    return [metric, f"{100 * value:.1f}" if metric == "cider" else f"{100 * value:.1f} %"]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _use(format: str, folder: Path, config: Config, media: list[str]) -> str:
    """How it is loaded, in lines that run as they stand next to the folder."""
    name = folder.name
    if format == "gguf":
        projectors = f" --mmproj {name}/mmproj.gguf" if media else ""
        files = {"image": " --image a.png", "audio": " --audio a.wav"}
        given = "".join(files[kind] for kind in media if kind in files)
        command = "llama-mtmd-cli" if media else "llama-cli"
        return f'## Use\n\n```sh\n{command} --jinja -m {name}/model.gguf{projectors}{given} -p "What is this?"\n```'
    has_code = format == served.FORMAT
    network = "AutoModelForMultimodalLM" if has_code else getattr(door.FORMATS.get(format), "CLASS", None)
    if network is None:
        files = "".join(
            f', {kind}="a.{ending}"' for kind, ending in [("image", "png"), ("audio", "wav")] if kind in media
        )
        code = OF_OURS.replace("FILES", files)
    elif not media or format == "voxtral":  # whose processor reads Mistral's own tokenizers alone
        code = OF_TEXT
    else:
        shown = [kind for kind in OF_MEDIA if kind in media]
        imports = {"image": "from PIL import Image", "audio": "import numpy"}
        code = WITH_MEDIA.replace("IMPORTS", "\n".join(imports[kind] for kind in reversed(shown)))
        code = code.replace("FILES", "".join(f"\n{OF_MEDIA[kind][0]} = {OF_MEDIA[kind][1]}" for kind in shown))
        code = code.replace("PARTS", "\n".join(f'    {{"type": "{kind}", "{kind}": {kind}}},' for kind in shown))
        code = code.replace("TRUST", ", trust_remote_code=True" * has_code)
    code = code.replace("CLASS", str(network)).replace("FOLDER", name)
    return f"## Use\n\n```python\n{code}\n```" + (f"\n\n{_trust(config, folder)}" if has_code else "")


def _trust(config: Config, folder: Path) -> str:
    """What a user of the format with code of its own allows."""
    base = served.choose(config.model, config.stages[-1].data).family.CLASS
    lines = sum(len((folder / name).read_text(encoding="utf-8").splitlines()) for name in served.CODE)
    return (
        f"`trust_remote_code=True` runs two files of this folder with your rights, `{'` and `'.join(served.CODE)}`: "
        f"{lines} lines that subclass transformers' `{base}` and import nothing but contextlib, math, numpy, torch "
        "and transformers. Read them first, and give `revision=` the commit that you read. vLLM "
        "(`--trust-remote-code`) runs them too."
    )


def _limits(format: str, config: Config, media: list[str]) -> str:
    """What a format does differently, or does not do."""
    data, model = config.stages[-1].data, config.model
    base = served.choose(model, data).base if format == served.FORMAT else format
    found = [
        f"Prompts of more than {data.seq_length:,} tokens, media included, are longer than any row it learned from."
    ]
    if model.modalities and not media:
        found.append("The towers were left out: this is the decoder alone, which learned next to them.")
    if format == "voxtral":
        found.append("VoxtralProcessor reads Mistral's own tokenizers alone: write `[AUDIO]` once for each feature.")
    if "image" in media and "video" not in media:
        why = served.video_obstacle(data) if base == "llava" and format == served.FORMAT else "its class has none"
        found.append(f"It takes no videos: {why}.")
    if "audio" in media and format not in ("avlm", "gguf"):
        found.append("Audio is samples at 16 kHz: resample other rates first.")
        if "video" in media and base not in door.WITHIN:
            found.append("Of videos only frames are read: their audio has to be given as audio.")
    if base == "smolvlm":
        found.append("A prompt takes images or videos, not both.")
    if base in ("idefics3", "smolvlm"):
        found.append("With torchvision before 0.27, images are resized by Pillow, which differs by a level of 255.")
    if base == "qwen2_5_vl":
        found.append("transformers cuts the seconds between frames of a video to whole ones.")
    return "## Limits\n\n" + "\n".join(f"- {each}" for each in found)
