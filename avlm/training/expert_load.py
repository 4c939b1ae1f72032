"""What a step's record says of experts."""

import math
from typing import Any

from avlm.config.decoder import ExpertsConfig
from avlm.models.moe import SUMS


def expert_load(seen: list[float], experts: ExpertsConfig) -> dict[str, Any]:
    """``seen`` by ``avlm.models.moe.take_seen``, summed over ranks. For metrics.jsonl:

    experts/load          of each expert, the mean over layers: its assignments, 1 if all experts had as many
    experts/busiest       the largest load of an expert in a layer
    experts/entropy       of what the router says of a token, the mean over tokens and layers: 1 if all experts are as
                          likely, 0 if one is certain
    experts/dropped       the share of assignments that no expert computed
    experts/balance_loss  where train.balance_loss is not 0
    """
    width = experts.num + len(SUMS)
    layers = [seen[start : start + width] for start in range(0, len(seen), width)]
    of_layers = [dict(zip(SUMS, layer[experts.num :])) for layer in layers]
    sums = {name: sum(layer[name] for layer in of_layers) for name in SUMS}
    if not sums["tokens"]:
        return {}
    assigned = experts.per_token * sums["tokens"]
    loads = [
        [count * experts.num / (experts.per_token * of_layer["tokens"]) for count in layer[: experts.num]]
        for layer, of_layer in zip(layers, of_layers)
    ]
    found = {
        "experts/load": [round(sum(of_expert) / len(loads), 4) for of_expert in zip(*loads)],
        "experts/busiest": max(map(max, loads)),
        "experts/entropy": sums["entropy"] / sums["tokens"] / math.log(experts.num),
        "experts/dropped": 1 - sums["computed"] / assigned,
    }
    if sums["rows"]:
        found["experts/balance_loss"] = sums["balance"] / sums["rows"]
    return found
