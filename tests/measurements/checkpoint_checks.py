"""What it costs that the contents of a checkpoint are compared with their checksums:

    python -m tests.measurements.checkpoint_checks [GIB]

Reads weights of so many GiB (0.5) with DCP's own reader and with ours, in turn, from memory rather than from a disk.
"""

import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from avlm.storage.checkpoint_files import Reader


def main() -> None:
    gib = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors = {str(i): torch.randn(4096, 2048) for i in range(round(32 * gib))}
    seconds = {dcp.FileSystemReader: [], Reader: []}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(tensors, checkpoint_id=folder)
        for _ in range(3):
            for reader, times in seconds.items():
                started = time.perf_counter()
                dcp.load(tensors, storage_reader=reader(folder))
                times.append(time.perf_counter() - started)
    plain, checked = (statistics.median(times) for times in seconds.values())
    print(f"{gib:g} GiB: {plain:.2f} s as they are, {checked:.2f} s checked: {checked / plain:.1f} times")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
