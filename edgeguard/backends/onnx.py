"""The contract on ONNX Runtime: guard graphs, packed; ordinary exports, one sequence at a time."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.backends import background
from edgeguard.backends.base import PACKED, BackendInfo, FloatArray, IntArray, Node, Run
from edgeguard.backends.kernels import kernel, own_of
from edgeguard.backends.keys_values import Buffer, keys_and_values, room
from edgeguard.backends.onnx_export import ExportGraph
from edgeguard.backends.onnx_session import Session, build
from edgeguard.backends.packing import NO_ROWS, Entry, Pass, Tree, merge, passes
from edgeguard.backends.prepacked import load, make
from edgeguard.errors import EdgeGuardError, InferenceError, ModelFileError
from edgeguard.machine import available_memory, cpu
from edgeguard.store.catalogue import check_files, check_unmoved
from edgeguard.store.manifest import Artifact
from edgeguard.store.prefix_cache import PrefixCache, ids_key

PROBE_TOKENS = 4
LARGE = 1 << 30
"""Bytes of an artifact from which on kernels of our own are used, and weights are packed after the first message: packing takes longer
than passes that pack as they go."""
ONE_AT_A_TIME = threading.Lock()
"""Held from the look at free memory until an artifact is packed."""
UNPACKED = {"session.disable_prepacking": "1"}
OWN_FAILED = "edgeguard's own kernel does not take this graph"
STATE_FORMAT = "1"
"""Of prefixes in the cache; a new one when a state has other parts or another order."""
AGAIN = "Convert the model again."
PLAN = ("queries", "places", "keys", "rows", "lanes")
"""Inputs of the guard graph that `Pass` holds under the same names."""


class Graph(Protocol):
    """How one kind of graph evaluates entries."""

    def extend(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """One node for each entry, in order."""
        ...


State: TypeAlias = "tuple[Graph, dict[str, str]]"
"""What evaluates, and all that changes a bit of what it gives."""


class OnnxBackend:
    """The backend contract over an ONNX artifact.

    `device` is `auto`, `cpu`, `cuda`, `directml`, `coreml` or `openvino`; only `auto` falls back. `threads` None is the
    machine's choice. With a `cache`, prefixes that are not the artifact's are restored from the disk, to the same bits.
    `prepacked` is the folder with packed forms of weights (`backends/prepacked.py`); one that fits is mapped instead of the
    artifact's own. Without one, a large int8 artifact is mapped as it is, so that it answers seconds after the start of the
    process; its weights are packed in the background after the first message (`background.settled` waits), unless a kernel of our
    own multiplies them as they are (`own` False: none is used). `checked` says that the files were just compared with the manifest
    (`store.check_files`).
    Raises what `Session` raises, and `ModelFileError` for a graph that is neither a guard graph nor an export with past keys
    and values.
    """

    def __init__(self, artifact: Artifact, *, device: str = "auto", threads: int | None = None,
                 cache: PrefixCache | None = None, prepacked: Path | None = None, checked: bool = False, own: bool = True) -> None:
        manifest = artifact.manifest
        self._artifact, shape = artifact, manifest.shape
        head_ids = np.asarray(manifest.head_ids or range(shape.vocab), np.int64)
        packed = None
        if prepacked is not None and device in ("auto", "cpu"):
            packed = load(artifact, prepacked, build(), threads, lambda session: probe(session, shape, head_ids))
        self._loading = Run()
        large = artifact.size >= LARGE and device in ("auto", "cpu")
        self._may_own = own and large and own_of(cpu(), manifest.precision) is not None
        self._load = partial(Session, artifact.path(manifest.weights).resolve(), manifest.precision, device, threads, checked=checked,
                             plain=not own)
        self._later = packed is None and packed_later(artifact, device)
        if packed or self._later:
            session = packed or self._load(entries=UNPACKED)
            fallbacks = session.fallbacks
            self._may_own = self._may_own and is_guard_graph(session)  # or an export would be packed twice
        else:
            session, fallbacks = self._loaded()
        self.info = BackendInfo(
            name="onnx", runtime=session.runtime, device=session.device, precision=manifest.precision, threads=session.threads,
            context=shape.context, head_ids=head_ids, kernel=f"{session.kernel.name}{', packed weights mapped' if packed else ''}",
            fallbacks=fallbacks,
        )
        self._cache = cache
        # whatever may change a bit of the state
        self._key = {"backend": "onnx", "format": STATE_FORMAT, "runtime": session.build, "device": session.device,
                     "precision": manifest.precision, "threads": str(session.threads)}
        self._state: State | None = self._using(session, ", unpacked" if self._later else "")
        self._evaluated_one = False
        self._packing: threading.Thread | None = None

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """Evaluate a prefix, or restore it: from the cache, or as one of the artifact's, then without logits, which would cost a pass.

        Raises `ModelFileError` when its file is damaged.
        """
        (graph, key), shape = self._running, self._artifact.manifest.shape
        for record in self._artifact.manifest.prefixes:
            if record.ids == tuple(prefix_ids) and isinstance(graph, GuardGraph):
                run.check()
                return graph.restored(*read_prefix(self._artifact.path(record.file), record.sha256, shape, len(record.ids)))
        if self._cache is None or not isinstance(graph, GuardGraph):
            return self._prefix(graph, prefix_ids, run)
        run.check()
        ids = tuple(map(int, prefix_ids))
        key = {**key, "ids": ids_key(ids)}
        if (held := self._cache.read(key)) and fits(held, shape, len(ids), len(self.info.head_ids)):
            return replace(graph.restored(held["keys"], held["values"]), logits=held["logits"])
        node = self._prefix(graph, ids, run)
        keys, values = keys_and_values(node)
        self._cache.write(key, {"keys": keys, "values": values, "logits": node.logits})
        return node

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """One node for each entry."""
        nodes = self._evaluated(self._running[0], entries, run)
        self._pack_later()
        return nodes

    def _evaluated(self, graph: Graph, entries: Sequence[Entry], run: Run) -> list[Node]:
        """A pass; one that failed, perhaps for want of time, is followed by packing, or it would fail again."""
        try:
            return graph.extend(entries, run)
        except EdgeGuardError:
            self._pack_later()
            raise

    def _prefix(self, graph: Graph, ids: Sequence[int], run: Run) -> Node:
        """Evaluate a prefix. Packing begins behind the second: it would slow down the message that waits for the first."""
        (node,) = self._evaluated(graph, [(None, ids)], run)
        if self._evaluated_one:
            self._pack_later()
        self._evaluated_one = True
        return node

    def _pack_later(self) -> None:
        """Begin to pack, once."""
        if self._later:
            self._later = False
            self._packing = background.start("packing", self._pack, self._loading.cancel)

    def _pack(self) -> None:
        """Load the packed weights and go on with them; when that fails, for want of memory or by `shutdown`, all stays as it is."""
        with suppress(EdgeGuardError, OSError, MemoryError, RuntimeError), ONE_AT_A_TIME:
            if available_memory() < self._artifact.size * PACKED:
                return
            before = check_files(self._artifact)  # again: it may be long since they were loaded
            session, fallbacks = self._loaded(asked=True)
            check_unmoved(self._artifact, before)
            self._state = self._using(session)
            self.info = replace(self.info, kernel=session.kernel.name, fallbacks=fallbacks)

    def _loaded(self, *, asked: bool = False) -> tuple[Session, tuple[str, ...]]:
        """A session, with a kernel of our own if one takes this graph and, if `asked`, answers; and what was wanted in vain."""
        session = self._by_own(asked=asked) if self._may_own else None
        if session is not None:
            return session, session.fallbacks
        session = self._load(loading=self._loading)
        return session, (*session.fallbacks, *([OWN_FAILED] if self._may_own else []))

    def _by_own(self, *, asked: bool) -> Session | None:
        """None when a kernel of our own does not take the graph. Other graphs than ours may hold products that need the runtime's ways."""
        try:
            session = self._load(own=True, loading=self._loading)
            if session.kernel.library and not is_guard_graph(session):
                return None
            if session.kernel.library and asked:
                probe(session, self._artifact.manifest.shape, self.info.head_ids)
        except (ModelFileError, InferenceError):
            return None
        return session

    def _using(self, session: Session, form: str = "") -> State:
        graph = graph_of(session, self._artifact.manifest.shape, self.info.head_ids)
        return graph, {**self._key, "kernel": session.kernel.name + form}

    def close(self, node: Node) -> None:
        """Nothing to do: keys and values go with the last node that needs them."""

    def shutdown(self) -> None:
        """Free the session, also one that is being loaded."""
        self._loading.cancel()
        if self._packing is not None:
            self._packing.join()
        self._state = None

    @property
    def _running(self) -> State:
        if self._state is None:
            raise ValueError("The backend was shut down.")
        return self._state


def packed_later(artifact: Artifact, device: str) -> bool:
    """Whether verdicts come sooner from the weights as they are: large ones of 8 bits that the processor multiplies without a change."""
    large = artifact.manifest.precision == "int8" and artifact.size >= LARGE
    return large and device in ("auto", "cpu") and not kernel(cpu(), "int8").entries


def graph_of(session: Session, shape: Shape, head_ids: IntArray) -> Graph:
    """The strategy for the kind of graph that a session holds."""
    kind = GuardGraph if is_guard_graph(session) else ExportGraph
    return kind(session, shape, head_ids)


def is_guard_graph(session: Session) -> bool:
    """Rather than an ordinary export."""
    return "ids" in session.types


def make_prepacked(artifact: Artifact, folder: Path) -> Path:
    """Write the packed form of a guard graph's weights for this machine below `folder`; `prepacked.make` tells the errors."""
    manifest = artifact.manifest
    head_ids = np.asarray(manifest.head_ids or range(manifest.shape.vocab), np.int64)
    return make(artifact, folder, lambda session: probe(session, manifest.shape, head_ids))


def probe(session: Session, shape: Shape, head_ids: IntArray) -> FloatArray:
    """Logits of a few ids that are always the same; raises `ModelFileError` for what is no guard graph of the shape."""
    ids = np.linspace(0, shape.vocab - 1, PROBE_TOKENS).astype(int).tolist()
    return GuardGraph(session, shape, head_ids).extend([(None, ids)], Run())[0].logits


def fits(held: Mapping[str, NDArray[Any]], shape: Shape, tokens: int, rows: int) -> bool:
    """Cached arrays are what the model's state consists of."""
    sizes = {"keys": (shape.layers, tokens, shape.kv_heads, shape.head_dim), "logits": (rows,)}
    return {name: (each.dtype, each.shape) for name, each in held.items()} == {
        name: (np.dtype(np.float32), size) for name, size in {**sizes, "values": sizes["keys"]}.items()}


def read_prefix(path: Path, digest: str, shape: Shape, tokens: int) -> tuple[FloatArray, FloatArray]:
    """Keys and values in a prefix file: an .npz (no pickle) of float32 (layers, tokens, kv_heads, head_dim).

    Raises `ModelFileError` when its SHA-256 is not `digest` or its arrays do not fit the model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ModelFileError(f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")
    wanted = (shape.layers, tokens, shape.kv_heads, shape.head_dim)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            keys, values = arrays["keys"], arrays["values"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is no prefix file: {error}") from error
    for array in (keys, values):
        if array.dtype != np.float32 or array.shape != wanted:
            raise ModelFileError(f"{path} holds {array.dtype} {array.shape}; the model needs float32 {wanted}. {AGAIN}")
    return keys, values


class GuardGraph:
    """The strategy for a guard graph: all entries in one pass, or in as few as their size allows."""

    def __init__(self, session: Session, shape: Shape, head_ids: IntArray) -> None:
        self._session, self._shape, self._rows = session, shape, len(head_ids)
        self._heads = (shape.kv_heads, shape.head_dim)
        parts = [f"{part}_{layer}" for layer in range(shape.layers) for part in ("key", "value")]
        self._past = [f"past_{part}" for part in parts]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        known = {"ids", "positions", *PLAN, *self._past}
        if known != set(session.types) or set(self._outputs) != set(session.outputs):
            raise ModelFileError(f"The guard graph does not have the {shape.layers} layers that its manifest says.")
        if session.shapes[self._past[0]][1:] != [*self._heads]:
            raise ModelFileError(f"The guard graph keeps keys in another order than this version of edgeguard. {AGAIN}")

    def extend(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """Evaluate what the entries do not share with each other or with their parents."""
        tree = merge(entries, self._shape.context)
        parents = list(dict.fromkeys(node for node in tree.parents if node))
        buffer, rows, first = room(parents, len(tree.ids), len(self._past), self._heads)
        logits: dict[int, FloatArray] = {}
        for part in passes(tree, self._shape.heads, rows, first):
            answers, *new = self._session.run(self._outputs, self._feeds(tree, part, buffer), run)
            if answers.shape[1] != self._rows:
                raise ModelFileError(f"The guard graph answers for {answers.shape[1]} token ids, its manifest says {self._rows}.")
            if not np.isfinite(answers).all():
                raise InferenceError("The model gave logits that are not finite; its weights are damaged.")
            logits |= dict(zip((part.rows + part.start).tolist(), answers, strict=True))
            buffer.write(first + part.start, new)
        return [
            Node(int(tree.positions[path[-1]]) + 1, logits[int(path[-1])], parent,
                 buffer.state(np.concatenate([rows[parent] if parent else NO_ROWS, first + path]), len(path)))
            for (parent, _), path in zip(entries, tree.paths, strict=True)
        ]

    def restored(self, keys: FloatArray, values: FloatArray) -> Node:
        """A root with keys and values (layers, tokens, kv_heads, head_dim) that are known; it has no logits."""
        tokens = keys.shape[1]
        buffer = Buffer(len(self._past), tokens, self._heads)
        buffer.write(0, [part[layer] for layer in range(self._shape.layers) for part in (keys, values)])
        return Node(tokens, np.empty(0, np.float32), None, buffer.state(np.arange(tokens), tokens))

    def _feeds(self, tree: Tree, part: Pass, buffer: Buffer) -> dict[str, FloatArray | IntArray]:
        tokens = slice(part.start, part.stop)
        past = {name: values[: part.past] for name, values in zip(self._past, buffer.parts, strict=True)}
        plan: dict[str, IntArray] = {name: getattr(part, name) for name in PLAN}
        return {"ids": tree.ids[tokens], "positions": tree.positions[tokens], **plan, **past}
