"""The little of ONNX's file format that loading needs, without the package `onnx`: where tensors are, and tiny models.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; wire format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import ModelFileError

T = TypeVar("T")
Buffer: TypeAlias = memoryview

# for each message, the fields through which tensors are reached, and the messages that they hold
REACHES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
FIXED = {1: 8, 5: 4}  # bytes of the wire types with a fixed length
FLOAT = 1  # TensorProto.DataType
OWN_DOMAIN = "edgeguard"
"""Of operators that guard graphs hold as functions."""


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose data lie in another file."""

    name: str
    type: int
    """TensorProto.DataType."""
    location: str
    """Path of that file, relative to the model's folder."""
    offset: int
    length: int | None
    """Bytes, or None for all up to the file's end."""


def external_tensors(model: Path) -> list[ExternalTensor]:
    """Every tensor of a model with external data, of subgraphs and functions too; raises `ModelFileError`."""
    return _read(model, lambda view: list(_external(view, "model")))


def domains(model: Path) -> set[str]:
    """Of the operators that a model may hold; raises `ModelFileError`."""
    return _read(model, lambda view: {
        str(text, "utf-8") for number, opset in _fields(view) if number == 8 and isinstance(opset, memoryview)
        for key, text in _fields(opset) if key == 1 and isinstance(text, memoryview)})


def _read(model: Path, read: Callable[[Buffer], T]) -> T:
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return read(view)
    except FileNotFoundError:
        raise ModelFileError(f"{model} is missing.") from None
    except (OSError, ValueError, IndexError, KeyError, RecursionError, BufferError) as error:
        raise ModelFileError(f"{model} is not an ONNX model or is damaged.") from error


def check_external(model: Path) -> list[ExternalTensor]:
    """As `external_tensors`; raises `ModelFileError` for data outside the model's folder, also by way of a symbolic link."""
    tensors = external_tensors(model)
    folder = model.parent.resolve()
    for location in {tensor.location for tensor in tensors}:
        parts = PureWindowsPath(location)  # knows drives and both kinds of slashes
        if not location or parts.drive or parts.root or PurePosixPath(location).is_absolute() or ".." in parts.parts:
            raise ModelFileError(f"{model} keeps weights at {location!r}; only paths inside its own folder are allowed.")
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ModelFileError(f"{model} keeps weights at {location!r}, which is a link that leaves its folder.")
        if not file.is_file():
            raise ModelFileError(f"{model} keeps weights in {location!r}, which is missing.")
    return tensors


@dataclass(frozen=True)
class Node:
    """Of a tiny model."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = OWN_DOMAIN
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """Attributes."""


def int8_product(weights: NDArray[np.int8], scales: NDArray[np.float32]) -> bytes:
    """A model of one MatMulIntegerToFloat by constant weights (K, N), scales (N,): `a` uint8 (M, K), less 128, to `y`."""
    one, middle, zero = np.ones((), np.float32), np.full((), 128, np.uint8), np.zeros((), np.int8)
    tensors: dict[str, NDArray[Any]] = {"b": weights, "one": one, "scales": scales, "middle": middle, "zero": zero}
    return _model([Node("MatMulIntegerToFloat", ("a", *tensors), ("y",), "com.microsoft")], tensors, {"a": np.dtype(np.uint8)})


def int4_product(weights: NDArray[np.uint8], scales: NDArray[np.float32], block: int) -> bytes:
    """A model of one MatMulNBits by constant weights 0 to 15 (N, K), scales (N, K / block): `a` float32 (M, K) to `y`."""
    out, width = weights.shape
    packed = (weights[:, ::2] | weights[:, 1::2] << 4).reshape(out, width // block, block // 2)
    numbers = {"K": width, "N": out, "bits": 4, "block_size": block, "accuracy_level": 4}
    return _model([Node("MatMulNBits", ("a", "b", "scales"), ("y",), "com.microsoft", numbers)], {"b": packed, "scales": scales},
                  {"a": np.dtype(np.float32)})


def operators(nodes: Sequence[Node], given: Mapping[str, NDArray[Any]]) -> bytes:
    """A model of some nodes, whose inputs are of the types of `given`; all that they compute is a result."""
    return _model(nodes, {}, {name: values.dtype for name, values in given.items()})


def _model(nodes: Sequence[Node], tensors: Mapping[str, NDArray[Any]], inputs: Mapping[str, np.dtype[Any]]) -> bytes:
    graph = b"".join([
        *(_field(1, _node(node)) for node in nodes), _field(2, "trial"),
        *(_field(5, _tensor(name, values)) for name, values in tensors.items()),
        *(_field(11, _value(name, kind)) for name, kind in inputs.items()),
        *(_field(12, _field(1, name)) for node in nodes for name in node.outputs),  # the runtime finds out their types
    ])
    versions = {"": 21, **{node.domain: 1 for node in nodes}}
    return b"".join([_field(1, 10), _field(7, graph), *(_field(8, _field(1, name) + _field(2, each)) for name, each in versions.items())])


def _node(node: Node) -> bytes:
    attributes = [_field(5, _field(1, name) + _number(number)) for name, number in node.numbers.items()]
    named = [*(_field(1, name) for name in node.inputs), *(_field(2, name) for name in node.outputs)]
    return b"".join([*named, _field(4, node.operator), *attributes, _field(7, node.domain)])


def _number(value: float) -> bytes:
    """An attribute's value and type."""
    if isinstance(value, int):
        return _field(3, value) + _field(20, 2)
    return _varint(2 << 3 | 5) + struct.pack("<f", value) + _field(20, 1)


_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): 2, np.dtype(np.int8): 3, np.dtype(np.int64): 7}


def _tensor(name: str, values: NDArray[Any]) -> bytes:
    dims = b"".join(_field(1, size) for size in values.shape)
    return dims + _field(2, _TYPES[values.dtype]) + _field(8, name) + _field(9, values.tobytes())


def _value(name: str, kind: np.dtype[Any]) -> bytes:
    """Of any sizes."""
    return _field(1, name) + _field(2, _field(1, _field(1, _TYPES[kind])))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def _external(message: Buffer, kind: str) -> Iterator[ExternalTensor]:
    if kind == "tensor":
        yield from _external_tensor(message)
        return
    reached = REACHES[kind]
    for number, value in _fields(message):
        if number in reached and isinstance(value, memoryview):
            yield from _external(value, reached[number])


def _external_tensor(message: Buffer) -> Iterator[ExternalTensor]:
    name, type_, external = "", 0, False
    entries: dict[str, str] = {}
    for number, value in _fields(message):
        if isinstance(value, int):
            type_ = value if number == 2 else type_
            external |= number == 14 and value == 1
        elif number == 8:
            name = str(value, "utf-8")
        elif number == 13:
            external = True
            entry = {key: str(text, "utf-8") for key, text in _fields(value) if isinstance(text, memoryview)}
            entries[entry.get(1, "")] = entry.get(2, "")
    if external:
        offset, length = int(entries.get("offset") or 0), entries.get("length")
        yield ExternalTensor(name, type_, entries.get("location", ""), offset, int(length) if length else None)


def _fields(message: Buffer) -> Iterator[tuple[int, int | Buffer]]:
    """Number and value of each field: a number, or the bytes of anything else."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == 0:
            number, at = _read_varint(message, at)
            yield key >> 3, number
            continue
        length, at = _read_varint(message, at) if wire == 2 else (FIXED[wire], at)
        if at + length > len(message):
            raise ValueError("a field is longer than its message")
        yield key >> 3, message[at : at + length]
        at += length


def _read_varint(message: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
