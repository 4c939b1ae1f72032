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
    sums = [dict(zip(SUMS, layer[experts.num :])) for layer in layers]
    if not all(layer["tokens"] for layer in sums):
        return {}

    def mean(of: str, per: str) -> float:
        """Of a layer first: one that is recomputed may have counted twice."""
        return sum(layer[of] / layer[per] for layer in sums) / len(sums)

    loads = []
    for layer, of_layer in zip(layers, sums):
        even = experts.per_token * of_layer["tokens"] / experts.num
        loads.append([count / even for count in layer[: experts.num]])
    found = {
        "experts/load": [round(sum(of_expert) / len(loads), 4) for of_expert in zip(*loads)],
        "experts/busiest": max(map(max, loads)),
        "experts/entropy": mean("entropy", "tokens") / math.log(experts.num),
        "experts/dropped": round(1 - mean("computed", "tokens") / experts.per_token, 6),  # sums are float32
    }
    if all(layer["rows"] for layer in sums):
        found["experts/balance_loss"] = mean("balance", "rows")
    return found
