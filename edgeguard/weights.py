"""Weights of a checkpoint, one tensor at a time, by their Hugging Face names; no runtime, no conversion."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.errors import ModelFileError

# bfloat16 is the upper half of a float32; numpy has no name for it, so it is kept as uint16
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
Rows: TypeAlias = slice | NDArray[np.int64]
"""Which rows of a tensor: a slice, or their numbers."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_HEADER = 100_000_000  # bytes, the limit that the safetensors format itself sets


class Weights(Protocol):
    """A checkpoint as conversion and the reference backend read it."""

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        ...

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one tensor; raises `ModelFileError` when it is missing."""
        ...

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        """A float32 copy of some rows of a tensor; the others are not widened, and where possible not read."""
        ...

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """The tensor as stored and its type (`F32`, `F16`, `BF16` as uint16, or a GGUF type)."""
        ...


def widen(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 from a stored tensor; bfloat16 comes as uint16."""
    if dtype == "BF16":
        bits = values.astype(np.uint32)
        bits <<= 16  # in place: a layer's largest matrix has 59 million weights
        return bits.view(np.float32)
    return values.astype(np.float32)


def expected(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama decoder and its shape, as `torch.nn.Linear` stores it: (out, in)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for index in range(shape.layers):
        table |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    table["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        table["lm_head.weight"] = (shape.vocab, shape.hidden)
    return table


class SafetensorsWeights:
    """A Hugging Face folder: config.json and safetensors files, sharded or not, memory-mapped.

    Format: https://huggingface.co/docs/safetensors. Raises `ModelFileError` for anything malformed or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shape = Shape.from_config(read_json(folder / "config.json"))
        self._tensors: dict[str, tuple[Path, str, list[int], int]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelFileError(f"{folder} has no .safetensors file.")
        for file in files:
            self._index(file)
        for name, size in expected(self.shape).items():
            if name not in self._tensors:
                raise ModelFileError(f"{folder} lacks the tensor {name}.")
            if tuple(self._tensors[name][2]) != size:
                raise ModelFileError(f"{name} has shape {self._tensors[name][2]}, config.json says {list(size)}.")

    def _index(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER
            if length >= min(MAX_HEADER, size):
                raise ModelFileError(f"{file} is not a safetensors file or is cut off.")
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise ModelFileError(f"{file} has a damaged header: {error}") from None
        for name, entry in header.items():
            if name != "__metadata__":
                self._tensors[name] = _checked(file, name, entry, 8 + length, size)

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._tensors)

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """The mapped tensor and its type."""
        if name not in self._tensors:
            raise ModelFileError(f"{self.folder} lacks the tensor {name}.")
        file, dtype, dims, offset = self._tensors[name]
        return np.memmap(file, DTYPES[dtype], "r", offset, tuple(dims)), dtype

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one tensor."""
        return widen(*self.raw(name))

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        """A float32 copy of some rows; no others are read."""
        values, dtype = self.raw(name)
        return widen(values[index], dtype)


def _checked(file: Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> tuple[Path, str, list[int], int]:
    """File, type, dims and absolute offset of a header entry that stays inside its file."""
    try:
        dtype, dims, (start, end) = entry["dtype"], [int(n) for n in entry["shape"]], entry["data_offsets"]
        wanted = int(np.prod(dims, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
    except (KeyError, TypeError, ValueError):
        raise ModelFileError(f"{file}: the tensor {name} is described wrongly or has a type that is not a float.") from None
    if start < 0 or end - start != wanted or base + end > size:
        raise ModelFileError(f"{file}: the tensor {name} does not fit into the file; the file is damaged or cut off.")
    return file, dtype, dims, base + start


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `ModelFileError` when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no JSON object.")
    return value
