"""GGUF files, written and read through the library ``gguf``.

A matrix is stored in the type that is asked for, with these exceptions: norms, biases and tables of positions are F32;
kernels of convolutions F16, unless all is F32; towers and projectors are quantised no further than F16; so are matrices
whose rows are no multiple of the type's block.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.families import gguf as family
from avlm.models.shapes import parameter_shapes
from avlm.storage.model_folder import Lazy
from avlm.storage.weight_files import GGUF

MODEL, PROJECTORS = GGUF
BLOCKS_VERSION = 2  # of the layouts of quantised blocks


def library() -> Any:
    """The module ``gguf``."""
    try:
        import gguf  # optional: only this format needs it
    except ImportError:
        raise ValueError("GGUF files need the library gguf: pip install gguf==0.19.0") from None
    return gguf


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head so that the two of a pair, which stand half a head apart here, are neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of ``neighbours``."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, Lazy], type: str) -> None:
    """``keys``: the file's metadata; ``type``: of matrices, one of ``avlm.families.gguf.TYPES``."""
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL if path.name == MODEL else gguf.GGUFType.MMPROJ)
    writer.add_file_type(_file_type(type if path.name == MODEL else _of_towers(type)))
    writer.add_quantization_version(BLOCKS_VERSION)
    for key, value in keys.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(value.__class__, writer.add_array)(key, value)
    types = {name: _type_of(path.name, name, tensor.shape, type) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        stored = gguf.GGMLQuantizationType[types[name]]
        size = _bytes_of(tensor.shape, stored)
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        value = tensor.read().float().numpy()
        with np.errstate(over="ignore"):
            stored = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[types[name]])
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise ValueError(f"{name} has values that F16 cannot hold: give --type bf16 or f32")
        writer.write_tensor_data(stored)
    writer.close()


def _file_type(type: str) -> Any:
    kinds = library().LlamaFileType
    return kinds.ALL_F32 if type == "f32" else kinds[f"MOSTLY_{type.upper()}"]


def _of_towers(type: str) -> str:
    return type if type in ("f32", "f16", "bf16") else "f16"


def _type_of(file: str, name: str, shape: tuple[int, ...], type: str) -> str:
    """The name of a tensor's type."""
    if len(shape) == 1 or name.endswith(".bias") or "position_embd" in name:
        return "F32"
    if file == PROJECTORS:
        type = _of_towers(type)
    if len(shape) > 2:
        return "F32" if type == "f32" else "F16"
    block, _ = library().GGML_QUANT_SIZES[library().GGMLQuantizationType[type.upper()]]
    return type.upper() if shape[-1] % block == 0 else "F16"


def _bytes_of(shape: tuple[int, ...], stored: Any) -> int:
    block, size = library().GGML_QUANT_SIZES[stored]
    return torch.Size(shape).numel() // block * size


class Dequantised:
    """A parameter of ours in a GGUF file, in float32, with the calls of a safetensors slice. All of its blocks are
    dequantised when it is indexed.

    heads   of a matrix whose rotary dimensions are in llama.cpp's order
    half    0 or 1: the first or the second half of the tensor's rows
    shape   of the parameter; the file may have it in a convolution's
    """

    def __init__(self, tensor: Any, heads: int | None, half: int | None, shape: tuple[int, ...]):
        self.tensor = tensor
        self.heads = heads
        self.half = half
        there = [int(size) for size in reversed(tensor.shape)]
        if half is not None:
            there[0] //= 2
        self.shape = list(shape) if math.prod(shape) == math.prod(there) else there

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        value = library().quants.dequantize(self.tensor.data, self.tensor.tensor_type)
        whole = torch.from_numpy(np.array(value, dtype=np.float32))
        if self.half is not None:
            whole = whole.chunk(2)[self.half]
        whole = whole.reshape(self.shape)
        return (whole if self.heads is None else halves(whole, self.heads))[index]


def read_gguf(folder: Path, names: list[str], config: ModelConfig) -> dict[str, Dequantised]:
    """Our parameter -> its tensor, lazily, of the files of an export."""
    held = {}
    for name in names:
        try:
            reader = library().GGUFReader(folder / name)
        except (ValueError, IndexError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
        held |= {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for ours, shape in parameter_shapes(config).items():
        half = family.half_of(config, ours)
        theirs = family.name_of(config, ours)
        if theirs in held:  # what is missing the plan says
            found[ours] = Dequantised(held[theirs], family.rotated_heads(config, ours), half, shape)
    return found
