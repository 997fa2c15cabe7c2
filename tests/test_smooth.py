"""Smoothing changes what is rounded, not what is computed."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.backends.base import Node, Run
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.convert.prefixes import Entry, Walked, walk
from edgeguard.convert.quantize import int8_rows
from edgeguard.convert.smooth import SmoothedWeights, ranges
from edgeguard.weights import SafetensorsWeights, Weights, expected
from tests.small_model import write_small_model

PREFIX = (5, 6, 7, 8)
ENTRIES = [Entry("user", (9, 10, 11, 12)), Entry("user", (13, 14, 15)), Entry("user", (16, 9, 10, 17, 18))]


class Loud(SafetensorsWeights):
    """A model with outliers: two channels of the norms, of v and of up are thirty times the others."""

    def tensor(self, name: str) -> np.ndarray:
        values = super().tensor(name)
        if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight")):
            values[[3, 40]] *= 30
        return values

    def rows(self, name: str, index: slice | np.ndarray) -> np.ndarray:
        return self.tensor(name)[index]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Loud(write_small_model(tmp_path_factory.mktemp("smooth") / "model"))


def walked(weights: Weights) -> Walked:
    return walk(weights, {"user": PREFIX}, ENTRIES, observer=ranges)


@pytest.fixture(scope="module")
def smoothed(loud: Weights) -> SmoothedWeights:
    return SmoothedWeights(loud, walked(loud).observed)


def logits(weights: Weights) -> np.ndarray:
    backend = ReferenceBackend(weights)
    root = backend.open(PREFIX, Run())
    return np.stack([node.logits for node in backend.extend([(root, entry.ids) for entry in ENTRIES], Run())])


def test_the_function_stays_the_same(loud: Weights, smoothed: SmoothedWeights) -> None:
    wanted = logits(loud)
    assert np.abs(logits(smoothed) - wanted).max() < 1e-4 * np.abs(wanted).max()
    changed = [name for name in expected(loud.shape) if not np.array_equal(loud.tensor(name), smoothed.tensor(name))]
    assert set(expected(loud.shape)) - set(changed) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_rows_are_those_of_the_tensor(smoothed: SmoothedWeights) -> None:
    for name, size in expected(smoothed.shape).items():
        if len(size) == 2:
            whole, some = smoothed.tensor(name), np.array([5, 0, 3])
            np.testing.assert_array_equal(smoothed.rows(name, slice(2, 9)), whole[2:9])
            np.testing.assert_array_equal(smoothed.rows(name, some), whole[some])


def test_outliers_become_smaller(loud: Weights, smoothed: SmoothedWeights) -> None:
    before, after = walked(loud).observed, walked(smoothed).observed
    for name, peaks in before.items():
        def spread(values: np.ndarray) -> float:
            return float(values.max() / np.median(values))

        assert spread(after[name][0]) < spread(peaks[0]) / 2, name


def test_a_kept_prefix_goes_on_in_the_smoothed_model(loud: Weights, smoothed: SmoothedWeights) -> None:
    """Its keys are the same, its values have the factors of the layer that reads them."""
    keys, values = walked(loud).keys_values["user"]
    own_keys, own_values = walked(smoothed).keys_values["user"]
    np.testing.assert_allclose(keys, own_keys, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(smoothed.values(values), own_values, rtol=1e-3, atol=1e-4)
    assert np.abs(values - own_values).max() > 0.1  # or there would be nothing to be done


def test_importance_is_the_mean_square_of_what_a_column_reads(smoothed: SmoothedWeights) -> None:
    seen = walked(smoothed).observed
    for layer in range(2):
        for name, place in (("self_attn.v_proj", "self_attn.q_proj"), ("self_attn.o_proj",) * 2, ("mlp.down_proj",) * 2):
            wanted = seen[f"model.layers.{layer}.{place}"][1]
            np.testing.assert_allclose(smoothed.importance(f"model.layers.{layer}.{name}.weight"), wanted, rtol=1e-3, atol=1e-6)
    assert smoothed.importance("lm_head.weight") is None


def test_eight_bits_lose_less(loud: Weights, smoothed: SmoothedWeights) -> None:
    """Simulated: weights by rows, activations by tokens."""
    wanted = logits(loud)
    errors = [np.abs(Rounded(weights).logits() - wanted).mean() for weights in (loud, smoothed)]
    assert errors[1] < errors[0] / 2


class Rounded(ReferenceBackend):
    """Every linear layer with 8-bit weights and activations, behind a prefix in full precision."""

    rounding = False

    def logits(self) -> np.ndarray:
        root: Node = self.open(PREFIX, Run())
        self.rounding = True
        return np.stack([node.logits for node in self.extend([(root, entry.ids) for entry in ENTRIES], Run())])

    def _linear(self, value: np.ndarray, name: str) -> np.ndarray:
        if not self.rounding:
            return super()._linear(value, name)
        steps = np.abs(value).max(-1, keepdims=True) / 127
        weights = int8_rows(name, self.weights.tensor(f"{name}.weight")).dequantised()
        return np.rint(value / steps) * steps @ weights.T
