"""Trains a tokenizer on your own texts:

    python -m avlm.data.tokenizer FILE [FILE ...] --vocab-size 8192 --out DIR [--template chatml]

FILES are .json and .jsonl files of any form that training reads, whose turns are taken and whose media need not be
there, and .txt files. It is a byte-level BPE as in GPT-2 and Llama 3: any text can be written in it. It has the control
tokens of the template, which DIR also holds in Jinja. Train with data.tokenizer=DIR and the data.template and
model.decoder.vocab_size that the last line says.
"""

import argparse
from pathlib import Path

from avlm.process.exit import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.data.tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens, at most")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    parser.add_argument(
        "--template",
        choices=["chatml", "llama3", "llava", "mistral", "plain", "smolvlm"],
        default="chatml",
        help="default: %(default)s",
    )
    run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    from avlm.data.text.training import texts_of, train_tokenizer  # torch takes seconds, and --help needs none

    texts = [text for file in options.files for text in texts_of(file, options.template)]
    size = train_tokenizer(texts, options.vocab_size, options.template, options.out)
    settings = f"data.tokenizer={options.out} data.template={options.template} model.decoder.vocab_size={size}"
    print(f"wrote {options.out}, {size:,} tokens: {settings}")


if __name__ == "__main__":
    run_command(main)
