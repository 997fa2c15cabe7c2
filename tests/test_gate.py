"""The gate passes good conversions, fails bad ones, and says why; it never judges by what is mere chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import write_small_model

from edgeguard.convert import gate, guard_graph, probe
from edgeguard.convert.pipeline import convert
from edgeguard.errors import ConversionError

SAFE, UNSAFE = [0, 1], [2, 3]


def source(margins: np.ndarray) -> np.ndarray:
    """Logits (prompts, 20) whose two main answers are `margins` apart."""
    logits = np.random.default_rng(0).normal(0, 1, (len(margins), 20)).astype(np.float32)
    logits[:, 0], logits[:, 2] = 10, 10 + margins
    return logits


CLEAR = source(np.linspace(-6, 6, 24))


def test_equal_logits_pass_everywhere() -> None:
    for precision in gate.LIMITS:
        numbers = gate.measure(CLEAR, CLEAR, SAFE, UNSAFE, precision)
        gate.judge(numbers, precision)
        assert (numbers["difference"], numbers["noise"], numbers["drift"], numbers["agreement"]) == (0, 0, 0, 1)


def test_fp32_is_held_to_its_logits() -> None:
    numbers = gate.measure(CLEAR, CLEAR + np.float32(0.011), SAFE, UNSAFE, "fp32")
    with pytest.raises(ConversionError, match=r"difference 0\.011 is over 0\.01"):
        gate.judge(numbers, "fp32")


def test_a_shift_of_all_logits_is_no_noise() -> None:
    numbers = gate.measure(CLEAR, CLEAR + 3, SAFE, UNSAFE, "int8")
    assert numbers["noise"] < 1e-6
    gate.judge(numbers, "int8")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_fail(bad: float) -> None:
    broken = CLEAR.copy()
    broken[3, 5] = bad
    with np.errstate(invalid="ignore"):
        numbers = gate.measure(CLEAR, broken, SAFE, UNSAFE, "int4")
    with pytest.raises(ConversionError):
        gate.judge(numbers, "int4")


def test_flipped_verdicts_fail_even_if_all_else_is_near() -> None:
    flipped = CLEAR.copy()
    flipped[:5, 2] += 13  # a blind or a noisy guard differs in few logits
    numbers = gate.measure(CLEAR, flipped, SAFE, UNSAFE, "int4")
    assert numbers["agreement"] < 0.9
    with pytest.raises(ConversionError, match="drift"):
        gate.judge(numbers, "int4")


def test_agreement_alone_can_fail() -> None:
    with pytest.raises(ConversionError, match=r"agreement 0\.7 on 20 decided texts is under 0\.75"):
        gate.judge({"difference": 1.0, "noise": 0.1, "drift": 0.05, "agreement": 0.7, "decided": 20}, "int4")


def test_undecided_texts_are_not_counted() -> None:
    """A random model's scores lie near the threshold; flips there are no sign of a bad conversion."""
    near = source(np.full(24, 0.05))
    moved = near.copy()
    moved[:, 2] -= 0.1
    numbers = gate.measure(near, moved, SAFE, UNSAFE, "int8")
    assert (numbers["decided"], numbers["agreement"]) == (0, None)
    gate.judge(numbers, "int8")


def test_head_rows_hold_what_is_needed_and_the_likeliest() -> None:
    logits = np.zeros((2, 1000), np.float32)
    logits[0, 700:710], logits[1, 900:910] = 5, 6
    rows = probe.head_rows([3, 5, 900], logits, sentinels=19)
    assert rows == (3, 5, *range(700, 710), *range(900, 910))


@pytest.mark.parametrize(("precision", "damage"), [("fp32", 0.05), ("int8", 1.0), ("int4", 1.0)])
def test_damaged_weights_fail_and_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               precision: str, damage: float) -> None:
    """A random model, too: one matrix of each layer loses a part of itself on the way into the artifact."""
    source, build = write_small_model(tmp_path / "source"), guard_graph.build
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "source" / "home"))

    class Damaged:
        def __init__(self, weights: Any) -> None:
            self.weights, self.shape, self.names, self.raw = weights, weights.shape, weights.names, weights.raw

        def tensor(self, name: str) -> np.ndarray:
            tensor = self.weights.tensor(name)
            return np.roll(tensor, 1, axis=0) * damage + tensor * (1 - damage) if name.endswith("down_proj.weight") else tensor

        def rows(self, name: str, index: Any) -> np.ndarray:
            return self.tensor(name)[index]

    monkeypatch.setattr(guard_graph, "build", lambda weights, *rest, **options: build(Damaged(weights), *rest, **options))
    with pytest.raises(ConversionError, match=f"{precision} artifact failed the gate"):
        convert(source, tmp_path / "out", target="onnx", precision=precision, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
