"""What a launch of attention costs the host, by our launches and by Triton's own, without a GPU.

    python -m tests.measurements.launch_time

A stand-in driver takes the launches and does nothing: cuTensorMapEncodeTiled and cuLaunchKernelEx are not counted, nor
is what autograd and torch's dispatcher add. Time of this thread; the least of 20 rounds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import attention_backward, attention_forward, attention_statistics, attention_tiles, launch
from kernels.backend import COMPILER
from kernels.segments import Segments

MODULES = (attention_forward, attention_backward, attention_statistics)
ROUNDS, CALLS = 20, 50


class _Utils:
    def load_binary(self, *_):
        return 1, 1, 0, 0, 1024

    def unload_module(self, *_):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 227 * 1024}

    def fill_tma_descriptor(self, *_):
        return self

    fill_tma_descriptor_tiled = fill_tma_descriptor  # Triton 3.8


class _Launcher:
    """Unpacks descriptors as Triton's launcher does, and launches nothing."""

    def __init__(self, source, metadata):
        signature = dict(enumerate(source.signature.values()))
        self.launch = nvidia.wrap_handle_tensordesc(lambda *_: None, signature, metadata.tensordesc_meta)

    def __call__(self, x, y, z, stream, function, *arguments):
        options, scratch = (False, False), (None, None)
        if COMPILER < (3, 8):
            self.launch(x, y, z, stream, function, *options, *scratch, *arguments)
        else:  # hooks come first, and arguments as one, after what describes them
            self.launch(x, y, z, stream, function, *options, *arguments[:4], *scratch, None, None, arguments[4:])


class _Driver:
    """Of a Hopper GPU."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def nothing_is_launched() -> Iterator[None]:
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver())
    launch.forget()
    try:
        yield
    finally:
        triton.runtime.driver._active = active
        launch.forget()


@contextmanager
def _triton_s_own_launches() -> Iterator[None]:
    ours = launch.launch, launch.descriptor
    by_triton = lambda kernel, programs, arguments, constants: kernel[(programs,)](*arguments, **constants)
    for module in MODULES:
        module.launch = by_triton
    attention_tiles.launch.descriptor = TensorDescriptor
    try:
        yield
    finally:
        for module in MODULES:
            module.launch = ours[0]
        launch.descriptor = ours[1]


def _time(call: Callable[[], object]) -> float:
    """us of this thread for a call."""
    call()
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        least = min(least, (time.thread_time() - start) / CALLS)
    return 1e6 * least


def measure(head_dim: int) -> dict[str, tuple[float, float]]:
    """us of the host for the forward and for the two-pass backward: by our launches, and by Triton's."""
    q, k, v = (torch.zeros(8, 8, head_dim, dtype=torch.bfloat16) for _ in range(3))
    segments = Segments.of([5, 3])
    both = segments, segments

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return attention_forward.forward(q, k, v, *both, True, 0.1)

    def backward() -> None:
        statistics = attention_statistics.statistics(out, q, lse, None)
        attention_backward.backward(q, q, k, v, *statistics, *both, True, 0.1, deterministic=True)

    with nothing_is_launched():
        out, lse = forward()
        ours = [_time(call) for call in (forward, backward)]
        with _triton_s_own_launches():
            theirs = [_time(call) for call in (forward, backward)]
    return dict(zip(("forward", "backward"), zip(ours, theirs)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for head_dim in (64, 128):
        for name, (ours, theirs) in measure(head_dim).items():
            print(
                f"head dim {head_dim:3} {name:8}  ours {ours:4.0f} us  Triton's {theirs:4.0f} us  {ours / theirs:.2f}"
            )
