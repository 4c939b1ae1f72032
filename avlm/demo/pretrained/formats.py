"""Readers of three weight files, as far as the demo's packages use them: bytes -> numpy arrays by name.

read_ct2    CTranslate2 binary, version 6    plain arrays
read_gguf   GGUF version 3                   metadata, and F32, F16, Q4_1 and Q8_0 tensors as float32
read_onnx   ONNX (protobuf)                  initialisers as they are, and the nodes that use them
"""

import math
import struct
from collections.abc import Iterator

import numpy as np

CT2_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
ONNX_DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
QUANTISED = 32  # values in a block of Q4_1 and Q8_0


class Cursor:
    """Reads little-endian values from bytes, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise ValueError(f"the file ends after {len(self.data)} bytes, {self.at + size} were expected")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> int | float | bool:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, length_code: str) -> str:
        return bytes(self.take(self.scalar(length_code))).decode()


def read_ct2(data: bytes) -> dict[str, np.ndarray]:
    """Variables and their aliases. Layout: version, name, revision; count, then name, shape, dtype, bytes of each."""
    file = Cursor(data)
    if (version := file.scalar("I")) != 6:
        raise ValueError(f"CTranslate2 file of version {version}, 6 is read")
    name = lambda: file.text("H").rstrip("\0")
    name(), file.scalar("I")
    variables = {}
    for _ in range(file.scalar("I")):
        key, shape = name(), [file.scalar("I") for _ in range(file.scalar("B"))]
        dtype = CT2_DTYPES[file.scalar("B")]
        variables[key] = np.frombuffer(file.take(file.scalar("I")), dtype).reshape(shape)
    for _ in range(file.scalar("I")):
        alias, key = name(), name()
        variables[alias] = variables[key]
    return variables


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, float32 tensors). Layout: magic, version, counts; key, type, value of each entry; name, shape, type,
    offset of each tensor; then the tensors, aligned."""
    file = Cursor(data)
    if (start := bytes(file.take(4)), file.scalar("I")) != (b"GGUF", 3):
        raise ValueError(f"no GGUF file of version 3: it begins with {start!r}")
    num_tensors, num_entries = file.scalar("Q"), file.scalar("Q")
    metadata = {}
    for _ in range(num_entries):
        key = file.text("Q")
        metadata[key] = _gguf_value(file, file.scalar("I"))
    entries = []
    for _ in range(num_tensors):
        name, shape = file.text("Q"), [file.scalar("Q") for _ in range(file.scalar("I"))]
        entries.append((name, shape[::-1], file.scalar("I"), file.scalar("Q")))  # the fastest dimension stands first
    alignment = metadata.get("general.alignment", 32)
    start = -(-file.at // alignment) * alignment
    return metadata, {name: _gguf_tensor(data, start + at, shape, kind) for name, shape, kind, at in entries}


def _gguf_value(file: Cursor, kind: int):
    if kind == GGUF_STRING:
        return file.text("Q")
    if kind == GGUF_ARRAY:
        kind, count = file.scalar("I"), file.scalar("Q")
        return [_gguf_value(file, kind) for _ in range(count)]
    return file.scalar(GGUF_SCALARS[kind])


def _gguf_tensor(data: bytes, start: int, shape: list[int], kind: int) -> np.ndarray:
    count = math.prod(shape)
    if kind in (0, 1):
        dtype = (np.float32, np.float16)[kind]
        return np.frombuffer(data, dtype, count, start).astype(np.float32).reshape(shape)
    readers = {3: (dequantise_q4_1, 20), 8: (dequantise_q8_0, 34)}
    if kind not in readers:
        raise ValueError(f"GGUF tensors of type {kind} are not read (0 F32, 1 F16, 3 Q4_1, 8 Q8_0)")
    dequantise, block_bytes = readers[kind]
    blocks = np.frombuffer(data, np.uint8, count // QUANTISED * block_bytes, start)
    return dequantise(blocks.reshape(-1, block_bytes)).reshape(shape)


def dequantise_q4_1(blocks: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 20) -> float32 (blocks, 32), x = scale * q + minimum.

    A block is scale and minimum, float16, and 16 bytes: the low halves are values 0..15, the high halves 16..31.
    """
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * q + minimum


def dequantise_q8_0(blocks: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 34) -> float32 (blocks, 32), x = scale * q: a float16 and 32 signed bytes."""
    return blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)


def read_onnx(data: bytes) -> tuple[dict[str, np.ndarray], list[dict]]:
    """(initialisers by name, nodes as {"op", "name", "inputs"}). Field numbers are those of onnx.proto: model.graph 7;
    graph.node 1, initializer 5; node.input 1, name 3, op_type 4; tensor.dims 1, data_type 2, name 8, and its values as
    float_data 4, int32_data 5 or raw_data 9."""
    graph = next(value for number, value in _protobuf(memoryview(data)) if number == 7)
    arrays, nodes = {}, []
    for number, value in _protobuf(graph):
        if number == 1:
            fields = list(_protobuf(value))
            inputs = [bytes(field).decode() for i, field in fields if i == 1]
            op, name = (bytes(dict(fields).get(i, b"")).decode() for i in (4, 3))
            nodes.append({"op": op, "name": name, "inputs": inputs})
        elif number == 5:
            fields = list(_protobuf(value))
            one = dict(fields)
            dtype = ONNX_DTYPES[one[2]]
            if 5 in one:
                values = np.array(list(_varints(one[5])), np.uint64).astype(dtype)  # wraps negative numbers round
            else:
                values = np.frombuffer(one.get(9) or one[4], dtype)
            arrays[bytes(one[8]).decode()] = values.reshape([field for i, field in fields if i == 1])
    return arrays, nodes


def _protobuf(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message: an int, or the bytes of a text, a message or a fixed-width number."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        fixed = {1: 8, 5: 4}.get(key & 7)
        size, at = (fixed, at) if fixed else _varint(data, at)
        yield key >> 3, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends): seven bits a byte, the lowest first; the last byte has no high bit."""
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at
