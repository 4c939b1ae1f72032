"""Launches of Triton kernels in less host time than ``kernel[grid](...)`` takes.

Triton binds arguments by name, inspects them and looks the compiled kernel up at every launch: some 40 us. Here the
compiled kernel is found by what it depends on: dtype and alignment of pointers, form of descriptors, constants.
"""

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import INTERPRETED

_compiled: dict[tuple, tuple[Any, tuple]] = {}  # what a launch depends on -> compiled kernel, constants in its order


def launch(kernel: Any, programs: int, arguments: tuple, constants: dict) -> None:
    """``kernel[(programs,)](*arguments, **constants)``.

    ``arguments`` are those of run time, in the kernel's order: tensors, descriptors, None and numbers, of which the
    integers are not specialised. ``constants``: the constexprs, always in one order, and options of the launch.
    """
    if INTERPRETED:  # nothing is compiled, and there is no driver to ask
        kernel[(programs,)](*arguments, **constants)
        return
    key = [id(kernel), triton.runtime.driver.active.get_current_device(), *constants.values()]
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            key.append(argument < 2**31)
        elif kind is TensorDescriptor:
            key += argument.base.dtype, *argument.block_shape
        elif argument is None or kind is float:
            key.append(kind)
        else:
            key += argument.dtype, argument.data_ptr() & 15 == 0
    known = _compiled.get(tuple(key))
    if known is not None:
        compiled, values = known
        compiled[(programs, 1, 1)](*arguments, *values)
        return
    special = [p.name for p, x in zip(kernel.params, arguments) if type(x) is int and not p.do_not_specialize]
    assert not special, f"{special} of {kernel.fn.__name__} must not be specialised"
    compiled = kernel[(programs,)](*arguments, **constants)
    _compiled[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def forget() -> None:
    _compiled.clear()


def descriptor(x: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> TensorDescriptor:
    """A TensorDescriptor without the checks of its constructor, for tensors that are known to pass them."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(base=x, shape=shape, strides=strides, block_shape=block_shape, padding="zero")
    return made
