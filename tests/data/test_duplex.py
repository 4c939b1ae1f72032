"""Recordings with the agent's words: a token for each 80 ms, and which records and configs are refused."""

import dataclasses
import io
import json

import numpy
import pytest
import torch

from avlm.config.codec import CodecConfig
from avlm.config.connector import ResamplerConfig
from avlm.config.duplex import DuplexConfig, check_duplex
from avlm.data.duplex import RowText, Word
from avlm.data.energon.shards import parts_of
from avlm.data.inspect_row import _spans
from avlm.data.packing import pack
from avlm.data.sample import Sample, SampleEncoder, parse
from avlm.data.synthetic import parse_mix
from avlm.data.text.tokenizer import Tokenizer
from tests.data.small_files import AUDIO, CONTROL, data, model, tone, write_tokenizer

PADS = {"pad_token": "<pad>", "begin_token": "<begin>", "end_token": "<end>"}
HEADS = {"num_heads": 2, "num_kv_heads": 1}
SHORT = dataclasses.replace(AUDIO, num_mels=8, max_positions=20)  # windows of 400 ms


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), [*CONTROL, *PADS.values()]))


def duplex_model(audio=SHORT, downsample: int = 4, add: bool = True):
    config = model(vision=None, audio=audio, stack=downsample)
    return dataclasses.replace(config, audio_projector=dataclasses.replace(config.audio_projector, add=add))


def with_queries(config):
    queries = ResamplerConfig(type="qformer", num_queries=5, window=4, num_layers=1, num_heads=2, intermediate_size=8)
    projector = dataclasses.replace(config.audio_projector, resampler=queries)
    return dataclasses.replace(config, audio_projector=projector)


def encoder(tokenizer, duplex: dict | None = PADS, **changes) -> SampleEncoder:
    settings = data(tokenizer.file.parent, duplex=DuplexConfig(**duplex) if duplex else None, **changes)
    return SampleEncoder(duplex_model(add=bool(duplex)), settings, tokenizer)


def test_each_word_stands_in_the_rows_of_its_time(tokenizer):
    text = RowText(DuplexConfig(**PADS), tokenizer)
    words = [Word(0.85, 1.0, "one"), Word(1.0, 2.0, "two"), Word(5.0, 5.1, "three")]
    rows = text.rows(words, 80).tolist()
    ids = {word: tokenizer.encode(word, continues=True) for word in ("one", " two", "three")}
    found = [(row, token) for row, token in enumerate(rows) if token != text.pad]
    one = [text.begin, *ids["one"], *ids[" two"]]  # the second word waits for the tokens of the first
    wanted = list(enumerate(one, start=10)) + [(25, text.end)]  # 2.0 s is the end of the turn
    last = [text.begin, *ids["three"], text.end]  # its end has passed when its tokens are said
    assert found == wanted + list(enumerate(last, start=62))
    assert [word.text for word in text.words(rows)] == ["one", "two", "three"]
    assert text.words(rows)[0].start == pytest.approx(11 * 0.08)
    later = RowText(DuplexConfig(**PADS, delay=3), tokenizer).rows(words, 80).tolist()
    assert later == [text.pad] * 3 + rows[:-3]
    within = [Word(0.0, 3.2, "one"), Word(0.8, 1.0, "two")]  # a word within another one ends no turn
    assert text.rows(within, 80).tolist().index(text.end) == 40


def test_a_sample_hears_and_says_a_token_in_each_row(tokenizer):
    """The input of a row is what was said before it; each row has one feature; weights count in the loss."""
    encode = encoder(tokenizer, {**PADS, "weights": {"pad": 0.25, "begin": 2.0}}).encode
    text = encoder(tokenizer).row_text
    record = {"audio": "a.wav", "words": [[0.5, 0.8, "one"]]}
    sample = parse(record, lambda name: tone(2.0), "key")
    encoded = encode(sample)
    assert len(encoded) == 25
    assert torch.equal(encoded.token_T[1:], encoded.target_T[:-1]) and encoded.token_T[0] == text.pad
    spoken = ~torch.isin(encoded.target_T, torch.tensor([text.pad, text.begin]))
    wanted = torch.where(encoded.target_T == text.begin, 2.0, torch.where(spoken, 1.0, 0.25))
    assert torch.equal(encoded.factor_T, wanted)
    words = encoder(tokenizer).encode(Sample("text", [{"role": "user", "content": "hi"}, assistant("one")]))
    batch = pack([words, encoded, words], 100, duplex_model())
    assert batch.audio.rows.tolist() == list(range(len(words), len(words) + 25))
    learned = int((words.target_T >= 0).sum())
    assert batch.num_targets == pytest.approx(2 * learned + float(wanted.sum()))
    full = _spans(pack([encoded], 25, duplex_model()))  # the target of the last token stands in no row
    assert full == {"text": [(0, 1)], "learned": [(1, 24)]}
    silent = parse({"audio": "a.wav", "words": []}, lambda name: tone(0.5), "key")
    assert encode(silent).target_T.eq(text.pad).all()


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"audio": "a.wav", "words": [[1.9, 2.0, "one two three"]]}, "needs .* rows: add silence"),
        ({"audio": "a.wav", "words": None}, "words must be a list of .* has None"),
        ({"audio": "a.wav", "words": [[0.1, 0.2, "one"]] * 99 + [[1.0, 0.5, "two"]]}, r"has \[1\.0, 0\.5, 'two'\]"),
        ({"audio": "a.wav", "words": [[1.0, 1.1, "one"], [0.5, 0.6, "two"]]}, "'two' starts before 'one'"),
        ({"words": [[1.0, 1.1, "one"]]}, "the name of a file under audio"),
        ({"audio": "a.wav", "words": [], "speed": 2}, "'speed', which is not read"),
        (
            {"audio": "a.wav", "messages": [{"role": "user", "content": "<audio>"}, assistant("one")]},
            "recordings alone",
        ),
    ],
)
def test_other_records_are_refused_in_one_line(tokenizer, record, message):
    with pytest.raises(ValueError, match=message) as error:
        encoder(tokenizer).encode(parse(record, lambda name: tone(2.0), "key"))
    assert "\n" not in str(error.value)


def test_words_need_a_duplex_model(tokenizer):
    sample = parse(json.loads('{"audio": "a.wav", "words": [[1.0, 1.1, "one"]]}'), lambda name: tone(2.0), "key")
    with pytest.raises(ValueError, match=r"a model with data\.duplex reads"):
        encoder(tokenizer, None).encode(sample)
    for source in ("synthetic", "synthetic:clips=1"):
        with pytest.raises(ValueError, match=r"no words for data\.duplex: give synthetic:clips=0"):
            parse_mix(source, duplex_model())
    with pytest.raises(ValueError, match="<quiet>' is no control token"):
        encoder(tokenizer, {**PADS, "pad_token": "<quiet>"})


@pytest.mark.parametrize(
    "config, message",
    [
        (duplex_model(downsample=2), "downsample must be 4, not 2"),
        (duplex_model(dataclasses.replace(SHORT, max_positions=22)), "max_positions=22 is no multiple of the 4 rows"),
        (duplex_model(dataclasses.replace(SHORT, log_mel="clip")), "log_mel=window, not clip"),
        (duplex_model(dataclasses.replace(SHORT, window="fixed")), "window=true, not fixed"),
        (with_queries(duplex_model()), "only with type=conformer"),
        (duplex_model(add=False), r"set model\.audio_projector\.add=true"),
    ],
)
def test_a_model_must_hear_in_rows_of_80_ms(config, message):
    with pytest.raises(ValueError, match=message):
        check_duplex(DuplexConfig(**PADS), config)
    check_duplex(DuplexConfig(**PADS), duplex_model())
    with pytest.raises(ValueError, match=r"give data\.duplex its tokens"):
        check_duplex(None, duplex_model())


def test_codes_have_a_row_for_each_token(tokenizer):
    """K lists, or a .npy file; shapes and values are checked; the codes of the row before stand next to them."""
    codec = CodecConfig(num_codebooks=2, codebook_size=10, hidden_size=8, intermediate_size=8, num_layers=1, **HEADS)
    config = dataclasses.replace(duplex_model(), codec=codec)
    settings = data(tokenizer.file.parent, duplex=DuplexConfig(**PADS))
    encode = SampleEncoder(config, settings, tokenizer).encode
    codes = numpy.arange(50).reshape(2, 25) % 10
    file = io.BytesIO()
    numpy.save(file, codes)
    files = {"a.wav": tone(2.0), "a.npy": file.getvalue()}
    record = {"audio": "a.wav", "words": [[0.5, 0.8, "one"]]}
    listed, stored = (
        encode(parse({**record, "codes": given}, files.__getitem__, "key")) for given in (codes.tolist(), "a.npy")
    )
    assert torch.equal(listed.code_TK, torch.from_numpy(codes.T)) and torch.equal(stored.code_TK, listed.code_TK)
    batch = pack([stored, stored], 60, config)
    assert batch.codes.rows.tolist() == list(range(50))
    assert batch.codes.before_FK[25].tolist() == [10, 10]  # the second recording begins
    assert torch.equal(batch.codes.before_FK[26:], batch.codes.code_FK[25:-1])
    wrong = {"2 codebooks and 25 rows": codes[:, 1:].tolist(), r"lie in 0\.\.9": (codes + 1).tolist()}
    wrong |= {
        "not float64": (codes / 2).tolist(),
        "not of one length": [[1], [1, 2]],
        "has no codes": None,
        "NumPy's": "a.wav",
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            encode(parse({**record, "codes": given}, files.__getitem__, "key"))
    with pytest.raises(ValueError, match="the model has no codec"):
        encoder(tokenizer).encode(parse({**record, "codes": codes.tolist()}, files.__getitem__, "key"))
    sample = parse({**record, "codes": "a.npy"}, files.__getitem__, "key")
    record_of_shard, *_ = parts = parts_of(sample)
    again = parse(json.loads(parts[record_of_shard]), parts.__getitem__, "key")
    assert again == sample and again.codes == files["a.npy"]  # Megatron-Energon's shards hold them too
