"""What the compiler makes of the kernels that our functions launch, for any NVIDIA GPU, on a machine that has none.

A stand-in driver names the architecture. Each launch compiles its kernel, for the signature that Triton makes of the
real arguments, and runs nothing.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import launch

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {sm: kb * 1024 for sm, kb in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: the name of its function; registers and stack bytes (spills) of a thread; shared bytes of a
    program; its code in Triton's GPU dialect, PTX and SASS."""

    name: str
    cubin: bytes
    shared: int
    ttgir: str
    ptx: str

    @cached_property
    def _usage(self) -> tuple[int, int]:
        text = _read(self.cubin, "cuobjdump", "--dump-resource-usage")
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        return int(registers), int(stack)

    @property
    def registers(self) -> int:
        return self._usage[0]

    @property
    def stack(self) -> int:
        return self._usage[1]

    @cached_property
    def sass(self) -> str:
        return _read(self.cubin, "nvdisasm", "-c")

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    def exponentials_under_a_product(self) -> int:
        """The most that are issued while a product is in flight: after its HGMMA and before the wait that drains it."""
        most = running = 0
        in_flight = False
        for line in self.sass.splitlines():
            if "HGMMA" in line:
                in_flight = True
            elif (left := _left_by_wait(line)) is not None:
                in_flight = in_flight and left > 0
                running = running if in_flight else 0
            elif in_flight and "MUFU.EX2" in line:
                running += 1
                most = max(most, running)
        return most

    def exponentials_per_wait(self) -> list[int]:
        """Between each wait that leaves a product in flight and the next wait."""
        counts: list[int] = []
        in_flight = False
        for line in self.sass.splitlines():
            if (left := _left_by_wait(line)) is not None:
                in_flight = left > 0
                counts += [0] * in_flight
            elif in_flight and "MUFU.EX2" in line:
                counts[-1] += 1
        return counts


def _left_by_wait(line: str) -> int | None:
    """How many groups of products a wait leaves in flight; None if the instruction is none."""
    wait = re.search(r"WARPGROUP\.DEPBAR\S* \S+ (0x\w+)", line)
    return int(wait[1], 16) if wait else None


def _read(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.check_output([TOOLS / tool, *options, path], text=True)


@dataclass(frozen=True)
class _Driver:
    """Of a GPU of architecture ``sm`` that is only compiled for: what Triton asks a driver before it launches."""

    sm: int

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def compiled_by(call: Callable[[], object], sm: int = 90) -> list[Compiled]:
    """The kernels that ``call`` launches on a GPU of architecture ``sm``, in order, each as often as it is launched."""
    found = []
    run = JITFunction.run
    active = triton.runtime.driver._active

    def compile_only(kernel, *arguments, grid, warmup, **options):
        kernel.device_caches.clear()  # they know devices, not architectures
        result = run(kernel, *arguments, grid=grid, warmup=True, **options)
        asm = result.asm
        found.append(Compiled(kernel.fn.__name__, asm["cubin"], result.metadata.shared, asm["ttgir"], asm["ptx"]))
        return result

    launch.forget()
    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_Driver(sm))
    try:
        call()
    finally:
        launch.forget()
        JITFunction.run = run
        triton.runtime.driver._active = active
    return found
