"""A tokenizer of one's own, from records and texts to a config that trains with it."""

import json
import re

import pytest

from avlm.data.sample import SampleEncoder, parse
from avlm.data.text.templates import TEMPLATES
from avlm.data.text.tokenizer import Tokenizer
from avlm.data.tokenizer import main
from avlm.process.exit import run_command
from tests.data.small_files import data, model


@pytest.fixture
def files(tmp_path):
    records = [
        {"image": "not_there.png", "text": "a red kite over a red roof"},
        {"query": "who?", "response": "a kite"},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 3))
    (tmp_path / "more.txt").write_text("überall kites, überall roofs\n" * 3)
    return [str(tmp_path / "own.jsonl"), str(tmp_path / "more.txt")]


@pytest.mark.parametrize("template", [name for name, known in TEMPLATES.items() if not known.single])
def test_a_tokenizer_is_trained_for_every_template_and_read_by_a_config(files, template, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    main([*files, "--vocab-size", "330", "--out", str(folder), "--template", template])
    said = capsys.readouterr().out
    assert f"data.tokenizer={folder} data.template={template} model.decoder.vocab_size=" in said
    tokenizer = Tokenizer(folder)
    assert tokenizer.size == int(re.search(r"size=(\d+)", said)[1]) <= 330
    assert len(tokenizer.encode(" kite")) == 1 and tokenizer.find("<image>") is None
    for text in ("überall", "漢字 \U0001f600\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    sample = parse({"query": "who?", "response": "a kite"}, None, "k")
    own = SampleEncoder(model(), data(folder, template=template), tokenizer).encode(sample)
    as_jinja = SampleEncoder(model(), data(folder, template="tokenizer"), tokenizer).encode(sample)
    assert own.token_T.tolist() == as_jinja.token_T.tolist() and own.target_T.tolist() == as_jinja.target_T.tolist()
    assert tokenizer.id_of(tokenizer.eos) in own.target_T.tolist()


def test_mistakes_are_told_in_one_line(files, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "tokenizer.json").touch()
    for arguments, message in (
        ([files[0], "--vocab-size", "100", "--out", "x"], "a vocabulary of 100 tokens has no room .*: give 259"),
        (["a.csv", "--vocab-size", "300", "--out", "x"], r"a\.csv is no \.txt, \.json or \.jsonl file"),
        (["gone.txt", "--vocab-size", "300", "--out", "x"], r"no text file gone\.txt"),
        ([str(tmp_path / "bad.jsonl"), "--vocab-size", "300", "--out", "x"], r"bad\.jsonl:1: the record has image"),
        ([files[0], "--vocab-size", "300", "--out", str(tmp_path / "held")], "holds a tokenizer already"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_command(lambda given=arguments: main(given))
        assert re.match(f"error: .*{message}.*\n$", capsys.readouterr().err)
