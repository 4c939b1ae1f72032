"""What a step computes, by module, from counts alone; and the share of the device's peak that it reaches.

    product       2 n R forward, 2 n R for dW if the weight trains, 2 n R for dx if its input has a gradient
    attention     4 A P forward, 8 A P backward if q, k or v has a gradient
    DoRA          2 n r forward, for the lengths of the rows of W + s B A
    MFU, HFU      FLOPs / (seconds * devices * peak), without and with recomputation (Chowdhery et al. 2022, appendix B)

An input has a gradient where something below it trains: a frozen tower is forward only, a frozen decoder above
projectors that train passes gradients on and makes none of its own.

What a backward computes again for ``train.recompute`` counts apart, for HFU; what it computes again inside of attention
kernels, and whatever is no matrix product, is not counted. A causal query sees the keys up to itself, so a document of
L tokens has L (L + 1) / 2 pairs; images and clips have L^2. What fills the end of a packed row is computed, so it
counts, as one document more. Convolutions work on whole windows, the head on rows with a target.

n parameters of the weight   R rows   A width of all query heads   P pairs of a query and a key that it sees   r rank
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator

import torch

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, VisionConfig
from avlm.config.run import Config, Recompute, StageConfig
from avlm.models.batch import Batch
from avlm.models.freezing import trained_shapes
from avlm.models.lora import is_adapter
from avlm.models.projector import LAYERS
from avlm.models.shapes import Shapes, parameter_shapes
from kernels.segments import Segments

Costs = dict[tuple[str, str], tuple[int, int, int]]  # (module, name of a count) -> (forward, backward, again) of each
Step = tuple[str, tuple[str, ...]]  # the count that its products go by, "" for none; modules that share an input

# Dense bf16 with float32 sums, FLOP/s, from the vendor's data sheets, by the whole name of the device: parts of a card
# (MIG) and its slower relatives (NVL, laptops) have other peaks, and so none here.
PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None where the table does not know it."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def by_module(costs: Costs, count: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """FLOPs of each module, (forward, backward, computed again in the backward). The head is a module of its own."""
    flops = {module: [0, 0, 0] for module, _ in costs}
    for (module, name), each in costs.items():
        for i, cost in enumerate(each):
            flops[module][i] += cost * count[name]
    return {module: tuple(parts) for module, parts in flops.items()}


def counts(batch: Batch) -> dict[str, int]:
    """What the FLOPs of a packed row depend on. The batch is on the host, before ranks share it."""
    squares = lambda segments: sum(length**2 for length in _lengths(segments))
    windows, _, frames = batch.mel.shape
    return {
        "batches": 1,
        "tokens": len(batch.token_T),
        "token_pairs": sum(length * (length + 1) // 2 for length in _lengths(batch.segments)),
        "targets": len(batch.target_R),
        "patches": batch.patch_rows_F.numel(),
        "image_tokens": sum(_lengths(batch.image_segments)),
        "image_pairs": squares(batch.image_segments),
        "image_features": len(batch.image_rows_F),
        "frames": windows * frames,
        "strided_frames": windows * (frames // 2),  # what the second convolution leaves
        "audio_rows": len(batch.mel_rows_K),
        "audio_pairs": squares(batch.audio_segments),
        "audio_features": len(batch.audio_rows_G),
    }


def _lengths(segments: Segments) -> list[int]:
    return [length for _, length in segments.spans]


def costs(config: Config, stage: StageConfig) -> Costs:
    """What each count costs in a stage."""
    shapes = parameter_shapes(config.model)
    trained = set(trained_shapes(config, stage, shapes))
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    trains = {}  # module -> whether anything in it, or below it, does
    for module in sorted(config.model.modules, key="decoder".__eq__):  # the decoder comes last: all others feed it
        tower = module.removesuffix("_projector")
        below = any(trains.values()) if module == "decoder" else trains.get(tower, False)
        mode = getattr(config.train.recompute, module, "none")
        repeated = _repeated(module, config.model, shapes, mode)
        for name, step in _steps(module, config.model):
            for path in step:
                label = "head" if path == "decoder.head" else module
                again = mode != "none" and _block(path) and (below or _is_trained(_block(path), trained))
                for what, count, forward, backward in _cost(path, name, config.model, shapes, trained, below):
                    is_again = again and (path in repeated or is_adapter(what))
                    for i, cost in enumerate((forward, backward, forward * bool(is_again))):
                        found[label, count][i] += cost
            below |= any(_is_trained(path, trained) for path in step)
        trains[module] = below
    return {key: tuple(parts) for key, parts in found.items()}


def _repeated(module: str, model: ModelConfig, shapes: Shapes, mode: Recompute) -> set[str]:
    """What a backward computes again in the blocks of a module (``avlm.parallel.recompute``), adapters apart.

    full: all but the last product, whose result nothing waits for (a DoRA magnitude on it does). selective: of the
    products, without attention, those that are not kept.
    """
    blocks: dict[str, list[str]] = defaultdict(list)
    for count, paths in _steps(module, model):
        for path in paths if count else ():
            blocks[_block(path)].append(path)
    blocks.pop("", None)
    if mode == "selective":
        blocks = {block: [path for path in paths if not path.endswith("core")][1::2] for block, paths in blocks.items()}
    is_last = lambda path: path.endswith(".down") and f"{path}.lora_magnitude" not in shapes
    return {path for paths in blocks.values() for path in paths if not is_last(path)}


def _block(path: str) -> str:
    """tower.blocks.i of a path in it, "" elsewhere."""
    return ".".join(path.split(".")[:3]) if ".blocks." in path else ""


def _is_trained(path: str, trained: Collection[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for name in trained)


def _cost(
    path: str, count: str, model: ModelConfig, shapes: Shapes, trained: Collection[str], below: bool
) -> Iterator[tuple[str, str, int, int]]:
    """(weight, count, forward, backward) of what a module of a step computes; ``below``: whether its input has a
    gradient."""
    if not count:
        return
    if path.endswith("attention.core"):
        tower = getattr(model, path.split(".")[0])
        width = tower.num_heads * tower.head_dim if isinstance(tower, DecoderConfig) else tower.hidden_size
        yield "", count, 4 * width, 8 * width * below
        return
    base = "decoder.embedding.weight" if path == "decoder.head" and model.decoder.tie_embedding else f"{path}.weight"
    down, up = f"{path}.lora_down.weight", f"{path}.lora_up.weight"
    for name, has_gradient in ((base, below), (down, below), (up, below or down in trained)):
        if name in shapes:
            product = 2 * math.prod(shapes[name])
            yield name, count, product, product * ((name in trained) + has_gradient)
    if f"{path}.lora_magnitude" in shapes:
        yield down, "batches", 2 * math.prod(shapes[base]) * shapes[down][0], 0


# The modules in the order in which they run. Those of a step have one input; norms and embeddings have no product.


def _steps(module: str, model: ModelConfig) -> Iterator[Step]:
    config = getattr(model, module)
    if module == "decoder":
        steps = _decoder(config)
    elif module == "vision":
        steps = _vision(config)
    elif module == "audio":
        steps = _audio(config)
    else:
        count = "image_features" if module == "vision_projector" else "audio_features"
        steps = ((count, (name,)) for name in LAYERS[config.type])
    for count, names in steps:
        yield count, tuple(f"{module}.{name}" for name in names)


def _decoder(config: DecoderConfig) -> Iterator[Step]:
    yield "", ("embedding",)
    for i in range(config.num_layers):
        block, attention = f"blocks.{i}", f"blocks.{i}.attention"
        yield "", (f"{block}.attention_norm",)
        yield "tokens", (f"{attention}.q", f"{attention}.k", f"{attention}.v")
        yield "", (f"{attention}.q_norm", f"{attention}.k_norm")
        yield "token_pairs", (f"{attention}.core",)
        yield "tokens", (f"{attention}.o",)
        yield "", (f"{block}.ffn_norm",)
        yield "tokens", (f"{block}.ffn.gate", f"{block}.ffn.up")
        yield "tokens", (f"{block}.ffn.down",)
    yield "", ("norm",)
    yield "targets", ("head",)


def _vision(config: VisionConfig) -> Iterator[Step]:
    yield "patches", ("patch",)
    yield "", ("class_token", "position", "pre_norm")
    yield from _encoder(config.num_layers + 1 + config.feature_layer, "image_tokens", "image_pairs")


def _audio(config: AudioConfig) -> Iterator[Step]:
    yield "frames", ("conv1",)
    yield "strided_frames", ("conv2",)
    yield from _encoder(config.num_layers, "audio_rows", "audio_pairs")


def _encoder(num_blocks: int, rows: str, pairs: str) -> Iterator[Step]:
    for i in range(num_blocks):
        block, attention = f"blocks.{i}", f"blocks.{i}.attention"
        yield "", (f"{block}.attention_norm",)
        yield rows, (f"{attention}.q", f"{attention}.k", f"{attention}.v")
        yield pairs, (f"{attention}.core",)
        yield rows, (f"{attention}.o",)
        yield "", (f"{block}.ffn_norm",)
        yield rows, (f"{block}.up",)
        yield rows, (f"{block}.down",)
    yield "", ("norm", "post_norm")  # Whisper's, and a ViT's that has one
