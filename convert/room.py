"""Disk and memory that a conversion needs, estimated before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgeguard.architecture import Shape
from edgeguard.errors import ConversionError
from edgeguard.machine import available_memory

BITS = {
    "fp32": (32, 32), "fp16": (16, 16), "int8": (8, 8), "int4": (5, 8), "f32": (32, 32), "f16": (16, 16), "bf16": (16, 16),
    "q8_0": (8.5, 8.5), "q6_k": (6.6, 6.6), "q5_k_m": (5.7, 6.6), "q4_k_m": (4.9, 6.6), "q4_0": (4.5, 6.6),
}
"""Bits for a weight of the layers, and of embeddings and head."""
HEAD_ROWS = 512  # at most, of a guard graph
SMALL = 32 << 20  # tokenizer, prefixes, notices
FLOATS = ("f32", "f16", "bf16")


def artifact_bytes(shape: Shape, kind: str, precision: str, *, whole_head: bool = False) -> int:
    """Size of the artifact, rounded up; a guard graph has not the whole head, an ordinary export has."""
    layers, outer = BITS[precision]
    table = shape.vocab * shape.hidden
    body = shape.parameters - table * (1 if shape.tied else 2)
    head = HEAD_ROWS * shape.hidden * 32 if kind == "onnx" and not whole_head else 0 if shape.tied else table * outer
    prefixes = 2 * 256 * shape.kv_bytes if kind == "onnx" else 0
    return int((body * layers + table * outer + head) / 8) + prefixes + SMALL


def check(shape: Shape, kind: str, precision: str, out: Path, *, traced: bool = False) -> None:
    """Raises `ConversionError` naming need and what is free, when disk or memory would run out.

    A `traced` export has the whole model in memory, as a checkpoint and as a graph, and is written twice.
    """
    artifact = artifact_bytes(shape, kind, precision, whole_head=traced)
    # llama.cpp quantises from a file with floats, which is deleted afterwards
    between = artifact if traced else 0 if kind == "onnx" or precision in FLOATS else artifact_bytes(shape, kind, "f16")
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    _compare("disk", artifact + between, shutil.disk_usage(existing).free, f" at {existing}")
    layer = (shape.parameters - shape.vocab * shape.hidden * (1 if shape.tied else 2)) // shape.layers
    widest = 4 * max(layer, shape.vocab * shape.hidden)
    # the runtime keeps a packed copy of the weights while the gate runs
    need = 3 * artifact if traced else max(widest * 3 // 2, artifact * 6 // 5)
    _compare("memory", need, available_memory(), "; close other programs or choose fewer bits")


def _compare(what: str, need: int, free: int, hint: str) -> None:
    if need > free:
        raise ConversionError(f"The conversion needs about {need / 1e9:.1f} GB of {what}, {free / 1e9:.1f} GB are free{hint}.")
