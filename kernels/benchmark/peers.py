"""Packages that a kernel is compared with. None of them is required: one that is missing is a row with its reason."""

import importlib
from types import ModuleType


class Unavailable(Exception):
    """A provider is not installed or does not support a shape. The message is the reason shown in its row."""


INSTALL = {  # module -> how to install it
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flash_attn_interface": "git clone https://github.com/Dao-AILab/flash-attention && pip install "
    "./flash-attention/hopper --no-build-isolation",
    "flash_attn.cute": "pip install --pre flash-attn-4",
    "liger_kernel": "pip install --upgrade liger-kernel",
    "cutlass": "pip install nvidia-cutlass-dsl",
    "cut_cross_entropy": 'pip install "cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git"',
}


def peer(module: str) -> ModuleType:
    """Import a package, or a module of it; Unavailable says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package, _, _ = module.partition(".")
        command = INSTALL.get(module, INSTALL[package])
        raise Unavailable(f"{error}: {command}") from error


def reason(error: Exception) -> str:
    """One line for the row of a provider that failed."""
    message = str(error).strip() or "no message"
    first_line = message.splitlines()[0]
    if isinstance(error, Unavailable | ImportError):
        return first_line
    return f"{type(error).__name__}: {first_line}"
