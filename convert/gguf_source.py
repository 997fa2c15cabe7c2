"""Reads a GGUF as a checkpoint: Hugging Face names and layout, one tensor at a time, blocks widened by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.reference import inverse_frequencies
from edgeguard.convert import gguf_tokenizer
from edgeguard.convert.gguf_file import ROPE_FACTORS, gguf_name, rope_rows
from edgeguard.errors import ModelFileError, RuntimeMissingError
from edgeguard.gguf_check import check_gguf
from edgeguard.weights import DTYPES, Rows, expected, widen


class GgufWeights:
    """A GGUF file by the `Weights` protocol; quantised tensors come as the float32 numbers that their blocks stand for.

    Raises `ModelFileError` for a file that is damaged, incomplete or no plain Llama decoder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = check_gguf(path)
        self.shape = replace(self.header.shape, rope_scaling=self._rope_scaling())
        for name, size in expected(self.shape).items():
            found = self.header.tensors.get(gguf_name(name))
            if found is None or found.shape != size:
                raise ModelFileError(f"{path}: {gguf_name(name)} is {found and list(found.shape)}, its header says {list(size)}.")
        self._names = sorted(expected(self.shape))

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return list(self._names)

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor as stored, rows in Hugging Face's order; blocks as bytes (out, bytes of a row)."""
        return self._chosen(name, slice(None))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one tensor."""
        return self.rows(name, slice(None))

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        """A float32 copy of some rows; no others are read."""
        values, kind = self._chosen(name, index)
        if kind in DTYPES:
            return widen(values, kind)
        try:
            from gguf import GGMLQuantizationType, dequantize
        except ImportError:
            raise RuntimeMissingError("gguf", "convert") from None
        try:
            return np.asarray(dequantize(values, GGMLQuantizationType[kind]), np.float32)
        except NotImplementedError:
            raise ModelFileError(f"{self.path}: {name} is stored as {kind}, which cannot be read back. "
                                 "Convert from the original weights.") from None

    def _chosen(self, name: str, index: Rows) -> tuple[NDArray[Any], str]:
        """Rows as stored, their numbers by Hugging Face's order, and the tensor's type."""
        if name not in self._names:
            raise ModelFileError(f"{self.path} lacks the tensor {name}.")
        values, kind = self._stored(gguf_name(name))
        order = rope_rows(name, self.shape)
        return values[index if order is None else np.argsort(order)[index]], kind

    def _stored(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor mapped from the file, and its type."""
        tensor = self.header.tensors[name]
        if tensor.type in DTYPES:
            return np.memmap(self.path, DTYPES[tensor.type], "r", tensor.offset, tensor.shape), tensor.type
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return np.memmap(self.path, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows)), tensor.type

    def _rope_scaling(self) -> Mapping[str, Any] | None:
        """The settings whose factors the file holds; it does not name them."""
        kind = self.header.metadata.get("llama.rope.scaling.type", "none")
        if kind != "none":
            raise ModelFileError(f"{self.path} scales RoPE by {str(kind)[:40]!r}; edgeguard reads Llama 3.1 scaling only.")
        if ROPE_FACTORS not in self.header.tensors:
            return None
        shape = self.header.shape
        factors = widen(*self._stored(ROPE_FACTORS))
        plain = inverse_frequencies(shape.head_dim, shape.rope_theta, None)
        for original in (8192, *(1 << bits for bits in range(8, 18))):
            scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": original}
            wanted = plain / inverse_frequencies(shape.head_dim, shape.rope_theta, scaling)
            if factors.shape == wanted.shape and np.allclose(factors, wanted, rtol=1e-5):
                return scaling
        raise ModelFileError(f"{self.path} holds RoPE factors ({ROPE_FACTORS}) that Llama 3.1 scaling does not give.")


def tokenizer_json(path: Path) -> dict[str, Any]:
    """tokenizer.json rebuilt from the vocabulary in a GGUF, with equal ids; it adds no BOS.

    Raises `ModelFileError` for a damaged file, `ConversionError` for a kind of vocabulary that edgeguard does not know.
    """
    return gguf_tokenizer.to_json(check_gguf(path))


