"""The start of the audio projector."""

import torch

from avlm import ctc
from avlm.config import AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig
from avlm.ctc import Row
from tests.models.handmade import build


def sing(frames_VC: torch.Tensor, count: int) -> Row:
    """Clips in which every token is three like frames, with silence or nothing before the next; two make a feature."""
    clips, answers = [], []
    for _ in range(count):
        answers.append(torch.randint(len(frames_VC), (int(torch.randint(2, 6, ())),)))
        pieces = [torch.zeros(int(torch.randint(1, 4, ())), frames_VC.shape[1])]
        for token in answers[-1]:
            silence = torch.zeros(int(torch.randint(2, 4, ())), frames_VC.shape[1])
            pieces += [frames_VC[token].expand(3, -1), silence]
        clip = torch.cat(pieces)
        clips.append(clip[: len(clip) // 2 * 2])
    x_KC = torch.cat(clips)
    return Row(x_KC.bfloat16(), torch.arange(len(x_KC)).view(-1, 2), [len(clip) // 2 for clip in clips], answers)


def test_the_projector_learns_to_write_embeddings_of_what_is_said(monkeypatch):
    """Clips that were never heard are read without an error, feature by feature."""
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
    heard = ctc.greedy(model, row)
    right = [torch.equal(ids, answer.unique_consecutive()) for ids, answer in zip(heard, row.answers_N)]
    assert sum(right) >= 28
