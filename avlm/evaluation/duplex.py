"""Let a duplex model listen to recordings and speak at the same time:

    python -m avlm.evaluation.duplex RUN_OR_EXPORT CLIP.wav [CLIP.wav ...] [--json]

It walks the rows of 80 ms with a key/value cache: the input of a row is the embedding of the token that was said in the
row before, plus the row's audio feature. Prints each word with the time at which it is said.

The tower encodes whole windows (``model.audio.max_positions``), so a row is computed when its window has been heard and
may see up to the window's end: with windows of 400 ms at most 320 ms past its own end. Live, a word comes as much later
as its row lies before that end; ``heard by`` is the time of it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from avlm.process.exit import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.evaluation.duplex",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="an audio file")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="a record of each clip: audio and words")
    parser.add_argument("--codes", metavar="FOLDER", help="write the codes of speech: CLIP.npy, (codebooks, rows)")
    options = parser.parse_args(arguments)
    run(options)


def run(options: argparse.Namespace) -> None:
    from avlm.config.duplex import ROW_SECONDS  # torch takes seconds, and --help needs none
    from avlm.data.media.audio import SAMPLE_RATE, decode
    from avlm.evaluation.answering import load, read_media
    from avlm.evaluation.listening import walk, windows_of

    model = load(options.model, options.device, options.dtype)
    row_text, config = model.encoder.row_text, model.network.config
    if row_text is None:
        raise ValueError(f"{options.model} is no duplex model: it has no data.duplex; ask it by generate.py")
    seconds = config.audio.max_positions * config.audio.seconds_per_row
    if options.codes and config.codec is None:
        raise ValueError(f"--codes needs a model that says codes, and {options.model} has no model.codec")
    files = read_media(audio=options.clips)["audio"]
    for name, content in zip(options.clips, files):
        waveform = decode(content, model.encoder.data.max_audio_seconds, name)
        rows = list(walk(model.network, windows_of(waveform, model.network), row_text.pad))
        words = row_text.words([token for token, _ in rows])
        if options.codes:
            write_codes(Path(options.codes) / f"{Path(name).stem}.npy", [codes for _, codes in rows])
        if options.json:
            print(json.dumps({"audio": name, "words": words}, ensure_ascii=False))
            continue
        length = len(waveform) / SAMPLE_RATE
        print(f"{name}: {length:.2f} s, in windows of {seconds:g} s")
        for word in words:
            last = word.end - ROW_SECONDS / 2  # in the last row of the word
            heard = min((last // seconds + 1) * seconds, length)
            print(f"  {word.start:7.2f} s  {word.text}  (heard by {heard:.2f} s)")
        if not words:
            print("  nothing is said")


def write_codes(path: Path, codes: list[Any]) -> None:
    """int32 (K, T), as records have them."""
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    numpy.save(path, numpy.stack([row.numpy() for row in codes], axis=1).astype("int32"))


if __name__ == "__main__":
    run_command(main)
