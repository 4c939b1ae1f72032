"""An exported folder where nothing of ours is installed: transformers, torch and what its processor needs."""

import re
import subprocess
import sys
import tempfile

import pytest
import torch

from avlm.data.packing import pack
from avlm.evaluation.generation import generate
from tests.training.test_train import ROOT
from tests.weights.served_models import CLIPS, IMAGES, MODELS, of_family, sample, served

NEEDED = ("torch", "torchvision", "transformers", "pillow")
ASKED = "one <image> and <audio> two?"
SCRIPT = """\
import importlib.util, sys, wave
import numpy, torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

assert all(importlib.util.find_spec(name) is None for name in ("avlm", "kernels", "einops", "av"))
folder, asked = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with wave.open("a.wav") as file:
    assert file.getframerate() == 16_000
    clip = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16).astype(numpy.float32) / 32768
text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False)
made = {"images": [Image.open("a.png").convert("RGB")], "audio": [clip], "add_special_tokens": False}
inputs = processor(text=[text], **made, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0]
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
torch.save({"ids": inputs["input_ids"][0], "logits": logits, "answer": ids}, folder + ".pt")
"""


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with the pinned versions of NEEDED: 5 GB, which are removed again."""
    lock = (ROOT / "requirements.lock").read_text()
    pins = [re.search(rf"^{name}==[\w.]+", lock, re.MULTILINE)[0] for name in NEEDED]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        tried = subprocess.run(
            [*pip, "download", "--no-deps", "--dest", f"{folder}/wheels", pins[-1]], capture_output=True, text=True
        )
        if tried.returncode:
            pytest.skip(f"{pins[-1]} cannot be downloaded: {tried.stderr.strip().splitlines()[-1]}")
        subprocess.run([*pip, "install", "--quiet", *pins], check=True)
        yield f"{folder}/bin/python"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_environment_without_us_gives_our_ids_logits_and_answers(name, python, tmp_path):
    config, options = (MODELS["swiglu"], {}) if name == "llava" else of_family(name)[:2]
    model, encoder, engine = served(config, tmp_path, **options)
    (tmp_path / "a.png").write_bytes(IMAGES[1])  # the first is turned by its EXIF
    (tmp_path / "a.wav").write_bytes(CLIPS[1])
    command = [python, "-I", "-c", SCRIPT, "out", ASKED]  # -I: no folder of ours is looked into
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    theirs = torch.load(tmp_path / "out.pt")

    each = sample(ASKED, images=IMAGES[1:2], audios=CLIPS[1:2])
    prompt = encoder.prompt(each.messages[:-1], each.images, each.audios)
    assert len(prompt) == len(theirs["ids"]) and ((theirs["ids"] == prompt.token_T) | (prompt.token_T < 0)).all()
    with torch.no_grad():
        x_TD = model.hidden(pack([prompt], len(prompt), model.config))
        ours = model.decoder.head(model.decoder.norm(x_TD), None)
    torch.testing.assert_close(theirs["logits"][:, : ours.shape[1]], ours, atol=1e-4, rtol=1e-4)
    [answer] = generate(model, [prompt], stop_ids=engine.stop_ids, max_new_tokens=8)
    assert theirs["answer"].tolist() == answer.token_ids
