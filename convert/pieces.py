"""Large tensors in pieces of rows, so that none is ever widened whole, and work on such pieces by a few threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.convert.quantize import Int4Blocks, Int8Rows, QuantisedTensor
from edgeguard.weights import Rows, Weights, expected

PIECE = 1 << 24
"""Weights looked at together: 64 MB in float32."""
QUANTISED = 1 << 21
"""Weights that one thread quantises at a time: small enough that the smallest matrix of an 8B model is work for two."""
AHEAD = 2  # pieces in work for each thread, so that none waits for the reader

Part = TypeVar("Part")
Made = TypeVar("Made")
Quantise = Callable[[str, NDArray[np.float32]], QuantisedTensor]


def pieces(rows: int, width: int, most: int = PIECE) -> Iterator[slice]:
    """Slices over the rows of a tensor, each of about `most` weights."""
    step = max(1, most // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def in_order(work: Callable[[Part], Made], parts: Iterable[Part], threads: int) -> Iterator[Made]:
    """What `work` makes of each part, in the order of the parts, with only a few of them in memory.

    NumPy lets go of the interpreter while it works, so that threads are enough.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) >= AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def quantised_pieces(weights: Weights, name: str, quantise: Quantise, threads: int, told: str = "") -> Iterator[QuantisedTensor]:
    """A matrix quantised in pieces of rows: rows and blocks know nothing of each other, so the weights are those of the whole.

    `told` is the name that errors say, by default the tensor's.
    """
    def work(index: Rows) -> QuantisedTensor:
        return quantise(told or name, weights.rows(name, index))

    rows, width = expected(weights.shape)[name]
    return in_order(work, pieces(rows, width, QUANTISED), threads)


def quantised(weights: Weights, name: str, quantise: Quantise, threads: int, told: str = "") -> QuantisedTensor:
    """The whole of it; the weights themselves are in memory in pieces only."""
    return joined(list(quantised_pieces(weights, name, quantise, threads, told)))


def joined(parts: list[QuantisedTensor]) -> QuantisedTensor:
    """Pieces of one tensor as one; the list is emptied on the way."""
    kind, count = type(parts[0]), sum(len(part.values) for part in parts)
    values = np.empty((count, *parts[0].values.shape[1:]), parts[0].values.dtype)
    scales = np.concatenate([part.scales for part in parts])
    end = count
    while parts:
        part = parts.pop()
        values[end - len(part.values) : end] = part.values
        end -= len(part.values)
    return kind(values, scales)


def chosen(tensor: QuantisedTensor, index: Rows) -> QuantisedTensor:
    """Some rows."""
    if isinstance(tensor, Int8Rows):
        return Int8Rows(tensor.values[index], tensor.scales[index])
    return Int4Blocks(tensor.values[index], tensor.scales[index])
