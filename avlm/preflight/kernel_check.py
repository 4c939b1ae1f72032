"""The self-test of the kernels that a run will use, once at its start: ``kernels.check`` on its dtype and head dims."""

from collections.abc import Iterator

import torch

from avlm.config.run import Config
from avlm.parallel.apply import compute_dtype
from avlm.parallel.mesh import World
from avlm.preflight.layout import layout_of
from avlm.process.launch import local_ranks
from kernels import backend, check
from kernels.check_cases import Case, cases
from kernels.dispatch import Kernel


def check_kernels(config: Config, world: World) -> list[str]:
    """Lines for the log. On GPUs one rank of each machine compares its kernels with plain PyTorch. What disagrees on
    any machine is replaced on all, so that ranks do not run different code. ValueError with ``kernels.strict`` instead,
    and if the flash attention that the config wants is not installed."""
    if world.device.type != "cuda":
        return []
    if config.kernels.flash_attention != "FA2":
        architecture = backend.architecture(world.device.index)
        backend.activate_flash_attention(config.kernels.flash_attention, architecture)
    lines = agree(config, world)
    torch.cuda.empty_cache()
    return lines


def agree(config: Config, world: World) -> list[str]:
    """Compare until no machine finds anything new, as what takes the place of a kernel may be new to a machine."""
    known: dict[Kernel, check.Finding] = {}
    architectures = set(world.gather(backend.architecture(world.device.index)))
    if len(architectures) > 1:
        names = ", ".join(f"sm_{architecture}" for architecture in sorted(architectures))
        raise ValueError(f"the GPUs of a run must be of one architecture, or ranks would run different code: {names}")
    while True:
        own = []
        if local_ranks()[0] == 0:
            own = check.run(_cases(config, world), check.QUICK.repeats)
        new = {}
        for of_rank in world.gather(own):
            for finding in of_rank:
                new.setdefault(finding.kernel, finding)
        new = {key: finding for key, finding in new.items() if key not in known}
        if not new:
            break
        if config.kernels.strict:
            finding = next(iter(new.values()))
            raise ValueError(f"kernels.strict: {finding.operation} by {finding.implementation}: {finding.wrong}")
        for finding in new.values():
            finding.distrust()
        known |= new
    warnings = [f"WARNING: kernel {finding}" for finding in known.values()]
    return [*warnings, f"compared with plain PyTorch: {', '.join(_choices(config, world))}"]


def _choices(config: Config, world: World) -> Iterator[str]:
    """What runs each operation; several implementations where head dims differ."""
    dtype = compute_dtype(config.train.precision, world.device)
    arch = backend.architecture(world.device.index)
    for operation in operations(config, world.size):
        rows = [backend.row(operation, arch, dtype, head_dim) for head_dim in head_dims(config)]
        yield f"{operation} {' and '.join(sorted({row.implementation for row in rows}))}"


def _cases(config: Config, world: World) -> Iterator[Case]:
    dtype = compute_dtype(config.train.precision, world.device)
    chosen = operations(config, world.size)
    of_decoder = [operation for operation in chosen if operation in ("decode", "masked_attention")]
    of_all = [operation for operation in chosen if operation not in of_decoder]
    yield from cases(world.device, (dtype,), head_dims(config), check.QUICK, of_all)
    yield from cases(world.device, (dtype,), (config.model.decoder.head_dim,), check.QUICK, of_decoder)


def head_dims(config: Config) -> tuple[int, ...]:
    """Those of the decoder and the towers."""
    found = {config.model.decoder.head_dim}
    for name in config.model.modalities.values():
        tower = getattr(config.model, name)
        found.add(tower.hidden_size // tower.num_heads)
    return tuple(sorted(found))


def operations(config: Config, world_size: int) -> tuple[str, ...]:
    """What the run calls."""
    found = ["attention_forward", "attention_backward", "cross_entropy"]
    decoder = config.model.decoder
    if decoder.sliding_window or decoder.bidirectional != "none" or decoder.attention_softcap is not None:
        found.append("masked_attention")
    layout = layout_of(config, world_size)
    if layout.context > 1 and layout.context_mode in ("ring", "ulysses_ring"):
        found += ["block_forward", "block_backward"]
    if config.train.validate_answers:
        found.append("decode")
    if config.model.modalities:
        found.append("projector")
    return tuple(found)
