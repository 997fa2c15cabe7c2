"""How good a classifier is: pure functions of labels (True for unsafe), scores and counts.

A measure that its rows do not define, such as recall without any unsafe row, is None and never a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeguard.errors import InputError

Interval = tuple[float, float]
Weights = NDArray[np.float64]
"""How often each row was drawn, (rows,)."""


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

    @classmethod
    def of_sets(cls, pairs: Iterable[tuple[Set[str], Set[str]]]) -> Counts:
        """From pairs (members that are right, members that were said), all pairs' members counted together; `tn` is 0."""
        held = list(pairs)
        return cls(sum(len(right & said) for right, said in held), sum(len(said - right) for right, said in held),
                   sum(len(right - said) for right, said in held), 0)

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


@dataclass(frozen=True)
class Ranking:
    """Rows in falling order of their scores: the measures that need no threshold, of the rows or of rows drawn anew.

    `weights` (rows,) say how often each row was drawn, once each by default.
    """

    unsafe: NDArray[np.bool_]
    scores: NDArray[np.float64]
    ends: NDArray[np.intp]
    """Places of the last row of each distinct score; rows of one score are one step."""

    @classmethod
    def of(cls, unsafe: ArrayLike, scores: ArrayLike) -> Ranking:
        """From labels and scores (rows,) in any order; raises `InputError` for scores outside 0 to 1."""
        truth, values = _truth_and_scores(unsafe, scores)
        order = np.argsort(-values, kind="stable")
        truth, values = truth[order], values[order]
        return cls(truth, values, np.flatnonzero(np.append(np.diff(values) != 0, len(values) > 0)))

    def auroc(self, weights: Weights | None = None) -> float | None:
        """Share of pairs (an unsafe row, a safe row) that the scores put in the right order; a tie is half right."""
        found, taken = self._steps(weights)
        false = taken - found
        if not len(found) or not found[-1] * false[-1]:
            return None
        below = false[-1] - false + np.diff(false, prepend=0) / 2
        return float((np.diff(found, prepend=0) * below).sum() / (found[-1] * false[-1]))

    def auprc(self, weights: Weights | None = None) -> float | None:
        """Average precision: precision at each distinct score, weighted by the recall gained there; no interpolation."""
        found, taken = self._steps(weights)
        if not len(found) or not found[-1]:
            return None
        precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
        return float((np.diff(found, prepend=0) * precision).sum() / found[-1])

    def best_f1(self) -> tuple[float, float] | None:
        """The threshold with the highest F1 on these rows, between two scores, and that F1; None without an unsafe row."""
        found, taken = self._steps(None)
        if not len(found) or not found[-1]:
            return None
        f1 = 2 * found / (taken + found[-1])
        best = int(np.argmax(f1))
        upper = float(self.scores[self.ends[best]])
        lower = float(self.scores[self.ends[best + 1]]) if best + 1 < len(self.ends) else upper
        middle = (upper + lower) / 2
        return middle if lower < middle else upper, float(f1[best])

    def _steps(self, weights: Weights | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Unsafe rows, and all rows, from the highest score down to each distinct one."""
        drawn = np.ones(len(self.scores)) if weights is None else weights
        return np.cumsum(drawn * self.unsafe)[self.ends], np.cumsum(drawn)[self.ends]


def auroc(unsafe: ArrayLike, scores: ArrayLike) -> float | None:
    """`Ranking.auroc` of labels and scores (rows,)."""
    return Ranking.of(unsafe, scores).auroc()


def auprc(unsafe: ArrayLike, scores: ArrayLike) -> float | None:
    """`Ranking.auprc` of labels and scores (rows,)."""
    return Ranking.of(unsafe, scores).auprc()


@dataclass(frozen=True)
class Bin:
    """Rows whose scores lie in one part of 0 to 1."""

    low: float
    high: float
    rows: int
    score: float
    """Their mean score."""
    unsafe: float
    """Share of them that is unsafe; a calibrated score says the same."""


def reliability(unsafe: ArrayLike, scores: ArrayLike, bins: int = 10) -> list[Bin]:
    """The bins of a reliability diagram, `bins` equal parts of 0 to 1; those without rows are left out."""
    truth, values = _truth_and_scores(unsafe, scores)
    place = _bins(values, bins)
    rows, score, share = (np.bincount(place, weights, bins) for weights in (None, values, truth.astype(float)))
    return [Bin(index / bins, (index + 1) / bins, int(rows[index]), float(score[index] / rows[index]), float(share[index] / rows[index]))
            for index in np.flatnonzero(rows).tolist()]


def ece(unsafe: ArrayLike, scores: ArrayLike, bins: int = 10, weights: Weights | None = None) -> float | None:
    """Expected calibration error: mean distance of score and share of unsafe rows, over `bins` equal parts of 0 to 1."""
    truth, values = _truth_and_scores(unsafe, scores)
    drawn = np.ones(len(values)) if weights is None else weights
    distances = np.bincount(_bins(values, bins), drawn * (values - truth), bins)
    return ratio(float(np.abs(distances).sum()), float(drawn.sum()))


def _bins(scores: NDArray[np.float64], bins: int) -> NDArray[np.intp]:
    return np.minimum((scores * bins).astype(np.intp), bins - 1)


def intervals(measures: Mapping[str, Callable[[Weights], float | None]], rows: int, seed: int = 0,
              samples: int = 1000) -> dict[str, Interval | None]:
    """Bootstrap 95% intervals (percentiles) of measures, all from one pass of drawing as many rows anew with replacement."""
    generator = np.random.default_rng(seed)
    values: dict[str, list[float | None]] = {name: [] for name in measures}
    for _ in range(samples if rows else 0):
        weights = np.bincount(generator.integers(rows, size=rows), minlength=rows).astype(np.float64)
        for name, measure in measures.items():
            values[name].append(measure(weights))
    return {name: percentiles(each) for name, each in values.items()}


def interval(counts: Counts, measure: Callable[[Counts], float | None], seed: int = 0, samples: int = 2000) -> Interval | None:
    """Bootstrap 95% interval (percentiles) of a measure of counts.

    Drawing rows anew with replacement draws the four counts from a multinomial distribution, so that is what is drawn.
    None when every draw gives the same, as for no false alarm at all: such counts do not say how far the truth may be.
    """
    if measure(counts) is None:
        return None
    return _drawn(np.eye(4, dtype=np.int64), np.array(astuple(counts)), measure, seed, samples)


def sets_interval(pairs: Iterable[tuple[Set[str], Set[str]]], seed: int = 0, samples: int = 2000) -> Interval | None:
    """Bootstrap 95% interval of the F1 of `Counts.of_sets`, over pairs drawn anew as the rows of `interval` are."""
    kinds = Counter(astuple(Counts.of_sets([pair])) for pair in pairs)
    return _drawn(np.array([*kinds]), np.array([*kinds.values()]), lambda counts: counts.f1, seed, samples) if kinds else None


def _drawn(kinds: NDArray[np.int64], rows: NDArray[np.int64], measure: Callable[[Counts], float | None], seed: int,
           samples: int) -> Interval | None:
    """The interval of rows of few kinds: what each kind adds to the counts, (kinds, 4), and how many rows it has, (kinds,)."""
    drawn = np.random.default_rng(seed).multinomial(rows.sum(), rows / rows.sum(), size=samples) @ kinds
    different, which = np.unique(drawn, axis=0, return_inverse=True)
    values = [measure(Counts(*row)) for row in different.tolist()]
    return percentiles([values[place] for place in which.ravel()])


def share_interval(part: int, whole: int, seed: int = 0) -> Interval | None:
    """Bootstrap 95% interval of `part / whole`."""
    return interval(Counts(part, 0, whole - part, 0), lambda drawn: drawn.recall, seed) if whole else None


def percentiles(values: Sequence[float | None]) -> Interval | None:
    """From the 2.5th to the 97.5th of those that are defined; None where all are alike."""
    defined = [value for value in values if value is not None]
    if not defined or min(defined) == max(defined):
        return None
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)


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
