"""Rows of float32 weights to the types of GGUF; blocks come from ggml's own quantisers, which let go of the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.llama_native import library
from edgeguard.convert.gguf_mix import nbytes
from edgeguard.convert.quantize import weighing_of
from edgeguard.errors import ConversionError, RuntimeMissingError
from edgeguard.gguf_check import TENSOR_TYPES

PIECE = 1 << 20
"""Weights quantised together: 4 MB in float32."""
INFINITE = {"F16": 0x7C00, "BF16": 0x7F80}
"""Bits of the exponent, all set in an infinity."""
NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def quantise(name: str, kind: str, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Some rows of the tensor `name` as they lie in a file: numbers, or the bytes of blocks (rows, bytes of a row).

    `importance` (width,) is how much errors in each column matter, llama.cpp's importance matrix; types of 8 bits ignore it.
    Raises `ConversionError` for weights that are not finite or that the type cannot hold.
    """
    values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():  # first: ggml may end the process over them
        raise ConversionError(f"{name} holds values that are not finite; the source is damaged.")
    if kind not in _CASTS:
        return _blocks(name, kind, values, importance)
    data = _CASTS[kind](values)
    if kind in INFINITE and ((data.view(np.uint16) & INFINITE[kind]) == INFINITE[kind]).any():
        raise ConversionError(f"{name} holds values that {kind} cannot hold; choose {'bf16 or ' if kind == 'F16' else ''}f32.")
    return data


def _blocks(name: str, kind: str, values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    rows, width = values.shape
    out = np.empty((rows, nbytes(kind, (1, width))), np.uint8)
    weighing = None if importance is None else weighing_of(importance)
    weights = None if weighing is None else weighing.ctypes.data
    ggml = _native()
    written = ggml.ggml_quantize_chunk(NUMBERS[kind], values.ctypes.data, out.ctypes.data, 0, rows, width, weights)
    if written != out.nbytes or not ggml.ggml_validate_row_data(NUMBERS[kind], out.ctypes.data, out.nbytes):
        raise ConversionError(f"{name} cannot be quantised to {kind}: it holds weights that are too large.")
    return out


@lru_cache(maxsize=1)
def _native() -> Any:  # noqa: ANN401, a ctypes library
    """ggml as the package llama-cpp-python brings it; which of its parts exports a function differs between systems."""
    library()
    try:
        from llama_cpp import _ctypes_extensions, _ggml

        for part in ("ggml-base", "ggml"):
            loaded = _ctypes_extensions.load_shared_library(part, _ggml.libggml_base_path)
            if hasattr(loaded, "ggml_quantize_chunk"):
                return _typed(loaded)
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeMissingError("llama-cpp-python", "llama", str(error)) from error
    raise RuntimeMissingError("llama-cpp-python", "llama", "its ggml library has no ggml_quantize_chunk")


def _typed(ggml: Any) -> Any:  # noqa: ANN401
    """With the signatures of ggml.h."""
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    return ggml


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest, halves to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # told by `quantise`
        return values.astype("<f2")


_CASTS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {"F32": lambda values: values, "F16": _float16, "BF16": _bfloat16}
