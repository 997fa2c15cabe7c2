"""Disk and memory that a conversion needs, counted before it starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeguard.architecture import Shape
from edgeguard.cli.console import size as told
from edgeguard.convert.gate_pieces import WEIGHTS
from edgeguard.convert.gguf_mix import nbytes, tensor_types
from edgeguard.convert.gguf_tokenizer import from_json
from edgeguard.convert.onnx_writer import LINE, PAGE
from edgeguard.convert.pieces import PIECE
from edgeguard.convert.quantize import BLOCK
from edgeguard.errors import ConversionError
from edgeguard.machine import available_memory
from edgeguard.weights import EMBEDDING, expected, read_json

FLOATS = {"fp32": 4, "fp16": 2}
GGUF = 32  # bytes at which tensors begin
GRAPH, GRAPH_LAYER = 12_000, 12_000  # bytes of model.onnx, and for each layer
PREFIX = 600  # bytes of a prefix file beside its numbers
MANIFEST, MANIFEST_ID = 4_000, 9  # bytes of a manifest, and for each token id in it
HEADER, HEADER_TENSOR = 1_500, 72  # bytes of a GGUF's header beside the vocabulary, and for each tensor
PREPACKED = 1 << 30
"""Bytes of an artifact up to which the gate lets the runtime keep a copy of the weights, as it does when the artifact is used."""
COPIES = {"fp32": 2, "fp16": 4, "int8": 2, "int4": 1}
"""What the runtime keeps of ONNX weights, at most, in their own size: what it converts (float16 to 32, int8 to unsigned) and packs."""
CARRIED = 4  # arrays of a layer's widest activations that go from one piece of a guard graph to the next, or are made by it
BASE = 400 << 20  # interpreter, runtimes, tokenizer
WORK = 6  # arrays of a layer's widest activations that the walk has at once


@dataclass(frozen=True)
class Contents:
    """What an artifact's size depends on beside the model; the defaults are those of Llama Guard 2."""

    rows: int = 317
    """Of a guard graph's head; 0 for the whole vocabulary."""
    prefixes: tuple[int, ...] = (137, 135)
    """Tokens of each."""
    tokenizer: int = 9_085_000
    """Bytes of tokenizer.json."""
    vocabulary: int = 7_800_000
    """Bytes that it takes in a GGUF's header."""
    texts: int = 16_000
    """Bytes of the licence texts."""


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    artifact: int
    disk: int
    """The artifact, and what is beside it meanwhile."""
    memory: int
    """Anonymous, at the peak."""


def artifact_bytes(shape: Shape, kind: str, precision: str, contents: Contents | None = None, *, kinds: Mapping[str, str] | None = None,
                   exported: bool = False) -> int:
    """Size of the artifact; `kinds` are the types of GGUF tensors that differ from the precision's mix."""
    contents = contents or Contents()
    if kind == "gguf":
        types = tensor_types(shape, precision) | dict(kinds or {})
        body = _aligned((nbytes(types[name], size), GGUF) for name, size in expected(shape).items())
        own = body + HEADER + HEADER_TENSOR * len(types) + contents.vocabulary
    else:
        rows = 0 if exported else contents.rows
        own = _aligned((size, PAGE if size >= PAGE else LINE) for size in _onnx_tensors(shape, precision, rows))
        own += GRAPH + shape.layers * GRAPH_LAYER
        if not exported:
            own += sum(tokens * shape.kv_bytes + PREFIX for tokens in contents.prefixes)
            own += MANIFEST_ID * (contents.rows + sum(contents.prefixes))
    return own + contents.tokenizer + contents.texts + MANIFEST


def vocabulary_bytes(tokenizer: Path, size: int) -> int:
    """What the vocabulary of a tokenizer.json, filled up to `size` tokens, takes in a GGUF's header."""
    vocabulary = from_json(read_json(tokenizer), size)
    texts = sum(8 + len(text.encode()) for text in [*vocabulary.tokens, *vocabulary.merges])
    return texts + 4 * (len(vocabulary.types) + len(vocabulary.scores))


def _onnx_tensors(shape: Shape, precision: str, rows: int) -> Iterator[int]:
    """Bytes of each tensor of a guard graph; of an ordinary export when there are no `rows`."""
    for name, size in expected(shape).items():
        count = math.prod(size)
        if name == "lm_head.weight":
            continue
        if len(size) == 1:
            yield 4 * count
        elif precision in FLOATS or name == EMBEDDING:
            yield FLOATS.get(precision, 2) * count
        elif precision == "int8":
            yield from (count, 4 * size[0])
        else:
            yield from (count // 2, 4 * count // BLOCK)
    if rows or not shape.tied:
        yield 4 * (rows or shape.vocab) * shape.hidden


def _aligned(sizes: Iterable[tuple[int, int]]) -> int:
    """The length of a file of pieces (bytes, alignment)."""
    end = 0
    for size, align in sizes:
        end += -end % align + size
    return end


def needs(shape: Shape, kind: str, precision: str, contents: Contents, *, tokens: int, kinds: Mapping[str, str] | None = None,
          traced: bool = False) -> Needs:
    """What a conversion needs whose walk evaluates `tokens` at once.

    A `traced` export has the whole model in memory, as a checkpoint and as a graph, and is written twice.
    """
    artifact = artifact_bytes(shape, kind, precision, contents, kinds=kinds, exported=traced)
    # while it goes on: the walk's state, old and new
    state = 2 * (tokens * shape.hidden * 4 + sum(contents.prefixes) * shape.kv_bytes)
    walk = 4 * tokens * (WORK * max(shape.ffn, shape.hidden) + 4 * shape.hidden) + 3 * 4 * PIECE + state // 2
    writing = shape.vocab * shape.hidden + 8 * 4 * PIECE
    if artifact <= PREPACKED:
        gate = artifact * 6 // 5
    elif kind == "onnx":
        gate = COPIES[precision] * max(WEIGHTS, shape.ffn * shape.hidden * FLOATS.get(precision, 1))
        gate += 4 * tokens * CARRIED * max(shape.ffn, shape.hidden) + sum(contents.prefixes) * shape.kv_bytes
    else:
        gate = 4 * shape.ffn * shape.hidden * 2
    memory = 3 * artifact if traced else max(walk, writing, gate)
    return Needs(artifact, artifact * (2 if traced else 1) + state, memory + BASE)


def check(needed: Needs, out: Path, there: int = 0) -> str:
    """One sentence with needs and what is free; raises `ConversionError` when disk or memory would run out.

    `there` are bytes that an earlier run has written already.
    """
    folder = _there(out)
    disk, free = max(0, needed.disk - there), shutil.disk_usage(folder).free
    memory, available = needed.memory, available_memory()
    _compare("disk", disk, free, f" at {folder}")
    _compare("memory", memory, available, "; close other programs")
    return f"needs {told(disk)} of disk at {folder} ({told(free)} free) and about {told(memory)} of memory ({told(available)} free)"


def check_download(artifact: int, out: Path, into: Path, coming: int) -> None:
    """Raises `ConversionError` when the disk would not hold an artifact beside the `coming` bytes of its source."""
    folder = _there(out)
    both = artifact + (coming if folder.stat().st_dev == into.stat().st_dev else 0)
    _compare(f"disk, {told(both - artifact)} of it for the source", both, shutil.disk_usage(folder).free, f" at {folder}")


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def _compare(what: str, need: int, free: int, hint: str) -> None:
    if need > free:
        raise ConversionError(f"The conversion needs about {told(need)} of {what}, {told(free)} are free{hint}: "
                              f"{told(need - free)} are missing.")
