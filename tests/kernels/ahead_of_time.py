"""Compiles a Triton kernel for Hopper on a machine without a GPU and reads registers, spills and SASS of the result."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes that one program may have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """registers, stack bytes (spills) per thread; shared bytes per program; count of instructions; SASS."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    def exps_under_product(self) -> int:
        """Exponentials issued while a product is in flight: after its HGMMA and before the wait that drains it."""
        most = running = 0
        in_flight = False
        for line in self.sass.splitlines():
            if "HGMMA" in line:
                in_flight = True
            elif wait := re.search(r"WARPGROUP\.DEPBAR\S* \S+ (0x\w+)", line):
                in_flight = in_flight and int(wait[1], 16) > 0
                running = running if in_flight else 0
            elif in_flight and "MUFU.EX2" in line:
                running += 1
                most = max(most, running)
        return most


def compile_for_hopper(kernel, types: dict[str, str], constants: dict, aligned: list[str] = (), **options) -> Compiled:
    """``types`` names every run-time argument ("*bf16", "i32", "tensordesc<bf16[1,128,64]>"); ``constants`` the rest.

    ``aligned`` arguments are multiples of 16, as the launcher finds them in practice.
    """
    names = [parameter.name for parameter in kernel.params]
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source_class = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_class(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(result.asm["cubin"])
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", path], text=True)
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", path], text=True)
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(registers, stack, result.metadata.shared, sass)
