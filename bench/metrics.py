"""How good a classifier is: pure functions of labels (True for unsafe), scores and counts.

A measure that its rows do not define, such as recall without any unsafe row, is None and never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeguard.errors import InputError

Interval = tuple[float, float]


@dataclass(frozen=True)
class Counts:
    """Rows by what they are and what they were judged; positive is unsafe."""

    tp: int
    fp: int
    fn: int
    tn: int

    @classmethod
    def of(cls, unsafe: ArrayLike, judged: ArrayLike) -> Counts:
        """From two arrays of truth values (rows,): unsafe by label, judged unsafe."""
        truth, said = np.asarray(unsafe, bool), np.asarray(judged, bool)
        _check_length(truth.shape, said.shape)
        return cls(int((truth & said).sum()), int((~truth & said).sum()), int((truth & ~said).sum()), int((~truth & ~said).sum()))

    @property
    def total(self) -> int:
        """All rows."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def precision(self) -> float | None:
        """Share of rows judged unsafe that are."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """Share of unsafe rows that were judged so."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; 0 when nothing unsafe was found, None when there was nothing to find."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn) if self.tp + self.fn else None

    @property
    def fpr(self) -> float | None:
        """Share of safe rows judged unsafe."""
        return ratio(self.fp, self.fp + self.tn)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, None of nothing."""
    return part / whole if whole else None


def auroc(unsafe: ArrayLike, scores: ArrayLike) -> float | None:
    """Share of pairs (an unsafe row, a safe row) that the scores put in the right order; a tie is half right."""
    truth, values = _truth_and_scores(unsafe, scores)
    positive, negative = values[truth], np.sort(values[~truth])
    below = np.searchsorted(negative, positive, "left")
    not_above = np.searchsorted(negative, positive, "right")
    return ratio(float((below + not_above).sum()) / 2, len(positive) * len(negative))


def auprc(unsafe: ArrayLike, scores: ArrayLike) -> float | None:
    """Average precision: precision at each distinct score, weighted by the recall gained there; no interpolation."""
    truth, values = _truth_and_scores(unsafe, scores)
    if not truth.any():
        return None
    order = np.argsort(-values, kind="stable")
    last_of_ties = np.append(np.diff(values[order]) != 0, True)
    found = np.cumsum(truth[order])[last_of_ties]
    precision = found / (np.flatnonzero(last_of_ties) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / truth.sum())


def ece(unsafe: ArrayLike, scores: ArrayLike, bins: int = 10) -> float | None:
    """Expected calibration error: mean distance of score and share of unsafe rows, over `bins` equal parts of 0 to 1."""
    truth, values = _truth_and_scores(unsafe, scores)
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=values - truth, minlength=bins)
    return ratio(float(np.abs(gaps).sum()), len(values))


def interval(counts: Counts, measure: Callable[[Counts], float | None], seed: int = 0, samples: int = 2000) -> Interval | None:
    """Bootstrap 95% interval (percentiles) of a measure of counts.

    Drawing rows anew with replacement draws the four counts from a multinomial distribution, so that is what is drawn.
    None when every draw gives the same, as for no false alarm at all: such counts do not say how far the truth may be.
    """
    if measure(counts) is None:
        return None
    cells = np.array([counts.tp, counts.fp, counts.fn, counts.tn])
    drawn = np.random.default_rng(seed).multinomial(counts.total, cells / counts.total, size=samples)
    values = [value for row in drawn.tolist() if (value := measure(Counts(*row))) is not None]
    low, high = np.quantile(values, (0.025, 0.975))
    return (float(low), float(high)) if min(values) < max(values) else None


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, by linear interpolation."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _truth_and_scores(unsafe: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, values = np.asarray(unsafe, bool), np.asarray(scores, np.float64)
    _check_length(truth.shape, values.shape)
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise InputError("A score is not a number from 0 to 1.")
    return truth, values


def _check_length(labels: tuple[int, ...], results: tuple[int, ...]) -> None:
    if len(labels) != 1 or labels != results:
        raise InputError(f"Labels {labels} and results {results} must be two rows of one length.")
