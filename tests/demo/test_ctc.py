"""The start of the audio projector."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from avlm.config.decoder import DecoderConfig
from avlm.config.load import load_config, to_dict
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.data.text.tokenizer import Tokenizer
from avlm.demo.pretrained import ctc
from avlm.demo.pretrained.ctc import Row
from avlm.models.batch import Features
from kernels.segments import Segments
from tests.data.small_files import model as tiny
from tests.data.small_files import tone, write_tokenizer
from tests.models.handmade import build, loaded


def sing(frames_VC: torch.Tensor, count: int) -> Row:
    """Clips in which every token is three like frames and two or three of silence; two frames make a feature."""
    clips, answers = [], []
    for _ in range(count):
        answers.append(torch.randint(len(frames_VC), (int(torch.randint(2, 6, ())),)).unique_consecutive())
        pieces = [torch.zeros(int(torch.randint(1, 4, ())), frames_VC.shape[1])]
        for token in answers[-1]:
            silence = torch.zeros(int(torch.randint(2, 4, ())), frames_VC.shape[1])
            pieces += [frames_VC[token].expand(3, -1), silence]
        clip = torch.cat(pieces)
        clips.append(clip[: len(clip) // 2 * 2])
    x_KC = torch.cat(clips)
    features = Features(torch.arange(len(x_KC)).view(-1, 2))
    return Row(x_KC.bfloat16(), features, [len(clip) // 2 for clip in clips], answers)


def test_the_projector_learns_to_write_embeddings_of_what_is_said(monkeypatch):
    """Of 30 clips that were never heard all but two at most are read without an error, feature by feature."""
    monkeypatch.setattr(ctc, "EPOCHS", 40)
    torch.manual_seed(0)
    decoder = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
    decoder |= {"num_kv_heads": 2}
    audio = {"hidden_size": 24, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
    projector = ProjectorConfig(downsample=2)
    config = ModelConfig(decoder=DecoderConfig(**decoder), audio=AudioConfig(**audio), audio_projector=projector)
    model = build(config).requires_grad_(False)
    model.decoder.embedding.weight.normal_(0, 0.8)
    frames_VC = torch.randn(30, 24)
    ctc.train(model, [sing(frames_VC, 16) for _ in range(10)])
    row = sing(frames_VC, 30)
    assert sum(map(torch.equal, ctc.greedy(model, row), row.answers_N)) >= 28


def test_rows_are_counted_by_the_clip_that_they_belong_to():
    """Four rows fill up the packed row behind its three samples; the second has no target."""
    batch = SimpleNamespace(segments=Segments.of([5, 4, 3, 4]), keys=["a", "b", "c"])
    assert ctc.by_clip(torch.tensor([0, 1, 4, 9, 11]), batch) == [3, 0, 2]


def write_config(folder, source, **changes):
    """A config of a tiny model whose decoder and audio tower come from files, as a YAML file."""
    config = tiny(vision=None, stack=2)
    model = build(config)
    for part in ("decoder", "audio"):
        state = {name: value for name, value in model.state_dict().items() if name.startswith(f"{part}.")}
        torch.save(state, folder / f"{part}.pt")
    tokenizer = write_tokenizer(folder / "tokenizer")
    data = {"train": str(source), "tokenizer": str(tokenizer), "template": "chatml", "seq_length": 256}
    values = {
        "output_dir": str(folder / "run"),
        "model": {name: part for name, part in to_dict(config).items() if part is not None},
        "init_from": {part: str(folder / f"{part}.pt") for part in ("decoder", "audio")},
        "data": data | {"num_workers": 0},
        "optimizer": {"lr": 1e-3},
        "stages": [{"name": "a", "steps": 1, "train": ["decoder"]}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values | changes))
    return str(folder / "config.yaml")


def write_clips(folder, sound=True):
    lines = []
    for i, (seconds, text) in enumerate([(1.0, "one"), (1.7, "two three"), (0.6, "four")]):
        (folder / f"{i}.wav").write_bytes(tone(seconds, frequency=200.0 * (i + 1)))
        asked = "<audio>\nSay." if sound else "Say."
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": turns} | ({"audio": f"{i}.wav"} if sound else {})))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "clips.jsonl"


def test_a_projector_is_written_that_a_run_can_start_from(tmp_path, capsys):
    source = write_clips(tmp_path)
    out = tmp_path / "new" / "projector.pt"
    ctc.align(write_config(tmp_path, source), [], str(source), {"again": str(source)}, out)
    assert "again: word error rate " in capsys.readouterr().out
    started = loaded(tiny(vision=None, stack=2), all=out)
    for name, value in torch.load(out).items():
        assert torch.equal(started.get_parameter(name), value)


def test_each_clip_is_read_with_its_own_answer(tmp_path):
    source = write_clips(tmp_path)
    with source.open("a") as file:
        file.write('{"messages": "no conversation"}\n')
    path = write_config(tmp_path, source)
    cfg = load_config(path, ctc.ONLY_AUDIO)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    model = loaded(cfg.model, decoder=tmp_path / "decoder.pt", audio=tmp_path / "audio.pt")
    [row] = ctc.read(model, str(source), cfg)
    found = {tokenizer.decode(ids.tolist(), control=False): n for ids, n in zip(row.answers_N, row.features_N)}
    assert found == {"one": 25, "two three": 43, "four": 15}, "40 ms each"
    with pytest.raises(ValueError, match=r"clips\.jsonl, clips\.jsonl:4: "):
        list(ctc.read(model, str(source), cfg, leave_out=False))


def test_what_cannot_be_aligned_is_refused_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(ctc, "train", lambda *_: pytest.fail("it trained"))
    source = write_clips(tmp_path, sound=False)
    config = write_config(tmp_path, source)
    with pytest.raises(ValueError, match=r"--out .*p\.bin: init_from reads files that end in \.ckpt, \.pt, \.pth"):
        ctc.align(config, [], str(source), {}, tmp_path / "p.bin")
    with pytest.raises(ValueError, match=r"clips\.jsonl:1: a sample without audio"):
        ctc.align(config, [], str(source), {}, tmp_path / "p.pt")
    silent = source.rename(tmp_path / "silent.jsonl")
    source = write_clips(tmp_path)
    with pytest.raises(ValueError, match=r"silent\.jsonl:1: a sample without audio"):
        ctc.align(config, [], str(source), {"held out": str(silent)}, tmp_path / "p.pt")
    config = write_config(tmp_path, source, init_from={"decoder": str(tmp_path / "decoder.pt")})
    with pytest.raises(ValueError, match=r"init_from\.decoder and init_from\.audio"):
        ctc.align(config, [], str(source), {}, tmp_path / "p.pt")


def test_a_source_whose_clips_say_nothing_is_refused(tmp_path):
    source = write_clips(tmp_path)
    source.write_text("".join(re.sub(r'"(one|two three|four)"', '""', line) + "\n" for line in source.open()))
    with pytest.raises(ValueError, match=r"clips\.jsonl has no clip with an answer"):
        ctc.align(write_config(tmp_path, source), [], str(source), {}, tmp_path / "p.pt")
    assert not (tmp_path / "p.pt").exists()
