"""What can be wrong with the layout of a run, known before any rank starts."""

from avlm.config.load import to_dict
from avlm.config.run import Config
from avlm.models.freezing import trained_names
from avlm.models.shapes import parameter_shapes
from avlm.parallel import mesh
from avlm.parallel.context_attention import mode_of
from avlm.parallel.experts import check_experts
from avlm.parallel.float8 import check_float8
from avlm.parallel.tensor import check_sizes


def check_layout(config: Config, world_size: int) -> None:
    """Raise ValueError for a mesh that does not fit this number of ranks, the model or the rows."""
    parallel = config.parallel
    replicate, shard, context, tensor = mesh.sizes(parallel, world_size)
    config.train.micro_batches(replicate * shard)
    check_sizes(config.model, parallel.tensor)
    check_experts(config.model.decoder, parallel, shard * context * tensor)
    mode_of(config.model.decoder, parallel.context_mode, parallel.context, parallel.tensor)
    odd = [rank for rank in config.debug.profile_ranks if rank >= world_size]
    if config.debug.profile and odd:
        raise ValueError(f"debug.profile_ranks={config.debug.profile_ranks} names rank {odd[0]} of {world_size}")
    if config.train.balance_loss and config.model.decoder.experts is None:
        raise ValueError(f"train.balance_loss={config.train.balance_loss} needs model.decoder.experts")
    _check_recompute(config)
    _check_rows(config)
    _check_pairs(config)
    if config.train.float8:
        check_float8(config)
    if parallel.tower_sharding == "replicate":
        _check_replicated_towers(config)


def _check_pairs(config: Config) -> None:
    """Media and captions of a contrastive stage stay on the rank that loads them."""
    parallel = config.parallel
    for stage in config.stages:
        if stage.objective == "answers":
            continue
        for key, value in {"context": 1, "tensor": 1, "balance_media": False}.items():
            if getattr(parallel, key) != value:
                raise ValueError(
                    f"stage {stage.name}: objective=contrastive does not go with parallel.{key}="
                    f"{str(getattr(parallel, key)).lower()}: set parallel.{key}={str(value).lower()}"
                )


def _check_rows(config: Config) -> None:
    sharers = config.parallel.context * config.parallel.tensor
    for stage in config.stages:
        length = stage.data.seq_length
        if length % sharers:
            raise ValueError(
                f"stage {stage.name}: data.seq_length={length} is not a multiple of parallel.context x "
                f"parallel.tensor = {sharers}, which share its rows: take {-(-length // sharers) * sharers}"
            )


def _check_replicated_towers(config: Config) -> None:
    shapes = parameter_shapes(config.model)
    for stage in config.stages:
        trained = {name.split(".")[0] for name in trained_names(stage, config.model, shapes)}
        towers = sorted(trained.intersection(config.model.modalities.values()))
        if towers:
            raise ValueError(
                f"parallel.tower_sharding=replicate keeps frozen copies, but stage {stage.name} trains "
                f"{', '.join(towers)}: choose unit or block"
            )


def _check_recompute(config: Config) -> None:
    train, recompute = config.train, to_dict(config.train.recompute)
    for name, mode in recompute.items():
        if mode != "none" and getattr(config.model, name) is None:
            raise ValueError(f"train.recompute.{name}={mode}, but there is no model.{name}: set it to none")
        if train.offload_activations and mode == "selective":
            raise ValueError(
                "train.offload_activations=true moves block inputs alone, but "
                f"train.recompute.{name}=selective keeps more: set it to full, or to none"
            )
    if train.offload_activations and "full" not in recompute.values():
        raise ValueError(
            "train.offload_activations=true moves what full recomputation keeps, and nothing is recomputed: set "
            "train.recompute.decoder=full, or train.offload_activations=false"
        )
