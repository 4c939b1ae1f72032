"""The memory of a contrastive stage, against what its tensors take."""

import pytest
import torch

from avlm.data.captions import EncodedPair, pack_pairs
from avlm.models.avlm import AVLM
from avlm.models.freezing import freeze
from avlm.models.initial import init
from avlm.preflight import memory, pairs
from tests.parallel.live_bytes import LiveBytes
from tests.preflight.test_memory import TREE, make_case, make_config

TEXT = {"vocab_size": 100, "hidden_size": 54, "intermediate_size": 216, "num_layers": 3, "num_heads": 3}
STAGE = {"name": "pairs", "objective": "contrastive", "steps": 4, "train": ["vision", "text", "contrastive"]}
DATA = {"train": "x.jsonl", "seq_length": 2048}
MODEL = {
    **{"decoder": TREE["model"]["decoder"], "vision": {**TREE["model"]["vision"], "image_size": 8}},
    **{"vision_projector": {"downsample": 2}, "text": {**TEXT, "max_position": 8}},
}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_activations_and_logits_are_about_as_estimated(loss):
    model = {**MODEL, "contrastive": {"size": 32, "loss": loss}}
    cfg = make_config(model=model, stages=[STAGE], data=DATA)
    case = make_case(cfg, torch.float32, cfg.stages[0])
    samples = []
    for _ in range(2048 // (1 + 8)):  # an image is one feature here
        token_T = torch.randint(0, 100, (8,))
        patches = torch.randint(0, 255, (2, 2, 48), dtype=torch.uint8)
        samples.append(EncodedPair("", "image", token_T, token_T, {"image": [patches]}))
    assert len(samples) == pytest.approx(pairs.num_pairs(case), abs=1)
    batch = pack_pairs(samples, cfg.model)
    network = AVLM(cfg.model)
    init(network)
    freeze(network, cfg.stages[0])
    with LiveBytes() as counter:
        value, _ = network(batch)
        value.backward()
    trained = 4 * sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    found = memory._at_pairs(case)
    # The plain path of a CPU keeps a second result of attention.
    assert found["activations"] + found["head"] == pytest.approx(counter.peak - trained, rel=0.15)


def test_joined_micro_batches_hold_as_many_times_the_pairs():
    changes = {"model": {**MODEL, "contrastive": {"size": 32}}, "stages": [STAGE], "data": DATA}
    one, three = (make_config(**changes, train={"accumulate": count}) for count in (1, 3))
    cases = [make_case(cfg, torch.float32, cfg.stages[0]) for cfg in (one, three)]
    first, second = (memory._at_pairs(case) for case in cases)
    assert second["activations"] == pytest.approx(3 * first["activations"], rel=0.05)
    assert second["head"] > 5 * first["head"], "logits grow with the square"
