"""Planning of a pass: many sequences that share beginnings as one tree of tokens, cut into passes of bounded size.

Pure NumPy; knows nodes and ids, no runtime. In a pass the linear layers see all tokens as one list. Attention sees lanes:
one or more for each sequence, its keys gathered in the order of their positions. So the sums that make a token's result are
always added up in the same order, whatever else is in the pass and wherever it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
LANE = 8  # queries that cost about as much as what a lane costs whatever its queries: gathering its keys and values for the products
NO_ROWS: IntArray = np.empty(0, np.int64)

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
    past: int
    """Rows of the buffer that are the past: all up to the last one that is attended to."""
    queries: IntArray
    """(G, Q) tokens of the pass; filled up with the lane's first."""
    places: IntArray
    """(T,) where each token stands in the flattened `queries`."""
    keys: IntArray
    """(G, S) rows of the past and, behind them, tokens of the pass; the place in a lane is the position; filled up with 0."""
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


def passes(tree: Tree, heads: int, rows: Mapping[Node, IntArray], first: int, *, tokens: int = MAX_TOKENS,
           score_bytes: int = MAX_SCORE_BYTES) -> Iterator[Pass]:
    """Cut a tree into passes of at most `tokens` tokens and, where more than one token is left, `score_bytes` of scores.

    `rows` are the rows of the buffer in which each parent's whole line lies, `first` is the row of the tree's first token.
    """
    start = 0
    while start < len(tree.ids):
        part = _plan(tree, rows, first, _lanes(tree, start, tokens, score_bytes // (4 * heads)))
        yield part
        start = part.stop


def lineage(node: Node | None) -> list[Node]:
    """A node and its ancestors, root first."""
    line: list[Node] = []
    while node is not None:
        line.append(node)
        node = node.parent
    return line[::-1]


def _columns(length: int) -> int:
    return -(-length // COLUMNS) * COLUMNS


def _lanes(tree: Tree, start: int, tokens: int, scores: int) -> list[tuple[int, int]]:
    """First and last-but-one tokens of the lanes of the next pass: as many as fit, at least one token."""
    lanes: list[tuple[int, int]] = []
    at, most, widest = start, QUERIES, 0
    while at < min(start + tokens, len(tree.ids)):
        end = at + int(np.argmax(np.append(tree.owners[at:] != tree.owners[at], True)))
        if lanes and end - start > tokens >= end - at:
            break  # what fits into one pass is not cut, so that no later pass has to be fed its beginning
        stop = min(start + tokens, end)
        columns = _columns(int(tree.positions[stop - 1]) + 1)
        if not lanes:
            stop = min(stop, at + max(1, scores // columns))
        queries, columns = max(most, stop - at), max(widest, columns)
        padded = (len(lanes) + 1) * queries
        if lanes and (padded > max(tokens, PADDING * (stop - start)) or padded * columns > scores):
            break
        lanes.append((at, stop))
        at, most, widest = stop, queries, columns
    return _evened(lanes)


def _evened(lanes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The lanes, cut to the depth at which all of them together, each filled up to it, cost the least; what a token sees stays the same."""
    lengths = np.asarray([stop - first for first, stop in lanes])
    if (lengths == lengths[0]).all():
        return lanes
    depths = np.arange(int(lengths.max()), QUERIES - 1, -1)
    counts = (-(-lengths[:, None] // depths)).sum(0)
    depth = int(depths[np.argmin(counts * (depths + LANE))])
    return [(at, min(at + depth, stop)) for first, stop in lanes for at in range(first, stop, depth)]


def _plan(tree: Tree, rows: Mapping[Node, IntArray], first_row: int, lanes: list[tuple[int, int]]) -> Pass:
    start, stop = lanes[0][0], lanes[-1][1]
    owners = [int(tree.owners[first]) for first, _ in lanes]
    # what each lane attends to in the tree: its path up to its last token of this pass
    paths = [tree.paths[owner] for owner in owners]
    paths = [path[path < last] for path, (_, last) in zip(paths, lanes, strict=True)]
    parents = [tree.parents[owner] for owner in owners]
    old = [np.concatenate([rows[parent] if parent else NO_ROWS, first_row + path[path < start]])
           for parent, path in zip(parents, paths, strict=True)]
    past = max((int(each.max()) + 1 for each in old if len(each)), default=0)

    width = _columns(max(int(tree.positions[last - 1]) + 1 for _, last in lanes))
    depth = max(QUERIES, *(last - first for first, last in lanes))
    queries, keys = np.empty((len(lanes), depth), np.int64), np.zeros((len(lanes), width), np.int64)
    places = np.empty(stop - start, np.int64)
    for lane, (first, last) in enumerate(lanes):
        queries[lane] = first - start
        queries[lane, : last - first] = np.arange(first, last) - start
        places[first - start : last - start] = lane * depth + np.arange(last - first)
        line = np.concatenate([old[lane], past + paths[lane][paths[lane] >= start] - start])
        keys[lane, : len(line)] = line
    ends = np.unique([path[-1] for path in tree.paths])
    asked = ends[(ends >= start) & (ends < stop)] - start
    asked = asked if len(asked) else np.asarray([stop - start - 1])
    return Pass(start, stop, past, queries, places, keys, asked, places[asked] // depth)
