"""Weights in 8 and 4 bits: the scale of every row or block is searched by least squares, not taken from the maximum.

The squares may be weighed: `importance` (in,) says how much an error in each column matters, the mean square of what the column is
multiplied with (as in llama.cpp's importance matrix, and AWQ, https://arxiv.org/abs/2306.00978).

Scales are float16 numbers, so that one quantised tensor can be written to ONNX and, block by block, to a GGUF (Q8_0, Q4_0)
with exactly the same weights. One tensor at a time, in slices that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import ConversionError

BLOCK = 32
"""Neighbouring weights of a row that share one 4-bit scale."""
SLICE = 1 << 17  # weights looked at together: with their temporaries about 3 MB
LOWEST = np.float32(2**-24)  # the smallest float16 above zero
CLIPS = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # share of a row's peak that 127 stands for
FLOOR = 1e-3  # share of the mean importance that every column has
FAINT = 1e-30
REACHES = np.linspace(7.0, 10.0, 13, dtype=np.float32)  # how many steps away from zero a block's peak stands; -8 is the last


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """One scale for each row: weight = scale * value. As Q8_0 every block of a row has the row's scale."""

    values: NDArray[np.int8]
    """(out, in), -127 to 127."""
    scales: NDArray[np.float32]
    """(out,), each exactly a float16."""

    def dequantised(self) -> NDArray[np.float32]:
        """The weights that are really used (out, in)."""
        return self.values * self.scales[:, None]


@dataclass(frozen=True, eq=False)
class Int4Blocks:
    """One scale for each 32 neighbours in a row: weight = scale * (value - 8), as Q4_0 and MatMulNBits have it."""

    values: NDArray[np.uint8]
    """(out, in), 0 to 15."""
    scales: NDArray[np.float32]
    """(out, in / 32), each exactly a float16; may be negative."""

    def dequantised(self) -> NDArray[np.float32]:
        """The weights that are really used (out, in)."""
        out, width = self.values.shape
        blocks = self.values.reshape(out, -1, BLOCK).astype(np.float32) - 8
        return np.asarray((blocks * self.scales[:, :, None]).reshape(out, width))


QuantisedTensor: TypeAlias = Int8Rows | Int4Blocks
Importance: TypeAlias = Callable[[str], NDArray[np.float32] | None]
"""Of a matrix by its name (in,), or None where nothing is known of it."""


def int8_rows(name: str, weights: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> Int8Rows:
    """Quantise (out, in) to 8 bits with one scale a row; raises `ConversionError` for weights that are not finite."""
    _check(name, weights)
    weighing = None if importance is None else weighing_of(importance)[None]
    values, scales = np.empty(weights.shape, np.int8), np.empty(len(weights), np.float32)
    for part in _slices(weights):
        rows = weights[part]
        peaks = np.abs(rows).max(1)
        scales[part] = _search(rows, [peaks * (clip / 127) for clip in CLIPS], -127, 127, weighing)
        values[part] = _nearest(rows, scales[part], -127, 127)
    return Int8Rows(values, scales)


def int4_blocks(name: str, weights: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> Int4Blocks:
    """Quantise (out, in) to 4 bits with one scale a block; raises `ConversionError`, also for widths that 32 does not divide."""
    _check(name, weights)
    out, width = weights.shape
    if width % BLOCK:
        raise ConversionError(f"{name} is {width} wide; 4 bits need a multiple of {BLOCK}. Convert to int8 instead.")
    blocks = weights.reshape(-1, BLOCK)
    weighing = None if importance is None else np.tile(weighing_of(importance).reshape(-1, BLOCK), (out, 1))
    values, scales = np.empty(blocks.shape, np.uint8), np.empty(len(blocks), np.float32)
    for part in _slices(blocks):
        rows = blocks[part]
        # the peak, with its sign, goes to the side that reaches one step further: -8
        peaks = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
        weighed = None if weighing is None else weighing[part]
        scales[part] = _search(rows, [-peaks / reach for reach in REACHES], -8, 7, weighed)
        values[part] = _nearest(rows, scales[part], -8, 7) + 8
    return Int4Blocks(values.reshape(out, width), scales.reshape(out, -1))


def _search(rows: NDArray[np.float32], starts: list[NDArray[np.float32]], low: int, high: int,
            weighing: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Each row's float16 scale of least squared error: every start rounds the weights, which then ask for their best scale."""
    best, least = np.zeros(len(rows), np.float32), np.full(len(rows), np.inf, np.float32)
    for start in starts:
        steps = _nearest(rows, start, low, high)
        weighed = steps if weighing is None else steps * weighing
        power = np.einsum("rk,rk->r", weighed, steps)
        scale = _float16(np.einsum("rk,rk->r", rows, weighed) / np.maximum(power, FAINT), start)
        steps *= scale[:, None]
        steps -= rows
        weighed = steps if weighing is None else steps * weighing
        error = np.einsum("rk,rk->r", weighed, steps)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def weighing_of(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importance of mean 1, never quite zero: what calibration did not see may still be read."""
    return np.asarray((importance / max(float(importance.mean()), FAINT) + FLOOR) / (1 + FLOOR), np.float32)


def _nearest(rows: NDArray[np.float32], scales: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    """The whole steps nearest to each weight."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) >= LOWEST / 256)
    steps = rows * inverse[:, None]
    np.rint(steps, out=steps)
    return np.clip(steps, low, high, out=steps)


def _float16(scales: NDArray[np.float32], sign: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to float16, but never to zero where there is something to scale."""
    rounded = np.asarray(scales.astype(np.float16), np.float32)
    vanished = (rounded == 0) & (sign != 0)
    rounded[vanished] = np.copysign(LOWEST, sign[vanished])
    return rounded


def _slices(rows: NDArray[np.float32]) -> Iterator[slice]:
    count = max(1, SLICE // rows.shape[1])
    for start in range(0, len(rows), count):
        yield slice(start, start + count)


def _check(name: str, weights: NDArray[np.float32]) -> None:
    if not np.isfinite(weights).all():
        raise ConversionError(f"{name} holds numbers that are not finite; the source is damaged.")
