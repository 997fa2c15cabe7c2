"""Planning of a pass: many sequences that share beginnings as one tree of tokens, cut into passes of bounded size.

Pure NumPy; knows nodes and ids, no runtime. In a pass the linear layers see all tokens as one list. Attention sees lanes:
one for each sequence, its keys gathered in the order of their positions. So the sums that make a token's result are
always added up in the same order, whatever else is in the pass and wherever it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeguard.backends.base import IntArray, Node
from edgeguard.errors import ContextLengthError

MAX_TOKENS = 256
"""Of one pass: enough for matrix products at full speed, few enough for their memory to stay small."""
MAX_SCORE_BYTES = 128 << 20
"""Of one layer's attention scores in one pass."""
PADDING = 3  # places in lanes for each token of a pass, at most: beyond that lanes are too unequal to share a pass
COLUMNS = 64  # keys of a lane are filled up to a multiple of this, so that kernels never add a remainder in another order
QUERIES = 2  # of a lane, at least: kernels for a single row add in another order

Entry = tuple[Node | None, Sequence[int]]
"""What to extend (None: nothing yet), and by which ids."""


@dataclass(frozen=True, eq=False)
class Tree:
    """The tokens of all entries, longest entry first; those that begin alike under one parent are merged."""

    ids: IntArray
    """(N,)"""
    positions: IntArray
    """(N,) places in their sequences."""
    owners: IntArray
    """(N,) the entry for which each was added; an entry's own tokens are neighbours."""
    parents: Sequence[Node | None]
    """For each entry the node that it extends."""
    paths: Sequence[IntArray]
    """For each entry its tokens, in order."""


@dataclass(frozen=True, eq=False)
class Pass:
    """Tokens `start` to `stop` of a tree (T of them) in G lanes of Q queries and S keys."""

    start: int
    stop: int
    ancestors: Sequence[Node]
    """Nodes whose tokens are the first of the past."""
    earlier: IntArray
    """Tokens of earlier passes, ascending, that are the rest of the past."""
    queries: IntArray
    """(G, Q) tokens of the pass; filled up with the lane's first."""
    places: IntArray
    """(T,) where each token stands in the flattened `queries`."""
    keys: IntArray
    """(G, S) tokens of past and pass, the place in a lane being the position; filled up with 0, behind all queries."""
    rows: IntArray
    """(R,) tokens of the pass, ascending, with which an entry ends; its last token when there is none."""
    lanes: IntArray
    """(R,) their lanes."""


def merge(entries: Sequence[Entry], context: int) -> Tree:
    """The tree of some entries; raises `ContextLengthError` for one that would be longer than `context`."""
    places: dict[tuple[object, int], int] = {}
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    paths: list[IntArray] = [np.empty(0, np.int64)] * len(entries)
    for owner in sorted(range(len(entries)), key=lambda each: -len(entries[each][1])):
        parent, given = entries[owner]
        length = parent.length if parent else 0
        if not len(given):
            raise ValueError("A node needs at least one token.")
        if length + len(given) > context:
            raise ContextLengthError(length + len(given), context)
        path: list[int] = []
        for position, token in enumerate(map(int, given), length):
            # the first token hangs on its parent, every other one on a place in the tree
            place = places.setdefault((path[-1] if path else (parent,), token), len(ids))
            if place == len(ids):
                ids.append(token)
                positions.append(position)
                owners.append(owner)
            path.append(place)
        paths[owner] = np.asarray(path, np.int64)
    parents = [parent for parent, _ in entries]
    return Tree(np.asarray(ids, np.int64), np.asarray(positions, np.int64), np.asarray(owners, np.int64), parents, paths)


def passes(tree: Tree, heads: int, *, tokens: int = MAX_TOKENS, score_bytes: int = MAX_SCORE_BYTES) -> Iterator[Pass]:
    """Cut a tree into passes of at most `tokens` tokens and, where more than one token is left, `score_bytes` of scores."""
    start = 0
    while start < len(tree.ids):
        part = _plan(tree, _lanes(tree, start, tokens, score_bytes // (4 * heads)))
        yield part
        start = part.stop


def lineage(node: Node | None) -> list[Node]:
    """A node and its ancestors, root first."""
    line: list[Node] = []
    while node is not None:
        line.append(node)
        node = node.parent
    return line[::-1]


def own_length(node: Node) -> int:
    """Tokens that a node has beyond its parent's."""
    return node.length - (node.parent.length if node.parent else 0)


def _columns(length: int) -> int:
    return -(-length // COLUMNS) * COLUMNS


def _lanes(tree: Tree, start: int, tokens: int, scores: int) -> list[tuple[int, int]]:
    """First and last-but-one tokens of the lanes of the next pass: as many as fit, at least one token."""
    lanes: list[tuple[int, int]] = []
    at, most, widest = start, QUERIES, 0
    while at < min(start + tokens, len(tree.ids)):
        stop = min(start + tokens, at + int(np.argmax(np.append(tree.owners[at:] != tree.owners[at], True))))
        columns = _columns(int(tree.positions[stop - 1]) + 1)
        if not lanes:
            stop = min(stop, at + max(1, scores // columns))
        queries, columns = max(most, stop - at), max(widest, columns)
        padded = (len(lanes) + 1) * queries
        if lanes and (padded > max(tokens, PADDING * (stop - start)) or padded * columns > scores):
            break
        lanes.append((at, stop))
        at, most, widest = stop, queries, columns
    return lanes


def _plan(tree: Tree, lanes: list[tuple[int, int]]) -> Pass:
    start, stop = lanes[0][0], lanes[-1][1]
    owners = [int(tree.owners[first]) for first, _ in lanes]
    # what each lane attends to in the tree: its path up to its last token of this pass
    paths = [tree.paths[owner] for owner in owners]
    paths = [path[path < last] for path, (_, last) in zip(paths, lanes, strict=True)]
    earlier = np.unique(np.concatenate(paths))
    earlier = earlier[earlier < start]
    lines = [lineage(tree.parents[owner]) for owner in owners]
    ancestors = list(dict.fromkeys(node for line in lines for node in line))
    offsets = np.cumsum([0, *map(own_length, ancestors)])
    columns = {node: np.arange(first, last) for node, first, last in zip(ancestors, offsets, offsets[1:], strict=False)}
    past = int(offsets[-1]) + len(earlier)

    width = _columns(max(int(tree.positions[last - 1]) + 1 for _, last in lanes))
    depth = max(QUERIES, *(last - first for first, last in lanes))
    queries, keys = np.empty((len(lanes), depth), np.int64), np.zeros((len(lanes), width), np.int64)
    places = np.empty(stop - start, np.int64)
    for lane, (first, last) in enumerate(lanes):
        queries[lane] = first - start
        queries[lane, : last - first] = np.arange(first, last) - start
        places[first - start : last - start] = lane * depth + np.arange(last - first)
        old = paths[lane] < start
        in_tree = np.where(old, offsets[-1] + np.searchsorted(earlier, paths[lane]), past + paths[lane] - start)
        line = np.concatenate([*(columns[node] for node in lines[lane]), in_tree])
        keys[lane, : len(line)] = line
    ends = np.unique([path[-1] for path in tree.paths])
    rows = ends[(ends >= start) & (ends < stop)] - start
    rows = rows if len(rows) else np.asarray([stop - start - 1])
    return Pass(start, stop, ancestors, earlier, queries, places, keys, rows, places[rows] // depth)
