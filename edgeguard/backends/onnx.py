"""The contract on ONNX Runtime: guard graphs, packed; ordinary exports, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeguard.architecture import Shape
from edgeguard.backends.base import BackendInfo, FloatArray, IntArray, Node, Run
from edgeguard.backends.onnx_export import ExportGraph
from edgeguard.backends.onnx_session import Session
from edgeguard.backends.packing import Entry, Pass, Tree, merge, passes
from edgeguard.errors import InferenceError, ModelFileError
from edgeguard.store.files import sha256
from edgeguard.store.manifest import Artifact, PrefixRecord

PLAN = ("queries", "places", "keys", "rows", "lanes")
"""Inputs of the guard graph that `Pass` holds under the same names."""
State = list[FloatArray]
"""A node's own keys (after RoPE) and values, (kv_heads, tokens, head_dim): keys of layer 0, its values, keys of layer 1, ..."""


class Graph(Protocol):
    """How one kind of graph evaluates entries; their nodes' state is a `State`."""

    def extend(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """One node for each entry, in order."""
        ...


class OnnxBackend:
    """The backend contract over an ONNX artifact.

    `device` is `auto`, `cpu`, `cuda`, `directml`, `coreml` or `openvino`; only `auto` falls back. `threads` None is the
    machine's choice. Raises what `Session` raises, and `ModelFileError` for a graph that is neither a guard graph nor an
    export with past keys and values.
    """

    def __init__(self, artifact: Artifact, *, device: str = "auto", threads: int | None = None) -> None:
        manifest = artifact.manifest
        self._artifact, shape = artifact, manifest.shape
        session = Session(artifact.path(manifest.weights), manifest.precision, device, threads)
        head_ids = np.asarray(manifest.head_ids or range(shape.vocab), np.int64)
        kind = GuardGraph if "ids" in session.types else ExportGraph
        self._graph: Graph | None = kind(session, shape, head_ids)
        self.info = BackendInfo(
            name="onnx", runtime=session.runtime, device=session.device, precision=manifest.precision, threads=session.threads,
            context=shape.context, head_ids=head_ids,
        )

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """Evaluate a prefix, or restore it when it is one of the artifact's; raises `ModelFileError` when its file is damaged."""
        for record in self._artifact.manifest.prefixes:
            if record.ids == tuple(prefix_ids):
                return self._restored(record, run)
        return self._running.extend([(None, prefix_ids)], run)[0]

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """One node for each entry."""
        return self._running.extend(entries, run)

    def close(self, node: Node) -> None:
        """Nothing to do: keys and values go with the last node that needs them."""

    def shutdown(self) -> None:
        """Free the session."""
        self._graph = None

    @property
    def _running(self) -> Graph:
        if self._graph is None:
            raise ValueError("The backend was shut down.")
        return self._graph

    def _restored(self, record: PrefixRecord, run: Run) -> Node:
        """The prefix as conversion computed it in full precision; its last token is evaluated once more, for the logits."""
        state = read_prefix(self._artifact.path(record.file), record.sha256, self._artifact.manifest.shape, len(record.ids))
        length = len(record.ids)
        trunk = Node(length - 1, np.empty(0, np.float32), None, [each[:, :-1] for each in state]) if length > 1 else None
        (last,) = self._running.extend([(trunk, record.ids[-1:])], run)
        return Node(length, last.logits, None, state)


def read_prefix(path: Path, digest: str, shape: Shape, tokens: int) -> State:
    """The state in a prefix file: an .npz (no pickle) of float32 `keys` and `values`, (layers, kv_heads, tokens, head_dim).

    Raises `ModelFileError` when its SHA-256 is not `digest` or its arrays do not fit the model.
    """
    found = sha256(path)
    if found != digest:
        raise ModelFileError(f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")
    wanted = (shape.layers, shape.kv_heads, tokens, shape.head_dim)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys, values = arrays["keys"], arrays["values"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is no prefix file: {error}") from error
    for array in (keys, values):
        if array.dtype != np.float32 or array.shape != wanted:
            raise ModelFileError(f"{path} holds {array.dtype} {array.shape}; the model needs float32 {wanted}.")
    return [part[layer] for layer in range(shape.layers) for part in (keys, values)]


class GuardGraph:
    """The strategy for a guard graph: all entries in one pass, or in as few as their size allows."""

    def __init__(self, session: Session, shape: Shape, head_ids: IntArray) -> None:
        self._session, self._shape, self._rows = session, shape, len(head_ids)
        parts = [f"{part}_{layer}" for layer in range(shape.layers) for part in ("key", "value")]
        self._past = [f"past_{part}" for part in parts]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        known = {"ids", "positions", *PLAN, *self._past}
        if known != set(session.types) or set(self._outputs) != set(session.outputs):
            raise ModelFileError(f"The guard graph does not have the {shape.layers} layers that its manifest says.")

    def extend(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """Evaluate what the entries do not share with each other or with their parents."""
        tree = merge(entries, self._shape.context)
        state: State = []
        logits: dict[int, FloatArray] = {}
        for part in passes(tree, self._shape.heads):
            answers, *new = self._session.run(self._outputs, self._feeds(tree, part, state), run)
            if answers.shape[1] != self._rows:
                raise ModelFileError(f"The guard graph answers for {answers.shape[1]} token ids, its manifest says {self._rows}.")
            if not np.isfinite(answers).all():
                raise InferenceError("The model gave logits that are not finite; its weights are damaged.")
            logits |= dict(zip((part.rows + part.start).tolist(), answers, strict=True))
            state = self._kept(state, new, part, len(tree.ids))
        return [
            Node(int(tree.positions[path[-1]]) + 1, logits[int(path[-1])], parent, _own(state, path, len(tree.ids)))
            for (parent, _), path in zip(entries, tree.paths, strict=True)
        ]

    def _feeds(self, tree: Tree, part: Pass, state: State) -> dict[str, FloatArray | IntArray]:
        tokens = slice(part.start, part.stop)
        past = {name: self._joined(index, part, state) for index, name in enumerate(self._past)}
        plan: dict[str, IntArray] = {name: getattr(part, name) for name in PLAN}
        return {"ids": tree.ids[tokens], "positions": tree.positions[tokens], **plan, **past}

    def _joined(self, index: int, part: Pass, state: State) -> FloatArray:
        """One layer's keys or values of all that the pass attends to; not copied where they lie together already."""
        pieces: list[FloatArray] = [node.state[index] for node in part.ancestors]  # type: ignore[index]
        if len(part.earlier):
            pieces.append(np.take(state[index], part.earlier, 1))
        if not pieces:
            return np.empty((self._shape.kv_heads, 0, self._shape.head_dim), np.float32)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)

    def _kept(self, state: State, new: list[FloatArray], part: Pass, total: int) -> State:
        """The tree's keys and values with those of one more pass."""
        if len(new[0][0]) == total:
            return new
        state = state or [np.empty((self._shape.kv_heads, total, self._shape.head_dim), np.float32) for _ in new]
        for whole, piece in zip(state, new, strict=True):
            whole[:, part.start : part.stop] = piece
        return state


def _own(state: State, path: IntArray, total: int) -> State:
    """What a node keeps: its path's keys and values, without a copy when nothing else was in the call."""
    return state if len(path) == total else [np.take(each, path, 1) for each in state]
