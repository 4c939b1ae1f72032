"""The likeliest token of each row is that of PyTorch's full logits, a chunk and a shard at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy
from kernels.cross_entropy import linear_argmax


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "V"), [(0, 5), (1, 1), (7, 11), (45, 257), (8, 50257)])
def test_it_is_the_place_of_the_largest_logit(R, V, dtype):
    hidden, weight = torch.randn(R, 16).to(dtype), torch.randn(V, 16).to(dtype)
    token_R = linear_argmax(hidden, weight)
    assert token_R.dtype == torch.int64
    assert torch.equal(token_R, F.linear(hidden, weight).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_the_vocabulary_agree_on_it(shards, dtype):
    """With few small numbers many logits are equal, within a shard and across: the first of all counts."""
    hidden, weight = torch.randint(-1, 2, (45, 4)).to(dtype), torch.randint(-1, 2, (64, 4)).to(dtype)
    reduce = Reduction(shards)
    with ThreadPoolExecutor(shards) as pool:
        run = lambda i: linear_argmax(hidden, weight.chunk(shards)[i], first=i * 64 // shards, reduce=reduce.of(i))
        found = list(pool.map(run, range(shards)))
    logits = F.linear(hidden, weight)
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()
    for token_R in found:
        assert torch.equal(token_R, logits.argmax(1))


class Reduction:
    """The largest of what threads hold, each of which stands for a rank."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size), [None] * size

    def of(self, rank: int):
        def reduce(x: torch.Tensor, operation: str) -> None:
            assert operation == "max" and x.dtype == torch.float32
            self.values[rank] = x.clone()
            self.barrier.wait(60)
            largest = torch.stack(self.values).amax(0)
            self.barrier.wait(60)
            x.copy_(largest)

        return reduce
