"""The maths of calibration, and that a verdict's score, threshold and word never contradict each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard import Guard, calibration
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.calibration import UNCALIBRATED, Calibration, Wish, fit, held_out, threshold
from edgeguard.errors import InferenceError, InputError

SHARES = st.floats(0, 1)
CALIBRATIONS = st.builds(Calibration, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), SHARES)
DATA = {"slope": 0.5, "offset": -1.0, "threshold": 0.25, "data_sha256": "ab" * 32, "rows": 60}


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


def sampled(rows: int, slope: float, offset: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores, and labels that are unsafe as often as the calibrated score says."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, rows)
    return sigmoid(logits), generator.random(rows) < sigmoid(slope * logits + offset)


class TestScore:
    @given(SHARES)
    def test_without_a_calibration_nothing_changes(self, raw: float) -> None:
        assert UNCALIBRATED(raw) == raw

    @given(CALIBRATIONS, SHARES, SHARES)
    def test_the_order_of_scores_never_changes(self, calibrated: Calibration, one: float, other: float) -> None:
        assert 0 <= calibrated(min(one, other)) <= calibrated(max(one, other)) <= 1

    def test_what_it_computes(self) -> None:
        calibrated = Calibration(2.0, -1.0)
        assert calibrated(0.5) == pytest.approx(sigmoid(-1.0))
        assert calibrated(0.9) == pytest.approx(sigmoid(2 * math.log(9) - 1))
        assert (calibrated(0.0), calibrated(1.0)) == (0.0, 1.0)
        assert Calibration(1e3, 1e3)(1e-300) == 0.0, "no overflow"
        assert calibrated.scores([0.2, 0.7]).tolist() == [calibrated(0.2), calibrated(0.7)]

    @pytest.mark.parametrize("raw", [float("nan"), -1e-9, 1.0000001, float("inf")])
    def test_what_is_no_score_is_no_verdict(self, raw: float) -> None:
        for calibrated in (UNCALIBRATED, Calibration(2.0)):
            with pytest.raises(InferenceError):
                calibrated(raw)


class TestValues:
    @pytest.mark.parametrize(("name", "values"), [
        ("slope", [0, -1.0, float("nan"), float("inf"), True, "1", None, 10**400, 1e-9, 1e9]),
        ("offset", [float("nan"), float("-inf"), False, "0", [], 1e9, -(10**400)]),
        ("threshold", [-1e-9, 1.1, float("nan"), True, None]),
    ])
    def test_numbers_that_make_no_sense(self, name: str, values: list[Any]) -> None:
        for value in values:
            with pytest.raises(InputError, match=f"^{name} is"):
                Calibration.from_dict({**DATA, name: value})

    @pytest.mark.parametrize("data", [
        None, [], "x", {}, {**DATA, "more": 1}, {name: DATA[name] for name in DATA if name != "rows"},
        *({**DATA, "data_sha256": value} for value in ("", "AB" * 32, "ab" * 31, 5, None)),
        *({**DATA, "rows": value} for value in (0, -1, 1.5, True, "60", None, 10**400)),
    ])
    def test_plain_values_that_are_wrong(self, data: Any) -> None:
        with pytest.raises(InputError):
            Calibration.from_dict(data)

    def test_whole_numbers_will_do(self) -> None:
        assert Calibration.from_dict({**DATA, "slope": 2, "threshold": 1}) == Calibration(2.0, -1.0, 1.0, "ab" * 32, 60)


class TestFit:
    @pytest.mark.parametrize(("slope", "offset"), [(0.4, -1.0), (1.0, 0.0), (2.0, 3.0)])
    def test_it_finds_what_the_labels_were_drawn_with(self, slope: float, offset: float) -> None:
        fitted = fit(*sampled(6000, slope, offset))
        assert (fitted.slope, fitted.offset) == (pytest.approx(slope, abs=0.1 * slope), pytest.approx(offset, abs=0.2))
        assert fitted.threshold == 0.5

    def test_no_neighbour_is_likelier(self) -> None:
        raw, unsafe = sampled(80, 0.6, -0.5)

        def loss(slope: float, offset: float) -> float:
            likely = sigmoid(slope * np.log(raw / (1 - raw)) + offset)
            told = -np.log(np.where(unsafe, likely, 1 - likely)).sum()
            return float(told + (slope - 1) ** 2 / (2 * 1.0**2) + offset**2 / (2 * 2.0**2))

        fitted = fit(raw, unsafe)
        around = [loss(fitted.slope + a, fitted.offset + b) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01)]
        assert min(around) == around[4] == pytest.approx(loss(fitted.slope, fitted.offset))

    @pytest.mark.parametrize("apart", [0.4, 4.0, 36.0, 50.0])
    def test_rows_without_an_error_do_not_send_the_slope_to_infinity(self, apart: float) -> None:
        unsafe = np.arange(200) % 2 == 0
        fitted = fit(sigmoid(np.where(unsafe, apart, -apart)), unsafe)
        assert 0.9 < fitted.slope < 10
        assert abs(fitted.offset) < 0.01

    def test_few_rows_stay_near_what_the_model_said(self) -> None:
        fitted = fit([0.9, 0.2, 0.7], [True, False, False])
        assert 0.5 < fitted.slope < 1.3 and abs(fitted.offset) < 1.5

    def test_scores_that_are_the_wrong_way_round_are_an_error(self) -> None:
        raw, unsafe = sampled(200, 1.0, 0.0)
        with pytest.raises(InputError, match="labels"):
            fit(raw, ~unsafe)


class TestThreshold:
    @pytest.mark.parametrize(("rate", "value"), [("fpr", 0.05), ("fpr", 0.02), ("recall", 0.9), ("recall", 0.95)])
    def test_a_further_row_lies_on_the_wrong_side_as_seldom_as_wished(self, rate: Any, value: float) -> None:
        wish, generator = Wish(rate, value), np.random.default_rng(1)
        unsafe = np.arange(198) % 2 == 0
        rates = []
        for _ in range(400):
            at = threshold(generator.random(198), unsafe, wish)  # of one more row that is drawn alike, P(score < at) is at
            rates.append(1 - at)
        mean = float(np.mean(rates))
        assert value - 0.012 < mean <= value if rate == "fpr" else value <= mean < value + 0.012

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.3, 0.30000000000000004, 0.9, 1.0]) | SHARES), min_size=8),
           st.sampled_from(["fpr", "recall"]), st.floats(0.01, 0.99))
    def test_the_rows_themselves_hold_the_wish(self, rows: list[tuple[bool, float]], rate: Any, value: float) -> None:
        unsafe, scores = (np.array(column) for column in zip(*rows, strict=True))
        wish = Wish(rate, value)
        try:
            at = threshold(scores, unsafe, wish)
        except InputError:
            own = scores[wish.of(unsafe)]
            assert 1 / (len(own) + 1) > wish.share - 1e-9 or (rate == "fpr" and (own == 1).mean() > value * 0.5)
            return
        own = wish.of(unsafe)
        wrong = ((scores >= at) == (rate == "fpr"))[own].sum()
        assert 0 <= at <= 1
        assert wrong <= wish.share * (own.sum() + 1) - 1 + 1e-6

    def test_it_is_no_stricter_than_needed(self) -> None:
        scores, unsafe = np.linspace(0.01, 0.99, 99), np.zeros(99, bool)
        assert threshold(scores, unsafe, Wish("fpr", 0.05)) == pytest.approx((0.95 + 0.96) / 2)
        assert threshold(scores, ~unsafe, Wish("recall", 0.9)) == pytest.approx((0.09 + 0.10) / 2)
        assert threshold(np.linspace(0.1, 0.9, 9), np.ones(9, bool), Wish("recall", 0.9)) == pytest.approx(0.05)

    def test_neighbouring_scores_can_be_told_apart(self) -> None:
        low, high = 0.3, math.nextafter(0.3, 1)
        scores, unsafe = np.array([low] * 9 + [high] * 9), np.array([False] * 9 + [True] * 9)
        assert threshold(scores, unsafe, Wish("fpr", 0.1)) == threshold(scores, unsafe, Wish("recall", 0.9)) == high

    def test_what_no_threshold_can_do(self) -> None:
        with pytest.raises(InputError, match="score of 1"):
            threshold(np.ones(99), np.zeros(99, bool), Wish("fpr", 0.02))
        with pytest.raises(InputError, match="too few"):
            threshold(np.linspace(0, 1, 40), np.zeros(40, bool), Wish("fpr", 0.02))

    @pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan"), 2.0])
    def test_wishes_that_make_no_sense(self, value: float) -> None:
        with pytest.raises(InputError, match="fpr"):
            Wish("fpr", value)


class TestRows:
    @pytest.mark.parametrize(("safe", "unsafe", "wish", "says"), [
        (30, 19, None, "49 rows, 19 of them unsafe"), (41, 9, None, "10 of each"), (9, 60, None, "10 of each"), (0, 0, None, "0 rows"),
        (62, 40, Wish("fpr", 0.02), "at least 63 safe rows; there are 62"), (60, 12, Wish("recall", 0.9), "at least 13 unsafe rows"),
    ])
    def test_too_few(self, safe: int, unsafe: int, wish: Wish | None, says: str) -> None:
        with pytest.raises(InputError, match=says):
            calibration.check_rows([False] * safe + [True] * unsafe, wish)

    @pytest.mark.parametrize(("safe", "unsafe", "wish"), [
        (40, 10, None), (10, 40, None), (63, 10, Wish("fpr", 0.02)), (40, 13, Wish("recall", 0.9)), (40, 25, Wish("recall", 0.95)),
    ])
    def test_just_enough_is_enough_for_every_fold(self, safe: int, unsafe: int, wish: Wish | None) -> None:
        truth = np.array([False] * safe + [True] * unsafe)
        calibration.check_rows(truth, wish)
        raw = sigmoid(np.random.default_rng(0).normal(np.where(truth, 2.0, -2.0), 1.5))
        scores, judged = held_out(raw, truth, wish)
        assert scores.shape == judged.shape == truth.shape

    def test_no_row_takes_part_in_its_own_measurement(self) -> None:
        raw, unsafe = sampled(120, 0.5, 0.0)
        moved, place = raw.copy(), int(np.flatnonzero(unsafe)[3])
        moved[place] = 0.001
        (scores, _), (again, judged) = (held_out(each, unsafe, Wish("recall", 0.8)) for each in (raw, moved))
        assert not judged[place]
        unmoved = np.flatnonzero(scores == again)
        assert 120 / 5 - 3 < len(unmoved) < 120 / 5 + 2, "the others of its fold, whose fit it has no part in, and nobody else"


SCRIPTED = Guard.scripted(lambda prompt: "safe")


def guard_saying(logit: float, calibrated: Calibration) -> Guard:
    """A guard whose raw score is sigmoid(logit), whatever it is asked."""
    answers, head = SCRIPTED._answers, SCRIPTED.backend_info.head_ids.tolist()
    row = np.full(len(head), -60.0)
    row[head.index(answers.safe[0][0])], row[head.index(answers.unsafe[0][0])] = -logit / 2, logit / 2
    return Guard(ScriptedBackend(lambda ids: row, head), SCRIPTED._tokenizer, SCRIPTED.profile, SCRIPTED.identity, calibration=calibrated)


@settings(max_examples=60, deadline=None)
@given(st.floats(-50, 50), CALIBRATIONS, st.none() | SHARES)
def test_a_verdict_never_contradicts_itself(logit: float, calibrated: Calibration, asked: float | None) -> None:
    guard = guard_saying(logit, calibrated)
    verdict = guard.check("hello", threshold=asked)
    assert verdict.raw_score == pytest.approx(sigmoid(logit), abs=1e-6)
    assert verdict.score == calibrated(verdict.raw_score)
    assert verdict.threshold == (calibrated.threshold if asked is None else asked)
    assert (verdict.verdict == "unsafe") == (verdict.score >= verdict.threshold) == bool(verdict.categories)
    assert guard.check("hello", threshold=verdict.score).verdict == "unsafe", "from the threshold on"
    if verdict.score < 1:
        assert guard.check("hello", threshold=math.nextafter(verdict.score, 1)).verdict == "safe"
