"""llama.cpp as an engine. tests/measurements/served_by_llama_cpp.py compares its answers where it is installed."""

import dataclasses
import sys

import pytest

from avlm.config.run import DataConfig
from avlm.data.sample import Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.evaluation.llama_cpp_engine import Engine
from avlm.weights.export import export
from avlm.weights.folder import stop_ids
from avlm.weights.gguf import spelled_markers
from tests.data.small_files import image_file, photo, tone, write_tokenizer
from tests.models.handmade import build
from tests.weights.test_gguf import ULTRAVOX, WHOLE

MARKERS = {"image": ["<s>", ""], "audio": ["<|start_header_id|>", "<|end_header_id|>"]}


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"pip install llama-cpp-python==0\.3\.36"):
        Engine(tmp_path, DataConfig(train="x"), WHOLE)


def test_a_prompt_spells_out_the_markers_that_llama_cpp_does_not_put_itself():
    data = DataConfig(train="x", markers=MARKERS)
    assert spelled_markers(WHOLE, data) == {"image": ["<s>", ""]}
    assert spelled_markers(dataclasses.replace(WHOLE, audio_projector=ULTRAVOX), data) == MARKERS


def test_answers_to_text_images_and_audio_are_ours(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    folder = write_tokenizer(tmp_path / "tokenizer")
    data = DataConfig(train="x", tokenizer=str(folder), template="chatml", markers=MARKERS)
    model = build(WHOLE)
    export(WHOLE, model.state_dict(), tmp_path / "out", "gguf", data=data, type="f32")
    encoder = SampleEncoder(WHOLE, data, Tokenizer(folder))
    turns = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
    image, sound = image_file(photo(32, 32)), tone(2.0)
    samples = [
        Sample("text", turns("hello <|im_end|> world")),
        Sample("image", turns("<image>what is this?"), images=[image]),
        Sample("audio", turns("listen: <audio> what?"), audios=[sound]),
        Sample("both", turns("<image><audio>one <image>"), images=[image, image], audios=[sound]),
    ]
    prompts = [encoder.prompt(each.messages[:-1], each.images, each.audios, []) for each in samples]
    engine = Engine(tmp_path / "out", data, WHOLE)
    ends = stop_ids(tmp_path / "out")
    for sample, answer, ours in zip(samples, engine.answer(samples, 8), generate(model, prompts, stop_ids=ends)):
        expected = [token for token in ours.token_ids if token not in ends]
        assert answer[:1] == expected[:1], sample.key  # random weights: further on two may be equally likely
    with pytest.raises(ValueError, match="video: the engine llama_cpp answers no questions about videos"):
        engine.answer([Sample("video", turns("<video>"), videos=[b""])], 1)
    with pytest.raises(ValueError, match=r"broken: llama\.cpp cannot read a file"):
        engine.answer([Sample("broken", turns("<image>"), images=[b"no image"])], 1)
