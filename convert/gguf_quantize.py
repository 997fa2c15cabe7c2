"""Quantises a GGUF by llama.cpp's own routine and says what was really written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgeguard.backends.llama_native import errors, library, told
from edgeguard.errors import ConversionError, StoreError
from edgeguard.gguf_check import check_gguf

# llama_ftype, and about how many bits a weight takes
TYPES = {"q8_0": (7, 8.5), "q6_k": (18, 6.6), "q5_k_m": (17, 5.7), "q4_k_m": (15, 4.9), "q4_0": (2, 4.6)}
PIECE = 256 * 1024 * 1024
"""Most bytes of rows that llama.cpp holds at once, where it can be told; its own default is 8 GiB."""
SOURCES = {"F32", "F16", "BF16"}


def quantise_gguf(src: Path, out: Path, type: str, *, threads: int | None = None) -> dict[str, int]:  # noqa: A002, the contract's word
    """Writes `out` and gives the number of tensors of each type: mixes hold several, and widths that are no multiple of 256 fall back.

    `type` is a key of `TYPES`. Writes `out`.partial, checks it and renames. Raises `ConversionError` when the source is quantised
    already or llama.cpp fails, `StoreError` when the disk has too little room, `ModelFileError` for a source that is damaged.
    """
    if type not in TYPES:
        raise ConversionError(f"llama.cpp's type {type!r} is not offered; choose one of {', '.join(TYPES)}.")
    header = check_gguf(src)
    quantised = set(header.types) - SOURCES
    if quantised:
        raise ConversionError(f"{src} holds {', '.join(sorted(quantised))} already; quantise from f32, f16 or bf16 instead.")
    number, bits = TYPES[type]
    llama = library()
    partial = out.with_name(out.name + ".partial")
    _check_room(partial, int(header.shape.parameters * bits / 8))
    params = llama.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = threads or 0
    params.max_buf_size = PIECE
    errors.clear()
    try:
        status = llama.llama_model_quantize(os.fsencode(src), os.fsencode(partial), params)
        if status:
            raise ConversionError(f"llama.cpp could not quantise {src} to {type}{told()}.")
        types = check_gguf(partial).types
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return types


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise StoreError(f"{path.parent} has {free / 1e9:.1f} GB free, the quantised model needs about {needed / 1e9:.1f} GB.")
