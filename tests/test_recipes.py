"""The pages of docs/recipes: their commands have the options that they use, and lead from data to an answer."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avlm.weights.model_from import open_config
from tests.training.test_train import ENVIRONMENT, ROOT
from tests.weights.test_export_prompts import LLAVA, exported

PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
STAGES = ("language", "vision_alignment", "audio_alignment", "finetune")
ONE_STEP_EACH = " ".join(f"stages.{name}.steps=1 stages.{name}.optimizer.warmup_steps=0" for name in STAGES)
HEREDOC = re.compile(r"<<'?END'?\n(.*?)^END$", re.M | re.S)


def script_of(page: Path) -> str:
    """The page's commands. What it shows as a text or as another command to adapt is in blocks of other kinds."""
    return "".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S))


def test_every_option_of_the_recipes_is_known_to_its_command():
    used: dict[str, set[str]] = {}
    for page in PAGES:
        commands = HEREDOC.sub("\n", script_of(page)).replace("\\\n", " ")
        for name, arguments in re.findall(r"\bpython (?:-m )?(avlm[\w.]*|\w+\.py)(.*)", commands):
            used.setdefault(name, set()).update(re.findall(r"--[\w-]+", arguments))
    assert {"train.py", "generate.py", "avlm.evaluation", "avlm.weights", "avlm.data.tokenizer"} <= used.keys()
    for name, options in used.items():
        command = [name] if name.endswith(".py") else ["-m", name]
        if name == "avlm.weights":
            command.append("export")
        result = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert options <= set(re.findall(r"--[\w-]+", result.stdout)), f"{name} of {options}\n{result.stderr}"


def test_the_configs_of_the_recipes_open_with_any_model_of_their_kind(tmp_path):
    exported(LLAVA, tmp_path / "llava", "llava", control=["<s>", "</s>"])
    opened = 0
    for page in PAGES:
        for text in HEREDOC.findall(script_of(page)):
            if not text.startswith(("output_dir:", "model:")):
                continue
            path = tmp_path / "mine.yaml"
            path.write_text(text)
            pretrained = "from" in yaml.safe_load(text)["model"]
            trained = ["lora", "vision_projector"]  # whatever the projector of the page's own model
            changes = [f"model.from={tmp_path / 'llava'}", f"stages.lora.train={trained}"] if pretrained else []
            assert open_config(path, changes).stages[-1].epochs, page.name
            opened += 1
    assert opened >= 3


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_recipe_runs_as_it_stands_with_one_epoch_for_several(page, tmp_path):
    """Its commands one after the other, in a folder that has nothing but the repository's own."""
    for name in ("avlm", "kernels", "train.py", "generate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    starters = sorted((tmp_path / "configs" / "starters").glob("*.yaml"))
    for path in starters:
        path.write_text(one_epoch(path.read_text()))
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}
    script = one_epoch(script_of(page))
    if "runs/demo" in script:
        script = f"python train.py configs/demo.yaml {ONE_STEP_EACH}\n{script}"
    command = ["bash", "-euc", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def one_epoch(text: str) -> str:
    return re.sub(r"\bepochs: \d+", "epochs: 1", text)
