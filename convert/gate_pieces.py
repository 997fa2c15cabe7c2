"""A guard graph too large for memory, run in pieces of a few layers: all prompts go through one before the next is loaded.

Each piece is an ordinary session on the artifact's own data, so that results have the bits of the whole graph, and memory
holds one piece's weights as the runtime packs them, and the values that go from piece to piece.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.backends.base import FloatArray, Node, Run
from edgeguard.backends.onnx import PLAN, read_prefix
from edgeguard.backends.onnx_session import Session
from edgeguard.backends.packing import merge, passes
from edgeguard.convert.prefixes import Entry
from edgeguard.errors import RuntimeMissingError
from edgeguard.store import Artifact
from edgeguard.store.files import Progress
from edgeguard.verdict import Role

WEIGHTS = 1 << 29
"""Bytes of a piece's weights, at most, unless it is a single tensor."""
MODEL = ".piece.onnx"
"""A piece's graph, beside the data that it names; a dot file is never recorded as part of an artifact."""

Values: TypeAlias = dict[str, NDArray[Any]]
KeysValues: TypeAlias = tuple[FloatArray, FloatArray]


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of the graph's nodes, in their order."""

    nodes: Sequence[Any]
    inputs: Sequence[str]
    outputs: Sequence[str]
    """What later pieces read, or is asked for."""
    kept: frozenset[str]
    """All values that are still needed behind it."""


def answers_of(artifact: Artifact, entries: Sequence[Entry], rows: Sequence[int], threads: int | None = None,
               progress: Progress | None = None) -> FloatArray:
    """As `gate.answers_of`, of a guard graph with its prefixes: logits (entries, rows) of the token ids `rows`.

    Raises what `Session` does.
    """
    manifest = artifact.manifest
    roots: dict[Role | None, KeysValues] = {None: _nothing(manifest.shape)}
    for record in manifest.prefixes:
        roots[record.role] = read_prefix(artifact.path(record.file), record.sha256, manifest.shape, len(record.ids))
    asked = [feeds(manifest.shape, roots[entry.prefix], entry.ids) for entry in entries]
    found = evaluate(artifact, asked, ["logits"], threads, progress)
    columns = np.searchsorted(manifest.head_ids or range(manifest.shape.vocab), rows)
    return np.stack([each["logits"][0, columns] for each in found])


def keys_and_values(artifact: Artifact, ids: Sequence[int], threads: int | None = None) -> KeysValues:
    """Of a prefix, by the artifact itself: (layers, tokens, kv_heads, head_dim)."""
    shape = artifact.manifest.shape
    names = [f"new_{part}_{layer}" for part in ("key", "value") for layer in range(shape.layers)]
    (found,) = evaluate(artifact, [feeds(shape, _nothing(shape), ids)], names, threads)
    return np.stack([found[name] for name in names[: shape.layers]]), np.stack([found[name] for name in names[shape.layers :]])


def feeds(shape: Shape, root: KeysValues, ids: Sequence[int]) -> Values:
    """The graph's inputs for the tokens behind a prefix (layers, tokens, kv_heads, head_dim), in one pass."""
    length = root[0].shape[1]
    node = Node(length, np.empty(0, np.float32)) if length else None
    tree = merge([(node, ids)], shape.context)
    rows = {node: np.arange(length)} if node else {}
    (part,) = passes(tree, shape.heads, rows, length, tokens=len(ids), score_bytes=sys.maxsize)
    past = {f"past_{name}_{layer}": each[layer] for name, each in zip(("key", "value"), root, strict=True) for layer in range(shape.layers)}
    return {"ids": tree.ids, "positions": tree.positions, **{name: getattr(part, name) for name in PLAN}, **past}


def evaluate(artifact: Artifact, asked: Sequence[Values], outputs: Sequence[str], threads: int | None = None,
             progress: Progress | None = None, *, weights: int = WEIGHTS) -> list[Values]:
    """The named outputs for each of some inputs, on the CPU, with `weights` bytes of weights at a time.

    Writes a small file into the artifact's folder and removes it. Raises what `Session` does.
    """
    try:
        import onnx
    except ImportError as error:
        raise RuntimeMissingError("The package onnx", "convert") from error
    model = onnx.load(str(artifact.weights), load_external_data=False)
    parts, path = list(cut(model.graph, outputs, weights)), artifact.folder / MODEL
    told = progress or (lambda _stage, _done, _total: None)
    values = [dict(each) for each in asked]
    try:
        for place, piece in enumerate(parts):
            path.write_bytes(_model(onnx, model, piece, values[0]))
            _run(path, artifact.manifest.precision, threads, piece, values)
            told("gate", place + 1, len(parts))
    finally:
        path.unlink(missing_ok=True)
    return values


def cut(graph: Any, outputs: Sequence[str], weights: int) -> Iterator[Piece]:  # noqa: ANN401  onnx has no types
    """A graph's pieces, of the nodes that the outputs need."""
    tensors = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    nodes, groups = _needed(graph.node, outputs), [list[Any]()]
    held: set[str] = set()
    for node in nodes:
        new = {name for name in node.input if tensors.get(name)} - held
        if held and new and sum(tensors[name] for name in held | new) > weights:
            # a product in float16 keeps the Cast before it, for a runtime that multiplies in float32 leaves it out
            half = [node.op_type, groups[-1][-1].op_type] == ["Gemm", "Cast"]
            groups.append([groups[-1].pop()] if half else [])
            held = set()
        groups[-1].append(node)
        held |= new
    reads = [list(dict.fromkeys(name for node in group for name in node.input if name and name not in tensors)) for group in groups]
    for place, group in enumerate(groups):
        made = [name for node in group for name in node.output if name]
        kept = frozenset(outputs).union(*reads[place + 1 :])
        yield Piece(group, [name for name in reads[place] if name not in set(made)], [name for name in made if name in kept], kept)


def _needed(nodes: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    needed, found = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            found.append(node)
    return found[::-1]


def _bytes(tensor: Any) -> int:  # noqa: ANN401
    """Of external data; 0 for a constant inside the graph."""
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)


def _run(path: Path, precision: str, threads: int | None, piece: Piece, values: Sequence[Values]) -> None:
    """Put the values of every prompt through one piece; its session ends with this function."""
    session, run = Session(path, precision, "cpu", threads), Run()
    for each in values:
        made = session.run(piece.outputs, {name: each[name] for name in piece.inputs}, run)
        each.update(zip(piece.outputs, made, strict=True))
        for name in each.keys() - piece.kept:
            del each[name]


def _model(onnx: Any, whole: Any, piece: Piece, values: Values) -> bytes:  # noqa: ANN401
    """A piece as a model: inputs have the types and dimensions of `values`, tensors stay where the whole model has them."""
    helper, read = onnx.helper, {name for node in piece.nodes for name in node.input}
    own = {value.name: value for value in [*whole.graph.input, *whole.graph.output]}

    def told(name: str, value: NDArray[Any]) -> object:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)

    inputs = [own.get(name) or told(name, values[name]) for name in piece.inputs]
    # the runtime finds out the types of outputs
    outputs = [own.get(name) or onnx.ValueInfoProto(name=name) for name in piece.outputs]
    graph = helper.make_graph(piece.nodes, "piece", inputs, outputs, [tensor for tensor in whole.graph.initializer if tensor.name in read])
    model = helper.make_model(graph, functions=whole.functions, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    return bytes(model.SerializeToString())


def _nothing(shape: Shape) -> KeysValues:
    """No prefix."""
    empty = np.empty((shape.layers, 0, shape.kv_heads, shape.head_dim), np.float32)
    return empty, empty
