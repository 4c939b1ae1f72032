"""What a step computes, by module, from counts alone; and the share of the device's peak that it reaches.

    product       2 n R forward, 2 n R for dW if the weight trains, 2 n R for dx if its input has a gradient
    attention     4 A P forward, 8 A P backward if q, k or v has a gradient
    DoRA          2 n r forward, for the lengths of the rows of W + s B A
    MFU, HFU      FLOPs / (seconds * devices * peak), without and with recomputation (Chowdhery et al. 2022, appendix B)

An input has a gradient where something below it trains: a frozen tower is forward only, a frozen decoder above
projectors that train passes gradients on and makes none of its own.

Recomputed forward FLOPs (``train.recompute``) are kept apart, for HFU. Recomputation inside the attention kernel, and
everything but matrix products, are not counted. The counts are defined in ``avlm.models.costs``.

n parameters of the weight   R rows   A width of all query heads   P pairs of a query and a key that it sees   r rank
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator

import torch

from avlm.config.model import ModelConfig
from avlm.config.run import Recompute, RecomputeConfig, StageConfig
from avlm.models.conformer import RELATIVE
from avlm.models.costs import attention_cost, block_products, branches, check_steps, product_flops, steps
from avlm.models.freezing import trained_shapes
from avlm.models.lora import is_adapter
from avlm.models.shapes import Shapes, parameter_shapes
from avlm.parallel.recompute import keeps_product
from kernels.benchmark.cards import CARDS

# What other modules feed, in this order; layers of cross-attention stand between the decoder's.
LAST = ("cross", "decoder", "codec")
Costs = dict[tuple[str, str], tuple[int, int, int]]  # (module, count) -> (forward, backward, recomputed) of each


def peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device by its vendor's data sheet, None where the table does not know it."""
    if device.type != "cuda":
        return None
    card = CARDS.get(torch.cuda.get_device_name(device))
    return card and card.tflops * 1e12


def by_module(costs: Costs, count: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """FLOPs of each module, (forward, backward, recomputed in the backward). The head is a module of its own."""
    flops: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (module, name), of_one in costs.items():
        for kind, cost in enumerate(of_one):
            flops[module][kind] += cost * count[name]
    return {module: tuple(of_kinds) for module, of_kinds in flops.items()}


def costs(model: ModelConfig, stage: StageConfig, recompute: RecomputeConfig) -> Costs:
    """What each count costs in a stage."""
    shapes = parameter_shapes(model)
    check_steps(model, shapes)
    trained = trained_shapes(stage, model, shapes)
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    has_graph = {}  # module -> whether anything in it, or below it, trains
    modules = [module for module in model.modules if module not in stage.idle]
    for module in sorted(modules, key=lambda name: LAST.index(name) + 1 if name in LAST else 0):
        tower = module.removesuffix("_projector")
        from_input = any(has_graph.values()) if module in LAST else has_graph.get(tower, False)
        from_input |= module == "cross" and _is_trained("decoder", trained)
        has_graph[module] = from_input
        mode = getattr(recompute, module, "none")
        repeated = _repeated(module, model, shapes, trained, mode)
        for branch in branches(module, model):
            below = from_input
            for count, paths in branch:
                if module == "contrastive":  # each of its heads has a tower
                    below |= has_graph.get(paths[0].split(".")[1], False)
                for path in paths:
                    label = "head" if path == "decoder.head" else module
                    # A block whose input and weights have no gradient has no backward, and is not recomputed.
                    block = _block(path)
                    runs_again = mode != "none" and block and (below or _is_trained(block, trained))
                    for name, by, forward, backward in _cost(path, count, model, shapes, trained, below):
                        total = found[label, by]
                        total[0] += forward
                        total[1] += backward
                        if runs_again and (path in repeated or is_adapter(name)):
                            total[2] += forward
                below |= any(_is_trained(path, trained) for path in paths)
            has_graph[module] |= below
    return {key: tuple(total) for key, total in found.items()}


def _repeated(module: str, model: ModelConfig, shapes: Shapes, trained: Collection[str], mode: Recompute) -> set[str]:
    """The products and attentions that a backward computes again in the blocks of a module, adapters apart
    (``avlm.parallel.recompute``).

    full: all but the last product, unless its DoRA magnitude, a layer scale that trains, the weights of experts or a
    norm behind it need its result. selective: the products, without attention, that are not kept.
    """
    blocks: dict[str, list[str]] = defaultdict(list)
    for count, paths in steps(module, model):
        for path in paths:
            if count and _block(path):
                blocks[_block(path)].append(path)
    found: set[str] = set()
    for block, paths in blocks.items():
        if mode == "selective":
            products = block_products(block, model)
            kept = {path for number, path in enumerate(products) if keeps_product(number, len(products))}
            paths = [path for path in paths if path not in kept and not path.endswith(".core")]
        for path in paths:
            is_needed = f"{path}.lora_magnitude" in shapes or f"{block}.ffn_scale" in trained
            is_needed |= module == "decoder" and model.decoder.post_norms
            is_last = path in (f"{block}.ffn.down", f"{block}.down")
            if is_needed or not is_last:
                found.add(path)
    return found


def _block(path: str) -> str:
    """The path of the block that a path lies in, MODULE.blocks.i; "" outside of blocks."""
    if ".blocks." not in path:
        return ""
    return ".".join(path.split(".")[:3])


def _is_trained(path: str, trained: Collection[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for name in trained)


def _cost(
    path: str, count: str, model: ModelConfig, shapes: Shapes, trained: Collection[str], below: bool
) -> Iterator[tuple[str, str, int, int]]:
    """(weight, count, forward, backward) of each product of one module. ``below``: its input has a gradient."""
    if not count:
        return
    if path.endswith(".core"):
        forward = attention_cost(path, model)
        yield "", count, forward, 2 * forward * below
        return
    if path.endswith(RELATIVE):
        forward = attention_cost(path, model)
        yield "", count, forward, forward * (below + _is_trained(path.removesuffix("_core"), trained))
        return
    below = below and not count.endswith("relative_rows")  # relative positions are constants
    base = f"{path}.weight"
    if path == "decoder.head" and model.decoder.tie_embedding:
        base = "decoder.embedding.weight"
    down = f"{path}.lora_down.weight"
    up = f"{path}.lora_up.weight"
    for name, has_gradient in ((base, below), (down, below), (up, below or down in trained)):
        if name in shapes:
            product = product_flops(path, shapes[name], model)
            yield name, count, product, product * ((name in trained) + has_gradient)
    if f"{path}.lora_magnitude" in shapes:
        yield down, "batches", 2 * math.prod(shapes[base]) * shapes[down][0], 0
