from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.convert.quantize import BLOCK, Int4Blocks, Int8Rows, int4_blocks, int8_rows
from edgeguard.errors import ConversionError

Matrix = NDArray[np.float32]


@pytest.fixture
def weights() -> Matrix:
    """Rows of very different size, one of zeros, one with an outlier."""
    made = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    made *= np.geomspace(1e-6, 10, 70, dtype=np.float32)[:, None]
    made[3], made[60, 7] = 0, 40
    return made


def error(found: Matrix, wanted: Matrix) -> float:
    return float(np.sum((found.astype(np.float64) - wanted) ** 2))


def by_maximum(weights: Matrix, steps: int) -> Matrix:
    """Round to nearest with the row's maximum as the last step, as plain quantisers do."""
    scale = np.abs(weights).max(-1, keepdims=True) / steps
    scale[scale == 0] = 1
    return np.rint(weights / scale) * scale


def test_int8_is_better_than_the_maximum_in_every_row(weights: Matrix) -> None:
    quantised = int8_rows("w", weights).dequantised()
    plain = by_maximum(weights, 127)
    # rows whose scale is a subnormal float16 cannot have the scale that they need
    ordinary = np.abs(weights).max(1) / 127 > 2**-14
    assert ordinary.sum() > 20
    for row in np.flatnonzero(ordinary):
        assert error(quantised[row], weights[row]) <= error(plain[row], weights[row]) * 1.02
    assert error(quantised[ordinary], weights[ordinary]) < error(plain[ordinary], weights[ordinary])


def test_int4_is_better_than_q4_0_by_maximum(weights: Matrix) -> None:
    blocks = weights.reshape(-1, BLOCK)
    peaks = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)][:, None] / -8
    peaks[peaks == 0] = 1
    plain = (np.clip(np.rint(blocks / peaks), -8, 7) * peaks).reshape(weights.shape)
    assert error(int4_blocks("w", weights).dequantised(), weights) < 0.95 * error(plain, weights)


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
def test_scales_are_float16_numbers(quantise: type, weights: Matrix) -> None:
    scales = quantise("w", weights).scales
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    assert np.isfinite(scales).all()


def test_values_stay_in_their_range_and_zeros_stay_zero(weights: Matrix) -> None:
    rows, blocks = int8_rows("w", weights), int4_blocks("w", weights)
    assert isinstance(rows, Int8Rows) and rows.values.dtype == np.int8 and rows.values.min() >= -127
    assert isinstance(blocks, Int4Blocks) and blocks.values.dtype == np.uint8 and blocks.values.max() <= 15
    assert blocks.scales.shape == (70, 3) and rows.scales.shape == (70,)
    assert not rows.dequantised()[3].any() and not blocks.dequantised()[3].any()


def test_weights_that_are_exact_steps_come_back_exactly() -> None:
    steps = np.random.default_rng(1).integers(-127, 128, (9, 64)).astype(np.float32)
    steps[:, 0] = 127
    assert np.array_equal(int8_rows("w", steps / 64).dequantised(), steps / 64)
    steps = np.random.default_rng(2).integers(-8, 8, (9, 64)).astype(np.float32)
    steps[:, ::BLOCK] = -8
    assert np.array_equal(int4_blocks("w", steps / 64).dequantised(), steps / 64)


def test_large_and_small_tensors_are_quantised_alike() -> None:
    """The slices in which a tensor is looked at leave no trace."""
    weights = np.random.default_rng(3).standard_normal((3000, 64)).astype(np.float32)
    whole, part = int8_rows("w", weights), int8_rows("w", weights[2000:2100])
    assert np.array_equal(whole.values[2000:2100], part.values)
    assert np.array_equal(int4_blocks("w", weights).values[2000:2100], int4_blocks("w", weights[2000:2100]).values)


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(quantise: type, number: float, weights: Matrix) -> None:
    weights[4, 4] = number
    with pytest.raises(ConversionError, match=r"layer\.weight"):
        quantise("layer.weight", weights)


def test_int4_needs_whole_blocks() -> None:
    with pytest.raises(ConversionError, match="40 wide"):
        int4_blocks("w", np.ones((2, 40), np.float32))


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
def test_importance_moves_the_error_to_columns_that_matter_less(quantise: Callable[..., Any]) -> None:
    weights = np.random.default_rng(0).standard_t(3, (64, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[::4] = 100
    plain, weighed = (np.square(quantise("w", weights, given).dequantised() - weights).mean(0) for given in (None, importance))
    assert weighed[::4].mean() < 0.95 * plain[::4].mean()
    assert (weighed * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
def test_equal_importance_is_none(quantise: Callable[..., Any]) -> None:
    weights = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
    plain, weighed = (quantise("w", weights, given) for given in (None, np.full(64, 7.0, np.float32)))
    np.testing.assert_array_equal(plain.values, weighed.values)
    np.testing.assert_array_equal(plain.scales, weighed.scales)


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
def test_columns_that_were_never_used_still_count(quantise: Callable[..., Any]) -> None:
    weights = np.random.default_rng(2).normal(size=(16, 64)).astype(np.float32)
    made = quantise("w", weights, np.zeros(64, np.float32)).dequantised()
    assert np.abs(made - weights).max() < 0.5
