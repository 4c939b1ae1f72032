"""How long a row takes to the ranks that share it, and how many bytes arrive, against broadcasting it as a pickle:

    python -m tests.measurements.rows_to_ranks [--tokens 131072] [--ranks 4]

Seven images and two windows of 30 s for every 8,192 tokens, of CLIP's and Whisper's sizes. Both ways take turns in one
run; no step is computed, so nothing is hidden behind one.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.batch import AUDIO, IGNORE, IMAGE, Batch
from avlm.parallel import rows
from avlm.parallel.apply import own_part
from avlm.parallel.mesh import World, lay_out
from tests.parallel.spawn import run_ranks

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "num_layers": 24}
MODEL = ModelConfig(
    decoder=DecoderConfig(vocab_size=32000, num_kv_heads=8, **SIZES),
    vision=VisionConfig(image_size=336, patch_size=14, **SIZES),
    audio=AudioConfig(num_mels=80, **SIZES),
    vision_projector=ProjectorConfig(),
    audio_projector=ProjectorConfig(downsample=2),
)
PATCHES, FRAMES = 576, 3000


def make_row(num_tokens: int) -> Batch:
    """One document for every 8,192 tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (24, 24, MODEL.vision.patch_numbers)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(7)]
    windows = [torch.randn(80, FRAMES, generator=generator) for _ in range(2)]
    token_T = torch.tensor([*[IMAGE] * 7 * PATCHES, *[AUDIO] * 2 * 750, *[5] * 2000])
    target_T = torch.where(token_T == 5, 5, IGNORE)
    sample = EncodedSample("", "mixed", token_T, target_T, {"image": images, "audio": windows})
    return pack([sample] * (num_tokens // 8192), num_tokens, MODEL)


class Counted:
    """``received``: bytes that this rank receives by the two ways in which rows travel."""

    def __enter__(self) -> "Counted":
        self.received = 0
        self.kept = rows.dist.broadcast, dist.all_to_all_single
        broadcast, all_to_all = self.kept

        def counting_broadcast(tensor, *args, group, group_src, **options):
            self.received += tensor.nbytes * (group.rank() != group_src)
            return broadcast(tensor, *args, group=group, group_src=group_src, **options)

        def counting_all_to_all(arrived, sent, receive_counts, send_counts, group):
            self.received += arrived.element_size() * (sum(receive_counts) - receive_counts[group.rank()])
            return all_to_all(arrived, sent, receive_counts, send_counts, group=group)

        dist.broadcast, dist.all_to_all_single = counting_broadcast, counting_all_to_all
        return self

    def __exit__(self, *error) -> None:
        dist.broadcast, dist.all_to_all_single = self.kept


def needed(whole: Batch, part: Batch) -> int:
    """Bytes that a rank needs: the tokens of the whole row, their positions, targets and places, and its own media."""
    facts = [whole.token_T, whole.position_T, whole.target_rows_R, whole.target_R, whole.kind_R]
    facts += [tensor for media in whole.media.values() for tensor in (media.rows, media.sources, media.newlines)]
    windows = [item.numel() * 4 for item in part.audio.items(MODEL.audio)]
    return sum(4 * tensor.numel() for tensor in facts) + part.image.values.nbytes + sum(windows)


def as_before(row: Batch | None, world: World) -> Batch:
    shared = [row]
    dist.broadcast_object_list(shared, group=world.row_group, group_src=0, device=torch.device("cpu"))
    return own_part(shared[0], MODEL, replace(world, media_host_group=None))  # every rank holds all media


def as_now(row: Batch | None, world: World) -> Batch:
    batch = next(rows.share_rows([row] if row else None, world))
    return own_part(batch, MODEL, world)


def measure(num_tokens: int, repeats: int) -> tuple[dict, int, int]:
    dist.init_process_group("gloo")
    world = lay_out((1, 1, dist.get_world_size(), 1), torch.device("cpu"))
    row = make_row(num_tokens)
    own = row if world.leads_row else None
    seconds = {"before": [], "now": []}
    for _ in range(repeats):
        for name, way in (("before", as_before), ("now", as_now)):
            world.barrier()
            started = time.perf_counter()
            part = way(own, world)
            world.barrier()
            seconds[name].append(time.perf_counter() - started)
    with Counted() as counted:
        part = as_now(own, world)
    dist.destroy_process_group()
    return seconds, counted.received, needed(row, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found = run_ranks(measure, args.ranks, args.tokens, args.repeats)
    seconds = found[0][0]
    before, now = (statistics.median(seconds[name]) for name in ("before", "now"))
    print(
        f"seconds of a row of {args.tokens} tokens to {args.ranks} ranks: {before:.3f} before, {now:.3f} now: ", end=""
    )
    print(f"{before / now:.1f} times as fast")
    for rank, (_, received, need) in enumerate(found):
        print(f"rank {rank}: {received / 2**20:.2f} MiB received, {need / 2**20:.2f} needed")


if __name__ == "__main__":
    main()
