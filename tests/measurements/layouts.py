"""Layouts of ranks that ``make equivalence`` and the count of bytes go through, by name: number of ranks -> name ->
``parallel`` of a config."""

from typing import Any

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {
        "FSDP": {},
        "FSDP, towers by block": {"tower_sharding": "block"},
        "FSDP, media balanced": {"balance_media": True},
        "HSDP": {"replicate": 2},
        "TP": {"tensor": 2},
        "ring": {"context": 2, "context_mode": "ring"},
        "all-gather": {"context": 2, "context_mode": "allgather"},
        "Ulysses": {"context": 2, "context_mode": "ulysses"},
    },
    4: {
        "FSDP": {},
        "HSDP": {"replicate": 2},
        "TP": {"tensor": 4},
        "ring": {"context": 4, "context_mode": "ring"},
        "all-gather": {"context": 4, "context_mode": "allgather"},
        "Ulysses": {"context": 4, "context_mode": "ulysses"},
        "Ulysses x ring": {"context": 4, "context_mode": "ulysses_ring"},
        "FSDP x TP": {"tensor": 2},
        "FSDP x ring": {"context": 2, "context_mode": "ring"},
        "FSDP x ring, media balanced": {"context": 2, "context_mode": "ring", "balance_media": True},
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "HSDP x Ulysses": {"replicate": 2, "context": 2, "context_mode": "ulysses"},
        "TP x ring": {"context": 2, "tensor": 2, "context_mode": "ring"},
        "TP x all-gather": {"context": 2, "tensor": 2, "context_mode": "allgather"},
        "TP x Ulysses": {"context": 2, "tensor": 2, "context_mode": "ulysses"},
    },
    8: {
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "FSDP x TP x ring": {"context": 2, "tensor": 2, "context_mode": "ring"},
        "FSDP x TP x Ulysses, media balanced": {
            **{"context": 2, "tensor": 2, "context_mode": "ulysses"},
            **{"balance_media": True, "tower_sharding": "block"},
        },
        "HSDP x ring": {"replicate": 2, "context": 4, "context_mode": "ring"},
        "TP x Ulysses x ring": {"context": 4, "tensor": 2, "context_mode": "ulysses_ring"},
    },
}
LAYOUTS[2]["FSDP, towers replicated"] = {"tower_sharding": "replicate"}  # frozen, so a case of its own
LAYOUTS[2]["FSDP, offloaded"] = {"cpu_offload": True}
# Experts: all of them gathered by every rank, or shared out.
EXPERTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {},
    2: {
        "FSDP": {},
        "TP": {"tensor": 2},
        "experts gathered": {"expert": 2},
        "experts exchanged": {"expert": 2, "expert_mode": "exchange"},
        "TP, experts": {"tensor": 2, "expert": 2},
        "ring, experts exchanged": {"context": 2, "expert": 2, "expert_mode": "exchange", "context_mode": "ring"},
    },
    4: {
        "experts gathered": {"expert": 4, "expert_mode": "gather"},
        "experts exchanged": {"expert": 4},
        "experts of pairs": {"expert": 2},
        "HSDP, experts": {"replicate": 2, "expert": 2},
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "FSDP x TP, experts": {"tensor": 2, "expert": 4},
        "TP x ring, experts": {"context": 2, "tensor": 2, "expert": 4, "context_mode": "ring"},
        "TP x Ulysses, experts exchanged": {
            **{"context": 2, "tensor": 2, "context_mode": "ulysses"},
            **{"expert": 2, "expert_mode": "exchange"},
        },
    },
    8: {"FSDP x TP x ring, experts": {"context": 2, "tensor": 2, "expert": 4, "context_mode": "ring"}},
}
for world_size, layouts in EXPERTS.items():
    LAYOUTS[world_size] |= {f"{name}, of experts": layout for name, layout in layouts.items()}
KV_HEADS = {"Ulysses x ring": 2}  # on 4 ranks; 4 elsewhere, which need no ring
