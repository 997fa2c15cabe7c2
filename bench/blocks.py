"""Weights that are small whole numbers times a power of two, as blocks of every format, all of them exact.

A weight is `scale * value` with a value from -7 to 7: what 4 bits can hold. So every format holds the very same weights.
Layouts of the K-quants: block_q4_K and block_q6_K in ggml's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeguard.convert.quantize import BLOCK, Int4Blocks, Int8Rows

SUPER = 256
"""Weights of a K-quant's block."""
Values = NDArray[np.int8]
Bytes = NDArray[np.uint8]


def int8_rows(values: Values, scale: float) -> Int8Rows:
    """One scale a row; the numbers are spread over the 8 bits, as those of trained weights are. Takes `values` over."""
    return Int8Rows(np.multiply(values, np.int8(16), out=values), np.full(len(values), scale / 16, np.float32))


def int4_blocks(values: Values, scale: float) -> Int4Blocks:
    """One scale for 32 neighbours. Takes `values` over."""
    scales = np.full((len(values), values.shape[1] // BLOCK), scale, np.float32)
    return Int4Blocks(np.add(values, np.int8(8), out=values).view(np.uint8), scales)


def q8_0(values: Values, scale: float) -> Bytes:
    """(rows, in) to the bytes of Q8_0 blocks: a float16 scale, 32 numbers."""
    numbers = (values * np.int8(16)).view(np.uint8).reshape(len(values), -1, BLOCK)
    return _joined(_half(scale / 16, numbers), numbers)


def q4_0(values: Values, scale: float) -> Bytes:
    """(rows, in) to the bytes of Q4_0 blocks: a float16 scale, 16 bytes whose low halves come first."""
    numbers = (values + np.int8(8)).view(np.uint8).reshape(len(values), -1, BLOCK)
    return _joined(_half(scale, numbers), numbers[..., :16] | numbers[..., 16:] << 4)


def q4_k(values: Values, scale: float) -> Bytes:
    """(rows, in) to the bytes of Q4_K blocks: weight = d * 4 * number - dmin * 4, each 32 weights with the same 6-bit factor 4."""
    numbers = (values + np.int8(8)).view(np.uint8).reshape(len(values), -1, SUPER // 64, 2, BLOCK)
    packed = (numbers[..., 0, :] | numbers[..., 1, :] << 4).reshape(*numbers.shape[:2], -1)
    factors = np.array([4] * 8 + [0x44] * 4, np.uint8)
    return _joined(_half(scale / 4, packed), _half(2 * scale, packed), np.broadcast_to(factors, (*packed.shape[:2], 12)), packed)


def q6_k(values: Values, scale: float) -> Bytes:
    """(rows, in) to the bytes of Q6_K blocks: weight = d * 4 * (number - 32), 4 low bits and 2 high bits apart."""
    numbers = (values * np.int8(4) + np.int8(32)).view(np.uint8).reshape(len(values), -1, 2, 4, BLOCK)
    low, high = numbers & 15, numbers >> 4
    lows = np.stack([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -2)
    highs = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    lows, highs = (each.reshape(*numbers.shape[:2], -1) for each in (lows, highs))
    return _joined(lows, highs, np.full((*lows.shape[:2], 16), 4, np.uint8), _half(scale / 16, lows))


def bfloat16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to the nearest, of two equally near ones to the even."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


GGUF: dict[str, Callable[[Values, float], Bytes]] = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}


def _half(scale: float, like: Bytes) -> Bytes:
    """The float16 in front of each block."""
    return np.broadcast_to(np.array([scale], "<f2").view(np.uint8), (*like.shape[:2], 2))


def _joined(*parts: Bytes) -> Bytes:
    """Blocks from their parts: (rows, bytes of a row)."""
    return np.concatenate(parts, -1).reshape(len(parts[0]), -1)
