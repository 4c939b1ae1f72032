"""What a model computes, counted: the matrix products and attentions of each module, in the order in which they run.

A count is how often something happens for a row of tokens. A linear of n parameters takes 2 n FLOPs for each of its
rows; attention takes 4 A for each pair of a query and a key that it sees, where A is the width of all heads together.
"""

import math
from collections.abc import Iterator
from itertools import chain

from avlm.config.connector import ResamplerConfig
from avlm.config.contrastive import TextConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.model import TOWERS, AudioConfig, ModelConfig, PoolConfig, ProjectorConfig, VisionConfig
from avlm.models.batch import Batch, Size
from avlm.models.codes import code_counts, codec_steps
from avlm.models.conformer import ADAPTER, RELATIVE, conformer_steps, relative_counts
from avlm.models.lora import is_adapter
from avlm.models.patches import window_lengths
from avlm.models.projector import LAYERS
from avlm.models.shapes import Shapes, parameter_shapes
from kernels.segments import Segments

Step = tuple[str, tuple[str, ...]]  # its count, "" if it has no product; modules that share an input


def counts(batch: Batch) -> dict[str, int]:
    """The counts of a packed row. The batch is on the host, before ranks share it.

    A causal query sees the keys up to itself, so a document of L tokens has L (L + 1) / 2 pairs; in layers with a
    sliding window it sees at most as many as that, and with ``decoder.bidirectional`` some that follow it. An image or
    a window of audio has L^2, and so has each window of an image. The padding at the end of a row is computed as one
    more document. Convolutions work on whole windows of audio, the head on rows with a target.
    """
    found = {
        "batches": 1,
        "tokens": len(batch.token_T),
        "real_tokens": batch.num_tokens,
        "token_pairs": pairs(batch.segments),
        "targets": len(batch.target_R),
        "patches": len(batch.image.values),
        **(batch.audio.windows.counts if batch.audio.windows is not None else {}),
    }
    if batch.pairs is not None:
        lengths = [length for _, length in batch.segments.spans]
        found["text_rows"] = len(batch.token_T)
        found["causal_text_pairs"] = pairs(batch.segments)
        found["text_pairs"] = sum(length**2 for length in lengths)
        for tower, pooled in batch.pairs.media.items():
            found |= {f"{tower}_pooled": len(pooled.rows), f"{tower}_media": len(pooled.pairs)}
    if batch.codes is not None:
        found |= code_counts(*batch.codes.code_FK.shape)
    if batch.windowed is not None:
        found["window_pairs"] = pairs(batch.windowed)
    if batch.media_row is not None:
        found |= {"features": batch.media_row.num_rows, "feature_pairs": pairs(batch.media_row.tokens)}
    for modality, media in batch.media.items():
        found[f"{modality}_rows"] = sum(media.lengths)
        found[f"{modality}_pairs"] = sum(length**2 for length in media.lengths)
        found[f"{modality}_projected"] = len(media.sources)
        if media.queries is not None:
            sets = list(zip((length for _, length in media.queries.queries.spans), media.queries.rows.spans))
            found |= counts_of_sets(modality, [(num_queries, num_rows) for num_queries, (_, num_rows) in sets])
            found |= media.queries.counts
        if media.places is not None and media.places.windows is not None:
            found[f"{modality}_window_pairs"] = sum(length**2 for _, length in media.places.windows.spans)
    return found


def counts_of_sets(modality: str, sets: list[tuple[int, int]]) -> dict[str, int]:
    """Of the sets of a resampler, each so many queries and the rows of the tower that they read."""
    return {
        f"{modality}_queries": sum(queries for queries, _ in sets),
        f"{modality}_read": sum(rows for _, rows in sets),
        f"{modality}_query_pairs": sum(queries**2 for queries, _ in sets),
        f"{modality}_read_pairs": sum(queries * rows for queries, rows in sets),
    }


def pairs(documents: Segments) -> int:
    """Of a query and a key that it sees, in one layer."""
    seen = documents.intervals
    if seen is None:
        return sum(length * (length + 1) // 2 for _, length in documents.spans)
    return int((seen.last_T - seen.first_T + 1).sum())


def item_costs(modality: str, sizes: list[Size], model: ModelConfig) -> list[int]:
    """FLOPs of the forward of a tower and its resampler over each item, adapters not counted: a n + b n^2 for n rows of
    the tower, and where some layers have windows, of w rows each, c times the sum of w^2."""
    name = TOWERS[modality]
    projector = getattr(model, f"{name}_projector")
    shapes = parameter_shapes(model)
    tower = getattr(model, name)
    per_row = per_pair = per_window_pair = 0
    of_stem: dict[str, int] = {}  # by their counts in a window of audio
    stem_counts = tower.stem_counts(0) if isinstance(tower, AudioConfig) else {}
    for count, paths in steps(name, model):
        if not count:
            continue
        for path in paths:
            if count.endswith("window_pairs"):
                per_window_pair += attention_cost(path, model)
            elif path.endswith(RELATIVE):
                per_pair += 2 * attention_cost(path, model)  # about two relative positions for each pair
            elif path.endswith("core"):
                per_pair += attention_cost(path, model)
            elif count != "relative_rows":  # of the longest item alone
                product = 2 * math.prod(shapes[f"{path}.weight"])
                if count in stem_counts:
                    of_stem[count] = of_stem.get(count, 0) + product
                else:
                    per_row += product
    costs = []
    for size in sizes:
        num_rows = tower.rows_of(size)
        cost = per_row * num_rows + per_pair * num_rows**2
        if per_window_pair and not isinstance(size, int):
            cost += per_window_pair * sum(length**2 for length in window_lengths(size, tower.window))
        if isinstance(size, int):
            cost += sum(of_stem[count] * number for count, number in tower.stem_counts(size).items())
        if projector.resampler is not None:
            num_rows = tower.outputs_of(size)
            counted = counts_of_sets(modality, projector.resampler.sets_of(num_rows))
            counted |= relative_counts([num_rows], projector.resampler.conv_kernel, ADAPTER)
            for count, paths in steps(f"{name}_projector", model):
                for path in paths if count in counted else ():
                    cost += counted[count] * forward_cost(path, model, shapes)
        costs.append(cost)
    return costs


def forward_cost(path: str, model: ModelConfig, shapes: Shapes) -> int:
    """FLOPs of a product, or of an attention, for each of its count."""
    if path.endswith("core"):
        return attention_cost(path, model)
    return product_flops(path, shapes[f"{path}.weight"], model)


def attention_cost(path: str, model: ModelConfig) -> int:
    """FLOPs of a pair of a query and a key, forward, of the attention core at a path; of a query and a relative
    position, of what is added to its scores."""
    module = path.split(".")[0]
    if module in ("decoder", "cross"):
        return 4 * model.decoder.num_heads * model.decoder.head_dim
    tower = getattr(model, module.removesuffix("_projector"))
    width = tower.hidden_size
    if module.endswith("_projector"):
        width = getattr(model, module).resampler.attention_size(width)
    return (2 if path.endswith(RELATIVE) else 4) * width


def product_flops(path: str, shape: tuple[int, ...], model: ModelConfig) -> int:
    """FLOPs of a product for each of its count. Of the weights of all experts a token meets those of its own."""
    experts = model.decoder.experts
    if ".experts." in path and experts is not None:
        return 2 * math.prod(shape) // experts.num * experts.per_token
    return 2 * math.prod(shape)


def block_products(block: str, model: ModelConfig) -> list[str]:
    """The linears of a block, MODULE.blocks.i, in the order in which they run; without those that have no more outputs
    than adapters, from which recomputation could not tell them."""
    shapes = parameter_shapes(model)
    rank = model.lora.rank if model.lora else 0
    found = []
    for count, paths in steps(block.partition(".")[0], model):
        is_matrix = count not in ("", "conv_places")
        products = [path for path in paths if is_matrix and path.startswith(f"{block}.") and not path.endswith("core")]
        found += [path for path in products if min(shapes[f"{path}.weight"][-2:]) > rank]
    return found


def kinds_of_blocks(module: str, model: ModelConfig) -> dict[str, int]:
    """The path of the first block of each kind, MODULE.blocks.i -> how many there are: the decoder's with experts and
    those without; in any other module, which is a tower or cross, one kind."""
    if module == "cross" and model.cross is not None:
        return {"cross.blocks.0": model.cross.num_blocks(model.decoder.num_layers)}
    if module != "decoder":
        return {f"{module}.blocks.0": getattr(model, module).num_blocks}
    layers = [model.decoder.has_experts(i) for i in range(model.decoder.num_layers)]
    return {f"decoder.blocks.{layers.index(kind)}": layers.count(kind) for kind in sorted(set(layers))}


def largest_block(module: str, model: ModelConfig) -> str:
    """The path of the block with the most parameters."""
    shapes = parameter_shapes(model)

    def size(block: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{block}."))

    return max(kinds_of_blocks(module, model), key=size)


def steps(module: str, model: ModelConfig) -> Iterator[Step]:
    """The submodules of a module of the model, by path. Norms and embeddings have no product."""
    return chain.from_iterable(branches(module, model))


def branches(module: str, model: ModelConfig) -> list[list[Step]]:
    """The same, apart for the parts of a module that each read its input: the projectors of DeepStack."""
    config = getattr(model, module)
    if module == "decoder":
        found = [_decoder(config)]
    elif module == "cross":
        found = [_cross(config.num_blocks(model.decoder.num_layers), model.decoder)]
    elif module == "vision":
        found = [_vision(config)]
    elif module == "audio":
        found = [_audio(config)]
    elif module == "text":
        found = [_text(config)]
    elif module == "contrastive":
        found = [_text_head(), *(_head(tower, pool) for tower, pool in model.pools.items())]
    elif module == "codec":
        found = [codec_steps(config.num_codebooks, _decoder(config.depth))]
    else:
        modality, tower = next(entry for entry in TOWERS.items() if module == f"{entry[1]}_projector")
        found = _projectors(config, modality, getattr(model, tower))
    return [[(count, tuple(f"{module}.{name}" for name in names)) for count, names in branch] for branch in found]


def check_steps(model: ModelConfig, shapes: Shapes) -> None:
    """ValueError for a parameter of the model that no step covers, whose products would be left out of every count."""
    covered = {path for module in model.modules for _, paths in steps(module, model) for path in paths}
    for name in shapes:
        path = name.removesuffix(".weight").removesuffix(".bias")
        if path not in covered and not is_adapter(name):
            raise ValueError(f"{name} belongs to no step of avlm/models/costs.py: its FLOPs would not be counted")


def _decoder(config: DecoderConfig) -> Iterator[Step]:
    yield "", ("embedding",)
    for i in range(config.num_layers):
        block, attention = f"blocks.{i}", f"blocks.{i}.attention"
        yield "", (f"{block}.attention_norm",)
        yield "tokens", (f"{attention}.q", f"{attention}.k", f"{attention}.v")
        yield "", (f"{attention}.q_norm", f"{attention}.k_norm")
        yield "window_pairs" if config.has_window(i) else "token_pairs", (f"{attention}.core",)
        yield "tokens", (f"{attention}.o",)
        yield "", (f"{block}.attention_post_norm", f"{block}.ffn_norm")
        yield from _feed_forward(config, i, f"{block}.ffn")
        yield "", (f"{block}.ffn_post_norm",)
    yield "", ("norm",)
    yield "targets", ("head",)


def _feed_forward(config: DecoderConfig, layer: int, ffn: str) -> Iterator[Step]:
    """What fills the end of a row goes to no expert."""
    if config.experts is None or not config.has_experts(layer):
        yield "tokens", (f"{ffn}.gate", f"{ffn}.up")
        yield "tokens", (f"{ffn}.down",)
        return
    yield "tokens", (f"{ffn}.router",)
    yield "real_tokens", (f"{ffn}.experts.gate", f"{ffn}.experts.up")
    yield "real_tokens", (f"{ffn}.experts.down",)
    if config.experts.shared_size:
        yield "tokens", (f"{ffn}.shared_gate",)
        yield "tokens", (f"{ffn}.shared.gate", f"{ffn}.shared.up")
        yield "tokens", (f"{ffn}.shared.down",)


def _cross(num_blocks: int, decoder: DecoderConfig) -> Iterator[Step]:
    for i in range(num_blocks):
        block, attention = f"blocks.{i}", f"blocks.{i}.attention"
        yield "", (f"{block}.attention_norm",)
        yield "tokens", (f"{attention}.q",)
        yield "features", (f"{attention}.k", f"{attention}.v")
        yield "", (f"{attention}.q_norm", f"{attention}.k_norm")
        yield "feature_pairs", (f"{attention}.core",)
        yield "tokens", (f"{attention}.o",)
        yield "", (f"{block}.attention_gate", f"{block}.ffn_gate", f"{block}.ffn_norm")
        yield "tokens", (f"{block}.ffn.gate", f"{block}.ffn.up")
        yield "tokens", (f"{block}.ffn.down",)


def _vision(config: VisionConfig) -> Iterator[Step]:
    yield "patches", ("patch",)
    yield "", ("class_token", "position", "pre_norm")
    yield from _encoder(config, "image")


def _audio(config: AudioConfig) -> Iterator[Step]:
    if config.stem == "conv1d":
        yield "frames", ("conv1",)
        yield "strided_frames", ("conv2",)
    else:
        yield "halved_1", ("conv1",)
        yield "halved_2", ("conv2", "point2")[: 1 + (config.stem == "depthwise")]
        yield "halved_3", ("conv3", "point3")[: 1 + (config.stem == "depthwise")]
        yield "stem_rows", ("stem_out",)
    of_conformer = config.num_blocks, "audio_rows", "audio_pairs"
    yield from _encoder(config, "audio") if config.block == "whisper" else conformer_steps(*of_conformer)


def _text(config: TextConfig) -> Iterator[Step]:
    yield "", ("embedding", "position")
    yield from _encoder(config, "causal_text" if config.causal else "text")


def _text_head() -> Iterator[Step]:
    yield "targets", ("text.projection",)
    yield "", ("logit_scale", "logit_bias")


def _head(tower: str, config: PoolConfig) -> Iterator[Step]:
    """The products of embeddings with each other are left out: 4 C for each pair of the step, of N that a rank has. So
    are those of the query that pools."""
    pool = f"{tower}.pool"
    if config.pool == "attention":
        yield f"{tower}_pooled", (f"{pool}.k", f"{pool}.v")
        yield "", (f"{pool}.probe",)
        yield "batches", (f"{pool}.q",)
        yield f"{tower}_media", (f"{pool}.o",)
        yield "", (f"{pool}.norm",)
        yield f"{tower}_media", (f"{pool}.up",)
        yield f"{tower}_media", (f"{pool}.down",)
    yield f"{tower}_media", (f"{tower}.projection",)


def _encoder(config: VisionConfig | AudioConfig | TextConfig, modality: str) -> Iterator[Step]:
    rows = f"{modality.removeprefix('causal_')}_rows"
    is_gated = isinstance(config, VisionConfig) and config.gated
    for i in range(config.num_blocks):
        block, attention = f"blocks.{i}", f"blocks.{i}.attention"
        has_window = isinstance(config, VisionConfig) and config.has_window(i)
        pairs = f"{modality}_window_pairs" if has_window else f"{modality}_pairs"
        yield "", (f"{block}.attention_norm",)
        yield rows, (f"{attention}.q", f"{attention}.k", f"{attention}.v")
        yield "", (f"{attention}.q_norm", f"{attention}.k_norm")
        yield pairs, (f"{attention}.core",)
        yield rows, (f"{attention}.o",)
        yield "", (f"{block}.attention_scale", f"{block}.ffn_scale", f"{block}.ffn_norm")
        yield rows, (f"{block}.gate", f"{block}.up") if is_gated else (f"{block}.up",)
        yield rows, (f"{block}.down",)
    yield "", ("norm", "post_norm")  # Whisper's norm, or the post_norm of a ViT


def _projectors(config: ProjectorConfig, modality: str, tower: VisionConfig | AudioConfig) -> Iterator[list[Step]]:
    rows = f"{modality}_projected"
    resampler = [] if config.resampler is None else list(_resampler(config.resampler, modality))
    merger = [(rows, ("merger",))] if config.merge else []
    others = ("feature_norm", "hidden_norm", "output_norm", "newline")
    yield [*resampler, ("", ("norm",)), *merger, ("", others), *((rows, layers) for layers in LAYERS[config.type])]
    if isinstance(tower, VisionConfig):
        for i in range(len(tower.deepstack_layers)):
            yield [("", (f"deep.{i}.norm",)), (rows, (f"deep.{i}.up",)), (rows, (f"deep.{i}.down",))]


def _resampler(config: ResamplerConfig, modality: str) -> Iterator[Step]:
    """The queries of a perceiver read themselves as well."""
    queries, read = f"{modality}_queries", f"{modality}_read"
    if config.type == "conformer":
        yield queries, ("resampler.linear",)
        for count, paths in conformer_steps(config.num_layers, queries, f"{modality}_query_pairs", ADAPTER):
            yield count, tuple(f"resampler.{path}" for path in paths)
        return
    yield "", ("resampler.queries", "resampler.first_norm")
    for i in range(config.num_layers):
        block = f"resampler.blocks.{i}"
        reading = f"{block}.reading"
        if config.type == "qformer":
            attention = f"{block}.attention"
            yield queries, (f"{attention}.q", f"{attention}.k", f"{attention}.v")
            yield f"{modality}_query_pairs", (f"{attention}.core",)
            yield queries, (f"{attention}.o",)
        if i % config.read_every == 0:
            yield "", (f"{block}.attention_norm", f"{block}.queries_norm", f"{block}.rows_norm")
            yield queries, (f"{reading}.q",)
            yield read, (f"{reading}.k", f"{reading}.v")
            if config.type == "perceiver":
                yield queries, (f"{reading}.k", f"{reading}.v")
                yield f"{modality}_query_pairs", (f"{reading}.core",)
            yield f"{modality}_read_pairs", (f"{reading}.core",)
            yield queries, (f"{reading}.o",)
        yield "", (f"{block}.attention_norm", f"{block}.reading_norm", f"{block}.ffn_norm")
        yield queries, (f"{block}.gate", f"{block}.up") if config.gated else (f"{block}.up",)
        yield queries, (f"{block}.down",)
    yield "", ("resampler.last_norm",)
