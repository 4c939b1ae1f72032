"""How long the parts of a start take:  python -m tests.measurements.starts

random weights   a decoder of 8B without init_from: what one of 8 ranks draws, and what it would draw if each rank drew
                 all
"""

import time

import torch

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.models.avlm import AVLM
from avlm.models.initial import initial_values

RANKS = 8
LLAMA_8B = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8
)


def random_weights() -> None:
    with torch.device("meta"):
        model = AVLM(ModelConfig(decoder=LLAMA_8B))
    values = list(initial_values(model, seed=1))
    started = time.perf_counter()
    num_drawn = 0
    for _, value in values:
        rows = -(-value.shape[0] // RANKS)
        region = slice(0, rows), *(slice(None) for _ in value.shape[1:])
        num_drawn += value[region].numel()
    of_rank = time.perf_counter() - started
    _, largest = max(values, key=lambda named: named[1].shape.numel())
    started = time.perf_counter()
    largest.whole()
    rate = largest.shape.numel() / (time.perf_counter() - started)
    total = sum(value.shape.numel() for _, value in values)
    print(
        f"random weights: {total / 1e9:.1f}B numbers; a rank of {RANKS} holds {num_drawn / 1e9:.2f}B and takes "
        f"{of_rank:.1f} s, all numbers would take {total / rate:.1f} s"
    )


if __name__ == "__main__":
    random_weights()
