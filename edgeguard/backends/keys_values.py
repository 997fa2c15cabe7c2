"""Where nodes of the guard graph keep keys and values: buffers that lines of nodes share, so that a past is a view, never a copy.

Pure NumPy. A buffer holds the tokens of one line of nodes and of what branches from it, in the order of their evaluation;
which of them a token attends to is the plan's to say (`packing`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeguard.backends.base import FloatArray, IntArray, Node
from edgeguard.backends.packing import lineage

SPARE = 512
"""Tokens of room behind what a buffer is made for, and a quarter of that more: memory that is not touched is not used."""


class Buffer:
    """Keys and values of some tokens: for each layer its keys (after RoPE) and its values, (capacity, kv_heads, head_dim)."""

    def __init__(self, parts: int, tokens: int, heads: tuple[int, int]) -> None:
        self.capacity = tokens + SPARE + tokens // 4
        self.parts: list[FloatArray] = [np.empty((self.capacity, *heads), np.float32) for _ in range(parts)]
        self._live: weakref.WeakSet[State] = weakref.WeakSet()

    @property
    def used(self) -> int:
        """Rows up to the last one that a living node needs; what lies behind is free."""
        return max((state.stop for state in self._live), default=0)

    def write(self, start: int, values: Sequence[FloatArray]) -> None:
        """Fill rows from `start` on, part by part."""
        for part, piece in zip(self.parts, values, strict=True):
            part[start : start + len(piece)] = piece

    def state(self, line: IntArray, own: int) -> State:
        """What a node keeps whose line lies in these rows, its own tokens in the last of them."""
        state = State(self, line, own)
        self._live.add(state)
        return state


@dataclass(frozen=True, eq=False)
class State:
    """Where a node's tokens lie, and those of all above it: parents may lie in another buffer too, but are never needed there."""

    buffer: Buffer
    line: IntArray
    """(length,) rows of the buffer, in order of position."""
    own: int
    """How many of the last are the node's own."""

    @property
    def rows(self) -> IntArray:
        """Of its own tokens."""
        return self.line[len(self.line) - self.own :]

    @property
    def stop(self) -> int:
        """The row behind its last."""
        return int(self.line.max()) + 1

    def arrays(self) -> list[FloatArray]:
        """Copies of its keys and values, part by part: (tokens, kv_heads, head_dim)."""
        return [part[self.rows] for part in self.buffer.parts]


def state_of(node: Node) -> State:
    """Of a node that the guard graph made."""
    if not isinstance(node.state, State):
        raise TypeError("The node is another backend's.")
    return node.state


def keys_and_values(node: Node) -> tuple[FloatArray, FloatArray]:
    """Copies of a node's own keys and values, (layers, tokens, kv_heads, head_dim)."""
    parts = state_of(node).arrays()
    return np.stack(parts[::2]), np.stack(parts[1::2])


def room(parents: Sequence[Node], tokens: int, parts: int, heads: tuple[int, int]) -> tuple[Buffer, Mapping[Node, IntArray], int]:
    """A buffer with room for more tokens behind the lines of some nodes; each line's rows in it, and the first row that is free.

    It is the one in which all these lines lie, else a new one that begins with a copy of them.
    """
    buffers = {state_of(node).buffer for node in parents}
    if len(buffers) == 1:
        (buffer,) = buffers
        if (used := buffer.used) + tokens <= buffer.capacity:
            return buffer, {node: state_of(node).line for node in parents}, used
    nodes = list(dict.fromkeys(each for node in parents for each in lineage(node)))
    states = [state_of(node) for node in nodes]
    stops = np.cumsum([0, *(state.own for state in states)])
    buffer = Buffer(parts, int(stops[-1]) + tokens, heads)
    for state, start in zip(states, stops, strict=False):
        for part, old in zip(buffer.parts, state.buffer.parts, strict=True):
            np.take(old, state.rows, 0, part[start : start + state.own], "clip")
    own = {node: np.arange(start, start + state.own) for node, state, start in zip(nodes, states, stops, strict=False)}
    return buffer, {node: np.concatenate([own[each] for each in lineage(node)]) for node in parents}, int(stops[-1])
