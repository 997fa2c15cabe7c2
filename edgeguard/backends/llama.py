"""llama.cpp behind the backend contract, by its low-level calls: token ids in, logits of the asked rows out.

One context holds one cache that all sequences share. A node is a sequence id: `llama_memory_seq_cp` gives a child its
ancestors' cells, a token that several entries share is evaluated once and carries all their ids. When cells or ids run
out, nodes that are not needed leave the cache; what they were made of is kept, so they come back when they are extended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends import llama_amx
from edgeguard.backends.base import BackendInfo, Node, Run
from edgeguard.backends.llama_native import LANES, SEQUENCES, Batch, Session, blocks, build, choose_device, devices, library
from edgeguard.errors import ContextLengthError, InferenceError, ModelMismatchError
from edgeguard.gguf_check import check_gguf
from edgeguard.machine import default_threads
from edgeguard.store.prefix_cache import PrefixCache, ids_key

STATE_FORMAT = "1"
"""Of prefixes on the disk; a new one when other cells or other parts are saved."""
PASS = 128
"""New tokens that are worth a pass on CPUs: products gain nothing by more, and in one cache attention looks at the cells of all texts."""
SHORT = 8
"""Tokens of a branch of an answer; longer entries are texts."""

REPACKED, AS_STORED = "repacking allowed", "weights as in the file"
NO_AMX = ("without AMX and repacked weights: llama.cpp's AMX code crashes as it was compiled here; "
          "compile llama-cpp-python again with CXXFLAGS=-fno-dse")

Entry = tuple[Node | None, Sequence[int]]


class _CacheFullError(InferenceError):
    """Nothing may leave the cache and the pass still does not fit."""

    def __init__(self) -> None:
        super().__init__("llama.cpp's cache has no room left; load the model with a longer context.")


@dataclass(eq=False)
class _Cells:
    """Sequences that share cells and leave the cache together, so that whole blocks become free."""

    sequences: list[int]
    parent: _Cells | None
    users: int
    """Nodes of these sequences, and children in the cache."""
    count: int
    """How many cells the sequences added."""


@dataclass(eq=False)
class _Kept:
    """What the backend knows of a node."""

    ids: tuple[int, ...]
    """The node's own tokens; enough to evaluate it again."""
    sequence: int | None
    """Its sequence id, or None while it is not in the cache."""
    cells: _Cells
    used: int
    """When it was last needed, by the backend's count of passes."""


def merged(entries: Sequence[Entry], sequences: Sequence[int]) -> Batch:
    """The entries' tokens, what entries of one parent have in common at their beginnings only once; each sequence in order.

    An entry of more than SHORT tokens leaves another one only between blocks of LANES positions: inside of one, its sums
    would be rounded otherwise than when it is alone.
    """
    batch = Batch()
    places: dict[tuple[int, int], int] = {}
    for (parent, ids), sequence in zip(entries, sequences, strict=True):
        at, start, before = -1 - id(parent), 0 if parent is None else parent.length, len(batch.tokens)
        common = _known(places, at, ids)
        if SHORT < len(ids) != common:
            common = max(0, (start + common) // LANES * LANES - start)
        for index, token in enumerate(map(int, ids)):
            place = places[at, token] if index < common else batch.add(token, start + index)
            places.setdefault((at, token), place)
            at = place
            batch.owners[at].append(sequence)
        batch.ends.append(at)
        if before < len(batch.tokens):
            batch.runs.append((sequence, batch.positions[before], len(batch.tokens) - before))
    return batch


def _known(places: dict[tuple[int, int], int], at: int, ids: Sequence[int]) -> int:
    """How many tokens of an entry stand in the batch already."""
    for count, token in enumerate(ids):
        if (at, int(token)) not in places:
            return count
        at = places[at, int(token)]
    return len(ids)


class LlamaBackend:
    """A GGUF file on llama.cpp; the whole vocabulary is the head.

    `device` is `auto`, `cpu`, `cuda`, `metal`, `vulkan`, `rocm` or `sycl`; only `auto` falls back to the CPU. `context`
    is the most tokens of a sequence, by default what the model was made for; the cache for it is allocated at once.
    Without `repack` the weights stay mapped as they lie in the file, for little memory instead of speed. With a `cache`,
    prefixes are restored from the disk, to the same bits.
    Raises `ModelFileError`, `ModelMemoryError`, `DeviceError`, `RuntimeMissingError`.
    """

    def __init__(self, path: Path, *, device: str = "auto", threads: int | None = None, context: int | None = None,
                 repack: bool = True, cache: PrefixCache | None = None) -> None:
        header = check_gguf(path)
        llama = library()
        granted, handle = choose_device(device, devices(llama))
        longest = min(context or header.shape.context, header.shape.context)
        threads = threads or default_threads()
        fallbacks: tuple[str, ...] = ()
        if repack and handle is None and not llama_amx.works(llama):
            repack, fallbacks = False, (NO_AMX,)
        self._session = Session(path, device=handle, threads=threads, context=longest, precision=header.precision, repack=repack)
        self._vocab = header.shape.vocab
        self._free = list(range(SEQUENCES))
        self._nodes: dict[int, Node] = {}
        self._passes = 0
        self.info = BackendInfo(
            name="llama", runtime=f"llama-cpp-python {llama.__version__}", device=granted, precision=header.precision,
            threads=threads, context=longest, head_ids=np.arange(self._vocab, dtype=np.int64),
            pass_tokens=PASS if handle is None else None,
            kernel=REPACKED if repack and handle is None else AS_STORED, fallbacks=fallbacks,
        )
        self._cache = cache
        # whatever may change a bit of the state
        self._key = {"backend": "llama", "format": STATE_FORMAT, "runtime": build(llama), "device": granted,
                     "precision": header.precision, "threads": str(threads), "repack": str(repack)}

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """Restore a prefix from the disk, or evaluate it in a pass of its own; kept until `close`."""
        self._check(None, prefix_ids)
        run.check()
        if self._cache is None:
            return self._all([(None, prefix_ids)], run)[0]
        ids = tuple(map(int, prefix_ids))
        key = {**self._key, "ids": ids_key(ids)}
        if held := self._cache.read(key):
            logits = held.pop("logits", np.empty(0))
            if node := self._restored(ids, logits, list(held.values())):
                return node
        node = self._all([(None, ids)], run)[0]
        pieces = self._session.save(_resident(node), len(ids))
        self._cache.write(key, {"logits": node.logits, **{f"cells {place}": piece for place, piece in enumerate(pieces)}})
        return node

    def _restored(self, ids: tuple[int, ...], logits: NDArray[Any], pieces: list[NDArray[Any]]) -> Node | None:
        """A root as it was when it was saved, or None where it does not fit."""
        if not self._free or logits.shape != (self._vocab,) or not self._session.restore(self._free[-1], len(ids), pieces):
            return None
        sequence = self._free.pop()
        cells = _Cells([sequence], None, 1, blocks(0, len(ids)) * LANES)
        node = self._nodes[sequence] = Node(len(ids), logits, None, _Kept(ids, sequence, cells, self._passes))
        return node

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """One node for each entry, in one pass if cells and sequence ids suffice."""
        return self._all(entries, run)

    def close(self, node: Node) -> None:
        """Free a node's sequence; the cells of ancestors and children stay."""
        self._drop(node)

    def shutdown(self) -> None:
        """Free context and model; again is harmless."""
        self._nodes.clear()
        self._session.close()

    def _all(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        for parent, ids in entries:
            self._check(parent, ids)
        nodes: list[Node] = []
        waiting = [list(entries)] if entries else []
        try:
            while waiting:
                part = waiting.pop()
                try:
                    nodes += self._evaluate(part, run)
                except _CacheFullError:
                    half = len(part) // 2
                    if half:
                        waiting += [part[half:], part[:half]]
                    else:
                        nodes += self._evaluate_alone(part, run)
        except BaseException:
            for node in nodes:
                self._drop(node)
            raise
        return nodes

    def _check(self, parent: Node | None, ids: Sequence[int]) -> None:
        if not len(ids):
            raise ValueError("A node needs at least one token.")
        length = len(ids) + (0 if parent is None else parent.length)
        if length > self.info.context:
            raise ContextLengthError(length, self.info.context)
        if not 0 <= min(ids) <= max(ids) < self._vocab:
            raise ModelMismatchError(f"A token id is outside the model's vocabulary of {self._vocab}: another model's tokenizer.")

    def _fits(self, entries: Sequence[Entry]) -> bool:
        """One pass can hold them all, if need be with nothing else in the cache."""
        above = {id(cells): cells for parent, _ in entries for cells in _path(parent)}
        count = sum(cells.count for cells in above.values()) + merged(entries, range(len(entries))).cells
        sequences = sum(len(cells.sequences) for cells in above.values()) + len(entries)
        return count <= self._session.cells and sequences <= SEQUENCES

    def _evaluate(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """One forward pass; raises `_CacheFullError` when it is too large."""
        if not self._fits(entries):
            raise _CacheFullError
        self._passes += 1
        parents = {id(parent): parent for parent, _ in entries if parent is not None}
        for parent in parents.values():
            self._recall(parent, parents, run)
        return self._forward(entries, parents, run)

    def _evaluate_alone(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """A pass for one entry in an empty cache, its ancestors joined into one run: what the context allows fits."""
        for node in list(self._nodes.values()):
            self._drop(node)
        (parent, _), = entries
        if parent is not None:
            path = [token for node in reversed(_ancestry(parent)) for token in _kept(node).ids]
            self._put_back(parent, self._forward([(None, path)], {}, run)[0])
        return self._forward(entries, {id(parent): parent} if parent else {}, run)

    def _forward(self, entries: Sequence[Entry], needed: dict[int, Node], run: Run) -> list[Node]:
        sequences: list[int] = []
        try:
            while len(sequences) < len(entries):
                sequences.append(self._sequence(needed))
            batch = merged(entries, sequences)
            while not self._session.lay_out(batch):
                self._make_room(needed)
            for (parent, _), sequence in zip(entries, sequences, strict=True):
                if parent is not None:
                    self._session.copy(_resident(parent), sequence)
            while not self._session.decode(batch, run):
                self._make_room(needed)
            rows = [self._session.logits(end) for end in batch.ends]
        except BaseException:
            self._release(sequences)
            raise
        cells = _shared(entries, sequences, batch)
        nodes = []
        for (parent, ids), sequence, row in zip(entries, sequences, rows, strict=True):
            kept = _Kept(tuple(map(int, ids)), sequence, cells[sequence], self._passes)
            node = Node((0 if parent is None else parent.length) + len(ids), row, parent, kept)
            self._nodes[sequence] = node
            nodes.append(node)
        return nodes

    def _recall(self, node: Node, needed: dict[int, Node], run: Run) -> None:
        """See that a node is in the cache; one that left is evaluated again from its nearest ancestor that stayed."""
        kept = _kept(node)
        kept.used = self._passes
        if kept.sequence is not None:
            return
        if node.parent is not None:
            needed = needed | {id(node.parent): node.parent}
            self._recall(node.parent, needed, run)
        self._put_back(node, self._forward([(node.parent, kept.ids)], needed, run)[0])

    def _put_back(self, node: Node, twin: Node) -> None:
        """Give a node that had left the cache the sequence of one that was evaluated in its place."""
        kept, new = _kept(node), _kept(twin)
        kept.sequence, kept.cells = new.sequence, new.cells
        self._nodes[_resident(node)] = node

    def _sequence(self, needed: dict[int, Node]) -> int:
        while not self._free:
            self._make_room(needed)
        return self._free.pop()

    def _make_room(self, needed: dict[int, Node]) -> None:
        """Let the node leave that is missed least: first those without children, roots last, the oldest before others."""
        parents = {id(node.parent) for node in self._nodes.values()}
        leaving = [node for node in self._nodes.values() if id(node) not in needed]
        if not leaving:
            raise _CacheFullError
        self._drop(min(leaving, key=lambda node: (id(node) in parents, node.parent is None, _kept(node).used)))

    def _drop(self, node: Node) -> None:
        kept = _kept(node)
        if kept.sequence is not None and self._nodes.pop(kept.sequence, None) is not None:
            self._let_go(kept.cells)
        kept.sequence = None

    def _let_go(self, cells: _Cells) -> None:
        cells.users -= 1
        if not cells.users:
            self._release(cells.sequences)
            if cells.parent is not None:
                self._let_go(cells.parent)

    def _release(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._session.forget(sequence)
        self._free += sequences


def _shared(entries: Sequence[Entry], sequences: Sequence[int], batch: Batch) -> dict[int, _Cells]:
    """The cells of each new sequence: entries of one parent with the same first token have them in common."""
    counts = {owner: blocks(start, length) * LANES for owner, start, length in batch.runs}
    groups: dict[tuple[int, int], _Cells] = {}
    found: dict[int, _Cells] = {}
    for (parent, ids), sequence in zip(entries, sequences, strict=True):
        key = (id(parent), int(ids[0]))
        if key not in groups:
            above = None if parent is None else _kept(parent).cells
            groups[key] = _Cells([], above, 0, 0)
            if above is not None:
                above.users += 1
        cells = found[sequence] = groups[key]
        cells.sequences.append(sequence)
        cells.users += 1
        cells.count += counts.get(sequence, 0)
    return found


def _kept(node: Node) -> _Kept:
    if not isinstance(node.state, _Kept):
        raise ValueError("This node comes from another backend.")
    return node.state


def _resident(node: Node) -> int:
    """The sequence id of a node that is in the cache."""
    sequence = _kept(node).sequence
    if sequence is None:
        raise InferenceError("A node left the cache while it was needed.")
    return sequence


def _ancestry(node: Node | None) -> list[Node]:
    """The node and its ancestors."""
    found = []
    while node is not None:
        found.append(node)
        node = node.parent
    return found


def _path(node: Node | None) -> list[_Cells]:
    """What a node and its ancestors take in the cache, or will take when they come back."""
    found = []
    for above in _ancestry(node):
        kept = _kept(above)
        if kept.sequence is not None:
            held: _Cells | None = kept.cells
            while held is not None:
                found.append(held)
                held = held.parent
            break
        count = blocks(above.length - len(kept.ids), len(kept.ids)) * LANES
        found.append(_Cells([0], None, 1, count))
    return found
