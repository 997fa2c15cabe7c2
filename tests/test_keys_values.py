from __future__ import annotations

import gc

import numpy as np
import pytest

from edgeguard.backends.base import Node
from edgeguard.backends.keys_values import SPARE, Buffer, keys_and_values, room, state_of

HEADS = (2, 4)


def filled(buffer: Buffer, start: int, tokens: int, mark: float, parent: Node | None = None) -> Node:
    """A node with `tokens` tokens of its own from row `start` on; part p of token t holds mark + 10 t + p."""
    own = np.arange(tokens, dtype=np.float32)[:, None, None] * 10 + mark + np.zeros((tokens, *HEADS), np.float32)
    buffer.write(start, [own + part for part in range(len(buffer.parts))])
    above = state_of(parent).line if parent else np.empty(0, np.int64)
    line = np.concatenate([above, np.arange(start, start + tokens)])
    return Node(len(line), np.empty(0, np.float32), parent, buffer.state(line, tokens))


def test_more_tokens_go_behind_those_of_the_living() -> None:
    buffer, rows, first = room([], 5, 2, HEADS)
    assert (rows, first, buffer.used) == ({}, 0, 0)
    root = filled(buffer, 0, 5, 100)
    same, rows, first = room([root], 7, 2, HEADS)
    assert same is buffer and rows[root].tolist() == [0, 1, 2, 3, 4] and first == 5
    leaf = filled(buffer, first, 7, 200, root)
    both, rows, first = room([root, leaf], 1, 2, HEADS)
    assert both is buffer and first == 12 and rows[leaf].tolist() == list(range(12)) and rows[root].tolist() == list(range(5))
    del leaf, both, rows
    gc.collect()
    assert room([root], 1, 2, HEADS)[2] == 5


def test_a_line_that_was_brought_together_is_not_copied_again() -> None:
    root = filled(Buffer(2, 4, HEADS), 0, 4, 100)
    buffer, rows, first = room([root], SPARE + 100, 2, HEADS)
    leaf = Node(6, np.empty(0, np.float32), root, buffer.state(np.concatenate([rows[root], [first, first + 1]]), 2))
    again, rows, first = room([leaf], 3, 2, HEADS)
    assert again is buffer and first == 6 and rows[leaf].tolist() == list(range(6))


def test_a_full_buffer_is_left_as_it_is() -> None:
    buffer = Buffer(2, 4, HEADS)
    root = filled(buffer, 0, 4, 100)
    other, rows, first = room([root], SPARE + 100, 2, HEADS)
    assert other is not buffer and first == 4 and other.capacity > SPARE + 104
    for part, value in enumerate(other.parts):
        assert value[rows[root], 0, 0].tolist() == [100 + part, 110 + part, 120 + part, 130 + part]
    assert buffer.used == 4 and other.used == 0


def test_lines_of_two_buffers_are_brought_together() -> None:
    one, two = Buffer(2, 4, HEADS), Buffer(2, 4, HEADS)
    root, other = filled(one, 2, 3, 100), filled(two, 1, 2, 200)
    leaf = filled(one, 5, 1, 300, root)
    buffer, rows, first = room([leaf, other, root], 3, 2, HEADS)
    assert buffer not in (one, two) and first == 6
    assert buffer.parts[1][rows[leaf], 0, 0].tolist() == [101, 111, 121, 301]
    assert buffer.parts[1][rows[root], 1, 3].tolist() == [101, 111, 121]
    assert buffer.parts[0][rows[other], 1, 3].tolist() == [200, 210]


def test_keys_and_values_of_a_node() -> None:
    keys, values = keys_and_values(filled(Buffer(4, 3, HEADS), 1, 2, 100))
    assert keys.shape == values.shape == (2, 2, *HEADS)
    assert keys[:, :, 0, 0].tolist() == [[100, 110], [102, 112]] and values[:, :, 0, 0].tolist() == [[101, 111], [103, 113]]


def test_a_node_of_another_backend_is_refused() -> None:
    with pytest.raises(TypeError, match="another backend"):
        state_of(Node(1, np.empty(0, np.float32)))
