"""How a run is laid out over ranks, and how long they wait for each other."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from avlm.config.values import config, require

Ranks = Annotated[int, Field(gt=0, le=2**20)]
Seconds = Annotated[float, Field(ge=1, le=1e8)]  # below, ranks that answer in time would be taken for silent ones
RanksOrRest = Annotated[int, Field(ge=-1, le=2**20)]


@config
class TimeoutsConfig:
    """Seconds without progress after which a run of several ranks ends and names the rank that is missing
    (``avlm.parallel.watch``)."""

    start: Seconds = 1800.0  # to the end of a stage's first step: weights are read, buffers filled, blocks compiled
    step: Seconds = 300.0  # a step, with what it waits for data
    validate: Seconds = 3600.0  # all validation sets, with the answers
    save: Seconds = 1800.0  # a checkpoint


@config
class ParallelConfig:
    """Mesh of ranks: replicate x shard x context x tensor. Rows are loaded for replicate x shard data ranks."""

    shard: RanksOrRest = -1  # ranks that share a copy of weights, gradients and optimizer state; -1: all others
    replicate: Ranks = 1  # copies
    context: Ranks = 1  # ranks that share the tokens of a row
    tensor: Ranks = 1  # ranks that share the heads, widths and vocabulary of the decoder
    expert: Ranks = 1  # ranks that share out the experts of a layer: those of a row first, then of shard
    expert_mode: Literal["auto", "gather", "exchange"] = "auto"
    # gather: each of them gets the tokens of all, and never waits for the device; exchange: a token goes to the ranks
    # of its experts. auto: gather where a token has at least twice as many experts as there are ranks
    context_mode: Literal["auto", "ring", "allgather", "ulysses", "ulysses_ring"] = "auto"
    # auto: ulysses where context divides the key/value heads of a rank, within a machine of 8 ranks; ulysses_ring where
    # they have a common divisor
    tower_sharding: Literal["unit", "block", "replicate"] = "unit"
    # unit: one FSDP unit for each tower; block: one for each block; replicate: towers are frozen, not sharded, and held
    # and saved in the compute dtype
    balance_media: bool = False
    # spread media evenly over the ranks of several rows, up to 64 ranks; else over those of their own row
    reshard: bool = True  # free the gathered weights of a block between forward and backward
    cpu_offload: bool = False  # weights, gradients and optimizer state in host memory
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)

    def __post_init__(self) -> None:
        require(self.shard != 0, "shard=0 ranks cannot hold a model; -1 takes all remaining ranks")
