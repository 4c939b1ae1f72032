"""Let generate.py answer questions about held-out samples: python -m avlm.demo.ask runs/demo

The images, clips and videos of the samples are written to <run>/samples: look, listen and ask something else.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from avlm.demo.bank.bank import load
from avlm.demo.bank.shards import encode
from avlm.demo.bank.tasks import compose
from avlm.process.exit import run_command

SAMPLES = (("caption", "test", 7), ("transcribe", "test_human", 31), ("joint", "test_sum", 84), ("video", "test", 25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run {run}: make demo trains one")
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for task, split, index in SAMPLES:
        record, media = compose(task, split, index, load())
        question, answer = (message["content"] for message in record["messages"])
        arguments = ["generate.py", str(run)]
        for name, content in media.items():
            path = folder / f"{task}_{name}"
            path.write_bytes(encode(content))
            arguments += ["--" + re.match("[a-z]+", name)[0], str(path)]  # image0.png -> --image
        arguments += ["--prompt", question.splitlines()[-1]]
        print(f"$ python {shlex.join(arguments)}", flush=True)
        subprocess.run([sys.executable, *arguments], check=True)
        print(f"(truth: {answer})\n", flush=True)


if __name__ == "__main__":
    run_command(main)
