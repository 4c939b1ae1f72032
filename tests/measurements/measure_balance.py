"""What sharing the media of all rows saves, when one of two ranks has twenty images and the other none.

    python -m tests.measurements.measure_balance [--repeats N]      (from the repository root)

Times the vision tower of a step, on two gloo ranks of one thread each: its forward and backward, with the split before
it and the exchange behind it, from a common start until both ranks are done. Off and on take turns, and the fastest of
each counts: what else runs on the machine only adds. Where its two cores are not free, the CPU seconds of the busier
rank are the fairer number.
"""

import argparse
import time

import torch
import torch.distributed as dist

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.parallel.apply import own_part
from avlm.parallel.exchange import apply_media
from avlm.parallel.mesh import lay_out
from tests.parallel.spawn import run_ranks

IMAGES = 20
SIDE = 16  # patches
MODEL = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, num_kv_heads=2
    ),
    vision=VisionConfig(
        **{"hidden_size": 192, "intermediate_size": 768, "num_layers": 5, "num_heads": 3},
        **{"image_size": 14 * SIDE, "patch_size": 14},
    ),
    vision_projector=ProjectorConfig(downsample=2),
)


def make_batch(num_images):
    token_T = torch.full((num_images * SIDE**2 // 4,), -200)
    patches = torch.randint(0, 255, (num_images, SIDE, SIDE, MODEL.vision.patch_numbers), dtype=torch.uint8)
    sample = EncodedSample("", "image", token_T, torch.full_like(token_T, -100), {"image": list(patches)})
    return pack([sample], IMAGES * SIDE**2 // 4, MODEL)


def step(model, batch, world):
    """Seconds until all ranks are done, of those the split takes, this rank's CPU seconds, and images encoded here."""
    model.zero_grad()
    world.barrier()
    start, busy = time.perf_counter(), time.process_time()
    local = own_part(batch, MODEL, world)
    split = time.perf_counter() - start
    model.embed(local)[0].sum().backward()
    busy = time.process_time() - busy
    world.barrier()
    return time.perf_counter() - start, split, busy, len(local.image.sizes)


def measure(repeats):
    dist.init_process_group("gloo")
    worlds = {balance: lay_out((1, 2, 1, 1), torch.device("cpu"), balance) for balance in (False, True)}
    model = AVLM(MODEL)
    init(model)
    apply_media(model)
    batch = make_batch(IMAGES if worlds[False].is_first else 0)
    steps = {False: [], True: []}
    for _ in range(repeats + 1):
        for balance, taken in steps.items():
            taken.append(step(model, batch, worlds[balance]))
    dist.destroy_process_group()
    return {balance: taken[1:] for balance, taken in steps.items()}  # without the first, which warms up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    ranks = run_ranks(measure, 2, parser.parse_args().repeats)
    seconds, busiest = {}, {}
    for balance, name in ((False, "off"), (True, "on")):
        seconds[balance], split, *_ = min(ranks[0][balance])
        busiest[balance] = max(min(busy for _, _, busy, _ in steps[balance]) for steps in ranks)
        images = [steps[balance][0][-1] for steps in ranks]
        print(
            f"balance {name:3}  {seconds[balance]:.3f} s, {split:.3f} s of it in split; "
            f"busier rank {busiest[balance]:.3f} CPU s; images of each rank {images}"
        )
    print(f"without / with: {seconds[False] / seconds[True]:.2f}, of the busier rank's CPU seconds ", end="")
    print(f"{busiest[False] / busiest[True]:.2f} (at best 2)")
