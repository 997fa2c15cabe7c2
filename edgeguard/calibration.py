"""How a model's scores become shares that come true: two numbers and a threshold, fitted on labelled rows. Knows no model and no disk.

Platt scaling on the logit of the model's own softmax,

    score = sigmoid(slope * logit(raw) + offset)

with a slope above 0, so that no two scores change their order; 1 / slope is the temperature of temperature scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeguard.errors import InferenceError, InputError

Rate = Literal["fpr", "recall"]
Whose = Literal["user", "artifact", "none"]
"""The owner of a calibration."""
Floats = NDArray[np.float64]

RANGES = {"slope": (1e-3, 1e3), "offset": (-1e3, 1e3), "threshold": (0.0, 1.0)}
MOST_ROWS = 1 << 53
SHA256 = re.compile(r"[0-9a-f]{64}")

FARTHEST = 37.0
"""A logit from which on a raw score is 0 or 1 in 64 bits."""
IDENTITY = np.array([1.0, 0.0])
SPREAD = np.array([1.0, 2.0])
"""Standard deviations of the normal prior of slope and offset around 1 and 0: a hundred rows outweigh it, and rows that a
threshold separates without an error do not send the slope to infinity."""
STEPS, CLOSE = 100, 1e-6

FOLDS = 5
LEAST_ROWS, LEAST_OF_A_LABEL = 50, 10


@dataclass(frozen=True)
class Calibration:
    """What is done to a raw score, and the score from which on a text is unsafe; by default nothing, and 0.5."""

    slope: float = 1.0
    offset: float = 0.0
    threshold: float = 0.5
    """Llama Guard 2's model card decides at 0.5."""
    data_sha256: str = ""
    """Of the file of rows that it was fitted on."""
    rows: int = 0
    """How many these were."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is in no range
                raise InputError(f"{name} is {repr(value)[:40]}; a number from {low:g} to {high:g} is needed.")
            object.__setattr__(self, name, float(value))

    @classmethod
    def from_dict(cls, data: object) -> Calibration:
        """From the plain values of one that was fitted; raises `InputError` naming what is wrong."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(data, Mapping) or set(data) != names:
            raise InputError(f"a mapping of {', '.join(sorted(names))} is needed.")
        digest, rows = data["data_sha256"], data["rows"]
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise InputError(f"data_sha256 is {repr(digest)[:40]}; a SHA-256 is needed.")
        if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
            raise InputError(f"rows is {repr(rows)[:40]}; a whole number from 1 on is needed.")
        return cls(**data)

    def __call__(self, raw: float) -> float:
        """The score of a raw score, both from 0 to 1; raises `InferenceError` for what is no such number."""
        if not 0 <= raw <= 1:
            raise InferenceError("The model's score is not a number from 0 to 1; the text was not judged.")
        if (self.slope, self.offset) == (1, 0):
            return raw  # to the last bit
        with np.errstate(over="ignore"):
            return float(1 / (1 + np.exp(-(self.slope * _logit(raw) + self.offset))))

    def scores(self, raw: ArrayLike) -> Floats:
        """Of many, (rows,), each to the bit as alone."""
        return np.array([self(each) for each in np.asarray(raw, np.float64).tolist()])


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Wish:
    """A rate that the threshold shall hold on rows to come: an FPR of at most, or a recall of at least `value`."""

    rate: Rate
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < 1:
            raise InputError(f"A wished {self.rate} of {self.value!r} makes no sense; a number between 0 and 1 is needed.")

    @property
    def share(self) -> float:
        """Of the rows that the rate is about, those that may lie on the wrong side."""
        return self.value if self.rate == "fpr" else 1 - self.value

    def of(self, unsafe: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which rows it is about: the safe ones for an FPR, the unsafe ones for a recall."""
        return ~unsafe if self.rate == "fpr" else unsafe


def check_rows(unsafe: ArrayLike, wish: Wish | None = None) -> None:
    """Raises `InputError` when the labels, (rows,) and True for unsafe, are too few to fit and to test on."""
    truth = np.asarray(unsafe, bool)
    found = int(truth.sum())
    if len(truth) < LEAST_ROWS or min(found, len(truth) - found) < LEAST_OF_A_LABEL:
        raise InputError(f"{len(truth)} rows, {found} of them unsafe, are too few to calibrate on: at least {LEAST_ROWS} are needed, "
                         f"and {LEAST_OF_A_LABEL} of each label.")
    if wish:
        own, needed = int(wish.of(truth).sum()), math.ceil(1 / wish.share / (1 - 1 / FOLDS) - 1e-9)
        if own < needed:
            kind = "safe" if wish.rate == "fpr" else "unsafe"
            raise InputError(f"A threshold for {wish.rate} {wish.value:g} needs at least {needed} {kind} rows; there are {own}.")


def fit(raw: ArrayLike, unsafe: ArrayLike) -> Calibration:
    """Slope and offset of the largest likelihood, under the prior of `SPREAD`; the threshold stays 0.5.

    Raw scores and labels are (rows,). Raises `InputError` when unsafe rows do not have the higher scores.
    Source: Platt, Probabilistic outputs for support vector machines, 1999; by Newton's method.
    """
    truth = np.asarray(unsafe, bool)
    logits = np.clip(_logit(raw), -FARTHEST, FARTHEST)
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    sign = np.where(truth, -1.0, 1.0)

    def loss(at: Floats) -> float:
        return float(np.logaddexp(0, sign * (design @ at)).sum() + (((at - IDENTITY) / SPREAD) ** 2).sum() / 2)

    at = IDENTITY
    for _ in range(STEPS):
        likely = np.exp(-np.logaddexp(0, -(design @ at)))
        gradient = design.T @ (likely - truth) + (at - IDENTITY) / SPREAD**2
        curvature = (design * (likely * (1 - likely))[:, None]).T @ design + np.diag(1 / SPREAD**2)
        step = np.linalg.solve(curvature, gradient)
        if np.abs(step).max() < CLOSE:
            break
        before = loss(at)
        while loss(at - step) > before:  # it is convex, so a shorter step always does
            step = step / 2
        at = at - step
    else:
        raise InferenceError("The calibration did not come to an end; nothing was fitted.")
    slope, offset = at.tolist()
    if slope < RANGES["slope"][0]:
        raise InputError("Unsafe rows do not have higher scores than safe ones; there is nothing to fit. Are the labels right?")
    return Calibration(slope, offset)


def threshold(scores: Floats, unsafe: NDArray[np.bool_], wish: Wish) -> float:
    """Where a wish comes true for one more row of the same kind; the least strict threshold that does, halfway to the next score.

    Of n rows and a further one, each is as likely as any other to have the k-th score from its end. So k rows may lie on the
    wrong side when (k + 1) / (n + 1) is at most the wish's share. Raises `InputError` where no threshold does.
    Source: Angelopoulos et al., Conformal risk control, 2022.
    """
    own = np.sort(scores[wish.of(unsafe)])
    wrong = math.floor(wish.share * (len(own) + 1) + 1e-9) - 1
    if wrong < 0:
        raise InputError(f"{len(own)} rows are too few to choose a threshold for {wish.rate} {wish.value:g} on.")
    if wish.rate == "recall":
        return _between(scores[scores < own[wrong]].max(initial=0.0), own[wrong])
    highest_safe = own[-1 - wrong]
    if highest_safe == 1:
        raise InputError(f"More than {wish.value:g} of the safe rows have a score of 1; no threshold keeps them out.")
    return _between(highest_safe, scores[scores > highest_safe].min(initial=1.0))


def calibrate(raw: ArrayLike, unsafe: ArrayLike, wish: Wish | None = None) -> Calibration:
    """Fitted on rows, with the threshold of a wish, else 0.5; raises what `fit` and `threshold` do."""
    fitted = fit(raw, unsafe)
    return replace(fitted, threshold=threshold(fitted.scores(raw), np.asarray(unsafe, bool), wish)) if wish else fitted


def held_out(raw: ArrayLike, unsafe: ArrayLike, wish: Wish | None = None, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """Score and "unsafe" of every row, (rows,), by the calibration of the other folds: what is to be expected of further rows."""
    values, truth = np.asarray(raw, np.float64), np.asarray(unsafe, bool)
    fold = np.empty(len(truth), int)
    generator = np.random.default_rng(seed)
    for label in (False, True):
        places = generator.permutation(np.flatnonzero(truth == label))
        fold[places] = np.arange(len(places)) % FOLDS
    scores, judged = np.empty(len(truth)), np.empty(len(truth), bool)
    for number in range(FOLDS):
        out = fold == number
        fitted = calibrate(values[~out], truth[~out], wish)
        scores[out] = fitted.scores(values[out])
        judged[out] = scores[out] >= fitted.threshold
    return scores, judged


def _logit(raw: ArrayLike) -> Any:  # noqa: ANN401  a number or an array, as given
    with np.errstate(divide="ignore"):
        return np.log(raw) - np.log1p(-np.asarray(raw, np.float64))


def _between(low: float, high: float) -> float:
    """Halfway; `high` where no number lies between them, so that `low` stays below."""
    middle = (low + high) / 2
    return float(middle if low < middle else high)
