"""Which implementation of an operation runs on this machine, and how an op is registered with PyTorch.

``kernels.dispatch`` holds the table. ``python -m kernels.backend`` prints what it says for every architecture and for
this machine. Triton reads its environment variables when it is imported, and so do we, here: through ``triton.knobs``.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from kernels import dispatch
from kernels.dispatch import Implementation, Kernel, Row

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly
DEBUG = triton.knobs.runtime.debug  # TRITON_DEBUG=1: indices are checked, which waits for the device

COMPILER = tuple(int(number) for number in triton.__version__.split(".")[:2])

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E)
LN_2 = 0.6931471805599453

SAME_KERNELS = {
    "attention_forward": (dispatch.MASKED_ATTENTION,),
    "attention_backward": (dispatch.LSE_GRADIENT, dispatch.MASKED_ATTENTION),
}  # operation -> others that are wrong if it is

_distrusted: dict[Kernel, str] = {}  # what is wrong with a kernel, in this process


def implementation(operation: str, x: Tensor, head_dim: int | None = None) -> Implementation:
    """What runs an operation on tensors like x: a look-up in a cache, and a constant for torch.compile."""
    if torch.compiler.is_compiling() and head_dim is not None:
        head_dim = range(head_dim).stop  # of a symbol that makes a number, for which the graph is then made
    return _constant(operation, x.device.index if x.is_cuda else None, x.dtype, head_dim)


@torch.compiler.assume_constant_result  # has no effect on what ``cache`` returns
def _constant(operation: str, cuda: int | None, dtype: torch.dtype, head_dim: int | None) -> Implementation:
    return _cached(operation, cuda, dtype, head_dim)


@cache
def _cached(operation: str, cuda: int | None, dtype: torch.dtype, head_dim: int | None) -> Implementation:
    return row(operation, architecture(cuda), dtype, head_dim).implementation


def row(operation: str, arch: int, dtype: torch.dtype, head_dim: int | None = None) -> Row:
    """The row of the table that decides in this process, whose flash attention and whose doubts it knows."""
    state = dict(flash=current_flash_attention_impl(), distrusted=_distrusted)
    if operation in ("attention_backward", dispatch.LSE_GRADIENT):  # autograd connects them in plain PyTorch
        forward = dispatch.choose("attention_forward", arch, dtype, head_dim, **state)
        if forward.implementation == "pytorch":
            return forward
    return dispatch.choose(operation, arch, dtype, head_dim, **state)


@cache
def architecture(cuda: int | None) -> int:
    """Compute capability times ten of the CUDA device with this index; without one that of the CPU."""
    if INTERPRETED:
        return dispatch.INTERPRETER
    if cuda is None:
        return dispatch.CPU
    major, minor = torch.cuda.get_device_capability(cuda)
    return 10 * major + minor


def distrust(kernel: Kernel, wrong: str) -> None:
    """Let another implementation run an operation from here on, in this process. Functions that torch.compile has
    already traced keep the old one."""
    operation, implementation, dtype, head_dim = kernel
    for one in (operation, *SAME_KERNELS.get(operation, ())):
        _distrusted[one, implementation, dtype, head_dim] = f"{implementation} {wrong}"
    _cached.cache_clear()


def trust_all() -> None:
    _distrusted.clear()
    _cached.cache_clear()


def activate_flash_attention(name: str, arch: int) -> None:
    """Let FlashAttention 3 or 4 ("FA3", "FA4") serve as torch's attention over packed rows. ValueError if torch has
    none for the architecture, or if its package is not installed."""
    if arch not in dispatch.FLASH_ATTENTION[name]:
        raise ValueError(f"{name} does not run on sm_{arch}: set kernels.flash_attention=FA2")
    try:
        activate_flash_attention_impl(name)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be activated: {error}") from error
    _cached.cache_clear()


def num_processors(x: Tensor) -> int:
    """Multiprocessors of the GPU; 16 in the interpreter, so that work is shared out there as well."""
    return _properties(x.device.index).multi_processor_count if x.is_cuda else 16


_properties = cache(torch.cuda.get_device_properties)


def needs_graph(*tensors: Tensor) -> bool:
    """Whether autograd records a function of these tensors. If not, call the op and not its autograd.Function:
    torch.compile (2.11) cannot trace a Function whose forward takes no ctx when no input needs a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply(*arguments)`` in a third of its time on the host, which goes into binding the arguments for
    torch.func even where none of its transforms is active."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # pyrefly: ignore[missing-attribute]


def define_op(implementation: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Register ``name_op``, a function of tensors and numbers, as the op ``avlm::name``, which is opaque to
    torch.compile, torch.func and checkpointing. ``fake`` returns empty results of the right shapes and dtypes. Results
    must be new and contiguous; ``mutates`` names the arguments that are written to.

    The op has no derivative; wrap it in an autograd.Function. (torch.library.custom_op of torch 2.11 adds an autograd
    layer of its own, which torch.func refuses.)
    """
    name = implementation.__name__.removesuffix("_op")

    def on_its_device(first: Tensor, *arguments):
        with torch.cuda.device_of(first):
            return implementation(first, *arguments)

    torch.library.define(f"avlm::{name}", torch.library.infer_schema(implementation, mutates_args=mutates))
    torch.library.impl(f"avlm::{name}", ("CPU", "CUDA"), on_its_device)
    torch.library.register_fake(f"avlm::{name}", fake)
    return getattr(torch.ops.avlm, name).default


# What ``python -m kernels.backend`` prints.

EXAMPLES = {
    "bfloat16": (torch.bfloat16, (64, 72, 80, 96, 128, 192, 208, 256, 100, 320)),
    "float32": (torch.float32, (64, 128, 256, 320)),
}  # dtype and head dims


def report() -> str:
    """What runs where: on every architecture, and on this machine with the reasons."""
    archs = [arch for arch in dispatch.ARCHITECTURES if arch > dispatch.INTERPRETER]
    lines = [_line("", [f"sm_{arch}" for arch in archs])]
    lines.append(_line("", [dispatch.ARCHITECTURES[arch].partition(",")[0] for arch in archs]))
    for operations, answers in _answers(archs):
        lines.append(operations)
        lines += [_line(example, [row.implementation for row in rows]) for example, rows in answers.items()]
    flash = current_flash_attention_impl() or "FA2"
    lines += ["", f"varlen is {flash} of torch {torch.__version__}. float16 runs like bfloat16, the CPU in PyTorch."]
    own = architecture(0 if torch.cuda.is_available() else None)
    lines += ["", f"This machine: {dispatch.ARCHITECTURES.get(own, f'sm_{own}')}"]
    for operations, answers in _answers([own]):
        lines.append(operations)
        lines += [f"{example:<52}{row.implementation:<10}{row.reason}" for example, [row] in answers.items()]
    return "\n".join(line.rstrip() for line in lines)


def _line(example: str, cells: list[str]) -> str:
    return f"{example:<52}" + "".join(f"{cell:<10}" for cell in cells)


def _answers(archs: list[int]) -> list[tuple[str, dict[str, list[Row]]]]:
    """Operations, and for groups of examples the row of each architecture. Operations that run alike come together."""
    blocks: dict[str, tuple[str, dict[str, list[Row]]]] = {}
    for operation in dispatch.OPERATIONS:
        answers = _examples(operation, archs)
        same = repr({example: [(x.implementation, x.reason) for x in rows] for example, rows in answers.items()})
        others, _ = blocks.get(same, ("", {}))
        blocks[same] = (f"{others}, {operation}".removeprefix(", "), answers)
    return list(blocks.values())


def _examples(operation: str, archs: list[int]) -> dict[str, list[Row]]:
    answers = {}
    for dtype_name, (dtype, head_dims) in EXAMPLES.items():
        groups: dict[tuple[Row, ...], list[str]] = {}
        for head_dim in head_dims:
            rows = tuple(row(operation, arch, dtype, head_dim) for arch in archs)
            groups.setdefault(rows, []).append(str(head_dim))
        for rows, names in groups.items():
            dims = "" if len(names) == len(head_dims) else ", ".join(names)
            answers[f"  {dtype_name} {dims}"] = list(rows)
    return answers


if __name__ == "__main__":
    print(report())
