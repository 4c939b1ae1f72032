"""generate.py on several ranks answers as one process does."""

import contextlib
import dataclasses
import io
import json
import sys

import pytest

import generate as command
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.evaluation.sharded import most_tensor_ranks
from avlm.weights.export import export
from avlm.weights.load import open_model
from tests.data.small_files import image_file, photo, tone
from tests.models.handmade import build
from tests.models.test_avlm import DECODER
from tests.parallel.small import GEMMA
from tests.parallel.spawn import run_ranks


def printed(*arguments: str) -> str:
    """What generate.py prints on this rank."""
    sys.argv = ["generate.py", *arguments, "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.main()
    return out.getvalue()


@pytest.fixture
def asked(exported, tmp_path):
    """The arguments of two prompts with media, and of one that is streamed."""
    (tmp_path / "a.png").write_bytes(image_file(photo(40, 30)))
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    media = ["--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / "a.wav"), "--max-new-tokens", "5"]
    drawn = ["--temperature", "1", "--seed", "3"]
    return [
        [str(exported), *media, *drawn, "--json", "--prompt", "what", "--prompt", "<audio>and<image>"],
        [str(exported), *media, "--prompt", "well?"],
    ]


@pytest.mark.parametrize("num_ranks", [2, 3], ids=["tensor parallel", "sharded weights"])
def test_answers_are_those_of_one_process_and_the_first_rank_prints_them(asked, num_ranks):
    batch, streamed = asked
    assert most_tensor_ranks(open_model(batch[0]).config, num_ranks) == (2 if num_ranks == 2 else 1)
    expected = [json.loads(line) for line in printed(*batch).splitlines()]
    first, *others = run_ranks(printed, num_ranks, *batch)
    found = [json.loads(line) for line in first.splitlines()]
    assert [each["token_ids"] for each in found] == [each["token_ids"] for each in expected]
    for each, of_one in zip(found, expected):
        assert each["logprobs"] == pytest.approx(of_one["logprobs"], abs=1e-5)
    assert others == [""] * (num_ranks - 1)
    assert run_ranks(printed, num_ranks, *streamed)[0] == printed(*streamed)


def test_capped_logits_of_prompts_that_look_ahead_are_those_of_one_process(tokenizer_folder, tmp_path):
    decoder = dataclasses.replace(DECODER, vocab_size=260, **{**GEMMA, "bidirectional": "prefix"})
    config = ModelConfig(decoder=decoder)
    data = DataConfig(train="", tokenizer=str(tokenizer_folder), template="chatml")
    export(config, build(config).state_dict(), tmp_path / "out", data=data)
    asked = [str(tmp_path / "out"), "--max-new-tokens", "6", "--json", "--prompt", "what", "--prompt", "and where?"]
    expected = [json.loads(line) for line in printed(*asked).splitlines()]
    found = [json.loads(line) for line in run_ranks(printed, 2, *asked)[0].splitlines()]
    assert len(expected) == 2
    for each, of_one in zip(found, expected, strict=True):
        assert each["token_ids"] == of_one["token_ids"]
        assert each["logprobs"] == pytest.approx(of_one["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "a chat runs in one process"), (["--prompt", "a", "--dtype", "float16"], "float16 is for one process")],
)
def test_what_several_ranks_cannot_do_is_one_line(exported, monkeypatch, arguments, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        printed(str(exported), *arguments)
