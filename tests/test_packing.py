from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.backends.base import Node
from edgeguard.backends.packing import COLUMNS, PADDING, Entry, Pass, Tree, lineage, merge, passes
from edgeguard.errors import ContextLengthError

CONTEXT = 1000


def node(tokens: Sequence[int], parent: Node | None = None) -> Node:
    """A node whose state is its own token ids."""
    return Node((parent.length if parent else 0) + len(tokens), np.empty(0, np.float32), parent, list(tokens))


def ids_of(each: Node | None) -> list[int]:
    return [token for one in lineage(each) for token in one.state]  # type: ignore[attr-defined]


def cut(tree: Tree, **limits: int) -> tuple[list[Pass], list[int]]:
    """The passes, and the ids in the buffer: nodes with gaps and out of order, then the tree's."""
    buffer: list[int] = []
    own = {}
    for each in reversed(list(dict.fromkeys(node for parent in tree.parents for node in lineage(parent)))):
        tokens: Any = each.state
        buffer += [-1, *tokens]
        own[each] = np.arange(len(buffer) - len(tokens), len(buffer))
    rows = {parent: np.concatenate([own[each] for each in lineage(parent)]) for parent in tree.parents if parent}
    return list(passes(tree, 2, rows, len(buffer), **limits)), buffer + tree.ids.tolist()


def check(entries: Sequence[Entry], tree: Tree, parts: Sequence[Pass], buffer: list[int], most: int, scores: int) -> None:
    """Every query of every pass sees exactly its own sequence, in order; every entry's end is answered once."""
    answered = []
    first = len(buffer) - len(tree.ids)
    for part in parts:
        visible = np.asarray(buffer[: part.past] + tree.ids[part.start : part.stop].tolist())
        assert part.past <= first + part.start and part.keys.shape[1] % COLUMNS == 0
        lanes, depth = part.queries.shape
        assert lanes == 1 or lanes * depth <= max(most, PADDING * (part.stop - part.start))
        assert lanes * depth * part.keys.shape[1] <= scores or part.stop - part.start == 1
        for place, token in enumerate(range(part.start, part.stop)):
            lane, query = divmod(int(part.places[place]), part.queries.shape[1])
            assert part.queries[lane, query] == place
            owner = int(tree.owners[token])
            position = int(tree.positions[token])
            sequence = ids_of(tree.parents[owner]) + list(entries[owner][1])
            assert visible[part.keys[lane, : position + 1]].tolist() == sequence[: position + 1]
        answered += [part.start + int(row) for row in part.rows]
        assert (part.places[part.rows] // part.queries.shape[1] == part.lanes).all()
    for (_, tokens), path in zip(entries, tree.paths, strict=True):
        assert tree.ids[path].tolist() == list(tokens)
        assert answered.count(int(path[-1])) == 1
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == len(tree.ids)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), TOKENS), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 64))
def test_every_token_sees_its_own_sequence_only(given_: list[tuple[int, list[int]]], tokens: int, columns: int) -> None:
    root = node([7, 8, 9])
    body = node([4, 5], root)
    nodes = [root, body, node([6], body), node([4, 5], root)]
    entries: list[Entry] = [(nodes[which] if which >= 0 else None, ids) for which, ids in given_]
    tree = merge(entries, CONTEXT)
    check(entries, tree, *cut(tree, tokens=tokens, score_bytes=4 * 2 * columns * COLUMNS), tokens, columns * COLUMNS)


def test_entries_that_begin_alike_share_tokens() -> None:
    root = node([1, 2])
    tree = merge([(root, [5, 6, 7]), (root, [5, 6, 8]), (root, [5]), (root, [9]), (root, [5, 6, 7])], CONTEXT)
    assert sorted(tree.ids.tolist()) == [5, 6, 7, 8, 9]
    assert tree.paths[0].tolist() == tree.paths[4].tolist()


def test_the_same_tokens_under_other_parents_are_not_shared() -> None:
    assert len(merge([(node([1]), [5, 6]), (node([1]), [5, 6]), (None, [5, 6])], CONTEXT).ids) == 6


def test_a_pass_keeps_its_limits() -> None:
    tree = merge([(None, list(range(900)))], CONTEXT)
    assert [part.stop - part.start for part in cut(tree, tokens=256)[0]] == [256, 256, 256, 132]
    for part in cut(tree, tokens=256, score_bytes=2 * 4 * 20_000)[0]:
        assert part.queries.size * part.keys.shape[1] <= 20_000


def test_one_long_entry_does_not_pad_many_short_ones() -> None:
    root = node([1])
    tree = merge([(root, [token]) for token in range(2, 60)] + [(root, list(range(100, 300)))], CONTEXT)
    parts, _ = cut(tree)
    assert sum(part.queries.size for part in parts) < 3 * len(tree.ids)


def test_a_long_lane_is_cut_where_the_others_are_short() -> None:
    root = node([1])
    codes: list[Entry] = [(root, [5, 6, 7, code]) for code in range(10, 21)]
    (part,), _ = cut(merge(codes, CONTEXT))
    assert part.queries.shape == (12, 2), "the common beginning and the first code in two lanes, ten codes in one each"
    (part,), _ = cut(merge([(root, list(range(5, 60))), (root, list(range(100, 150)))], CONTEXT))
    assert part.queries.shape == (2, 55), "lanes of about one length stay whole"


def test_what_fits_into_one_pass_is_not_cut() -> None:
    root = node([1])
    parts, _ = cut(merge([(root, [first] * 7) for first in range(2, 8)], CONTEXT), tokens=16)
    assert [part.stop - part.start for part in parts] == [14, 14, 14]
    assert all(part.past == 2 for part in parts)  # the root's row and the gap before it


def test_the_past_ends_with_the_last_row_that_is_attended_to() -> None:
    tree = merge([(None, [5] * 40), (None, [6] * 8)], CONTEXT)
    parts, _ = cut(tree, tokens=16)
    assert [(part.start, part.past) for part in parts] == [(0, 0), (16, 16), (32, 32)]
    assert parts[2].stop == 48 and len(parts[2].queries) == 2


def test_lineage() -> None:
    root = node([1, 2])
    leaf = node([3], root)
    assert lineage(leaf) == [root, leaf] and lineage(None) == []


def test_too_long_and_empty_entries_are_refused() -> None:
    with pytest.raises(ContextLengthError, match="1001 tokens"):
        merge([(node([1] * 900), [2] * 101)], CONTEXT)
    with pytest.raises(ValueError, match="at least one"):
        merge([(None, [])], CONTEXT)
