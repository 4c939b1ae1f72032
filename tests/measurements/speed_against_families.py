"""Forward and backward of a small Qwen2.5-VL or InternVL3 on rows of images of mixed sizes, or of a small Qwen3-MoE on
texts of mixed lengths, packed, against transformers' own model.

    python -m tests.measurements.speed_against_families [qwen2_5_vl | internvl | qwen3_moe] [--seconds N]

Both sides have the same sizes, weights and samples, float32, one CPU thread. Ours takes a row as the loader packs it;
theirs takes the samples of that row as a batch, padded on the right to the longest. To their favour: its vision tower
takes the patches or tiles of all images without padding, as its processor gives them, and attention is PyTorch's.
Making a batch is timed on neither side.

Images of Qwen have 4 to 512 features, their logarithm spread evenly, and side ratios up to 3; those of InternVL have up
to 12 tiles and the whole image, of 16 features each. Each has 8 to 64 tokens of text; texts alone have 16 to 1,024,
their logarithm spread evenly. transformers runs experts by torch's grouped product, as we do.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from avlm.config.decoder import DecoderConfig
from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.data.features import of_images
from avlm.data.media.tiles import tiling_of
from avlm.data.packing import pack, select
from avlm.data.positions import Placed, of_grid, positions
from avlm.data.sample import EncodedSample
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, IMAGE, Batch
from avlm.models.patches import Grid
from avlm.models.vit import normalise
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights

ROW, NUM_SAMPLES, VOCABULARY = 2048, 80, 1000
IMAGE_ID, START, END = 996, 998, 999
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
VISION = {"depth": 8, "hidden_size": 64, "out_hidden_size": 256, "intermediate_size": 192, "num_heads": 2}
VISION |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7]}
IDS = {"image_token_id": IMAGE_ID, "video_token_id": 997, "vision_start_token_id": START, "vision_end_token_id": END}
TILE, PATCH = 112, 14
TILES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 2}
TILES |= {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "attention_bias": True}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "head_dim": 64}
UNTIED = {"tie_word_embeddings": False}


def build(family: str) -> nn.Module:
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **EXPERTS, **UNTIED))
    if family == "internvl":
        text = {"model_type": "qwen2", **TEXT}
        config = InternVLConfig(text_config=text, vision_config=TILES, image_token_id=IMAGE_ID, **UNTIED)
        return InternVLForConditionalGeneration(config)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=VISION, **IDS)
    )


def make_samples(config: ModelConfig, draw: random.Random) -> list[EncodedSample]:
    samples = []
    for _ in range(NUM_SAMPLES):
        ratio = 3 ** draw.uniform(-1, 1)
        if config.vision is None:
            token_T = torch.tensor([draw.randrange(IMAGE_ID) for _ in range(round(16 * 64 ** draw.random()))])
            target_T = torch.cat([token_T[1:], torch.tensor([IGNORE])])
            samples.append(EncodedSample("", "text", token_T, target_T, {}))
            continue
        if config.vision.any_grid:
            grids, num_features, placed = _of_any_grid(4 * 128 ** draw.random(), ratio)
        else:
            height = draw.uniform(0.5, 3.5) * TILE
            tiling = tiling_of((round(height), round(height * ratio)), config.vision, ImageLayout(tiles="aspect"))
            side = config.vision.patches_per_side
            grids, placed = [(side, side)] * tiling.num_views, []
            num_features = len(of_images(grids, config))
        text = [draw.randrange(IMAGE_ID) for _ in range(draw.randint(8, 64))]
        ids = [START, *[IMAGE] * num_features, END, *text]
        token_T = torch.tensor(ids)
        target_T = torch.full_like(token_T, IGNORE)
        target_T[-len(text) : -1] = token_T[-len(text) + 1 :]
        shapes = [(*grid, config.vision.patch_numbers) for grid in grids]
        patches = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
        position = positions(len(ids), placed) if placed else None
        samples.append(EncodedSample("", "image", token_T, target_T, {"image": patches}, position))
    return samples


def _of_any_grid(num_features: float, ratio: float) -> tuple[list[Grid], int, list[Placed]]:
    """Of an image of one view with about so many features: its patches, its features and their positions."""
    lines = max(1, round((num_features * ratio) ** 0.5))
    columns = max(1, round((num_features / ratio) ** 0.5))
    return [(2 * lines, 2 * columns)], lines * columns, [Placed(1, of_grid([0], lines, columns))]


def pad(samples: list[EncodedSample], config: ModelConfig) -> dict[str, Tensor]:
    """The samples as a right-padded batch, as transformers' processor makes it."""
    ids = [sample.token_T.where(sample.token_T != IMAGE, IMAGE_ID) for sample in samples]
    # A label stands at its token, not at the one before.
    labels = [torch.cat([sample.target_T.new_full((1,), IGNORE), sample.target_T[:-1]]) for sample in samples]
    items = [item for sample in samples for item in sample.media.get("image", [])]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
    if config.vision is None:
        return batch
    if not config.vision.any_grid:
        pattern = "(y x) (c i j) -> c (y i) (x j)"
        sides = {"y": TILE // PATCH, "i": PATCH, "j": PATCH}
        views = [rearrange(normalise(item.flatten(0, 1), config.vision), pattern, **sides) for item in items]
        return {**batch, "pixel_values": torch.stack(views)}
    by_features = [rearrange(item, "(y i) (x j) n -> (y x i j) n", i=2, j=2) for item in items]
    return {
        **batch,
        "mm_token_type_ids": pad_sequence([(each == IMAGE_ID).long() for each in ids], batch_first=True),
        "pixel_values": normalise(torch.cat(by_features), config.vision),
        "image_grid_thw": torch.tensor([(1, *item.shape[:2]) for item in items]),
    }


@torch.no_grad()
def check(ours: AVLM, theirs: nn.Module, rows: list[Batch], padded: list[dict[str, Tensor]]) -> None:
    """Both are the same model: the loss of every target."""
    errors = []
    for row, batch in zip(rows, padded):
        learned = batch["labels"][:, 1:] != IGNORE
        logits = theirs(**batch).logits[:, :-1][learned]
        errors.append((ours(row)[1] - F.cross_entropy(logits, row.target_R, reduction="none")).abs().max())
    print(f"losses of {sum(len(row.target_R) for row in rows)} targets differ by at most {max(errors):.1e}")
    assert max(errors) <= 1e-4


def step(loss: Callable[[], Tensor], model: nn.Module) -> float:
    """Seconds of forward and backward."""
    started = time.perf_counter()
    loss().backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=["qwen2_5_vl", "internvl", "qwen3_moe"], default="qwen2_5_vl")
    parser.add_argument("--seconds", type=float, default=60, help="how long to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = build(arguments.family)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = read_config(folder)
        if isinstance(model, DecoderConfig):
            model = ModelConfig(decoder=model)
        ours = AVLM(model)
        load_weights(ours, InitFrom(**{"all" if model.vision else "decoder": folder}))
    samples = make_samples(model, random.Random(0))
    for packing in ("knapsack", "first_fit"):
        chosen = select([len(sample) for sample in samples], ROW, packing)[:-1]  # the last holds what is left over
        compare(packing, [[samples[i] for i in row] for row in chosen], ours, theirs, arguments.seconds / 2)


def compare(packing: str, chosen: list[list[EncodedSample]], ours: AVLM, theirs: nn.Module, seconds: float) -> None:
    rows = [pack(samples, ROW, ours.config) for samples in chosen]
    padded = [pad(samples, ours.config) for samples in chosen]
    check(ours, theirs, rows, padded)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in padded)
    places = len(rows) * ROW, sum(batch["input_ids"].numel() for batch in padded)
    shares = [f"{tokens / count:.0%}" for count in places]
    mean = sum(map(len, chosen)) / len(rows)
    print(f"{packing}: {len(rows)} rows of {mean:.0f} samples: {' and '.join(shares)} are no padding")

    times: tuple[list[float], list[float]] = [], []
    end = None
    while end is None or not times[0] or time.perf_counter() < end:
        for row, batch in zip(rows, padded):
            # ``to`` gives the row new segments, as in training: nothing is known of them from the round before.
            packed = step(lambda: ours(row.to("cpu"))[0] / len(row.target_R), ours)  # noqa: B023
            other = step(lambda: theirs(**batch).loss, theirs)  # noqa: B023
            if end is not None:  # the first round warms up
                times[0].append(packed)
                times[1].append(other)
        end = end or time.perf_counter() + seconds
    a, b = (statistics.median(side) for side in times)
    print(f"packed: {a:.3f} s, padded transformers: {b:.3f} s, ratio {b / a:.2f} (median of {len(times[0])}, 1 thread)")


if __name__ == "__main__":
    main()
