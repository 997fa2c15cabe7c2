"""What a check gives back: a frozen record whose plain form follows `data/verdict.schema.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Category:
    """One category of a verdict."""

    code: str
    """As the model says it, `S9`."""
    slug: str
    """Stable across guard generations, `hate`."""
    name: str
    """For people, `Hate`."""
    probability: float
    """P(the code appears in the list | unsafe), summed over the explored part of the answer tree."""
    listed: bool
    """The model's answer lists it."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model judged, on what."""

    name: str
    profile: str
    precision: str
    sha256: str
    """Of the weights' file, or empty for a model without one."""
    backend: str
    runtime: str
    device: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of one conversation; there is no third value, a failure is an exception."""

    verdict: Literal["safe", "unsafe"]
    score: float
    """P(unsafe), calibrated: `raw_score` as it is where the model has no calibration."""
    raw_score: float
    """The model's own: softmax over the two answers, all their surface forms summed."""
    threshold: float
    """Unsafe from this `score` on."""
    mass: float
    """Share of the two answers in the probability of all rows that the artifact holds; small means the model is off its path."""
    role: Role
    """Whose turn was judged."""
    categories: tuple[Category, ...]
    """Listed ones in the order of the answer, then the others by probability; empty when safe or with `verdict_only`."""
    unexplored: float
    """Probability of the answer lists that were not looked at: how far each category's probability could still rise."""
    raw: str
    """The canonical answer, `safe` or `unsafe\\nS1,S10`; without codes when they were not asked for."""
    tokens: Mapping[str, int]
    """`prompt`, `prefix` (kept from before), `decoded`."""
    passes: int
    """Forward passes that this verdict took."""
    windows: int
    """Parts that the text was judged in."""
    cache_hit: bool
    """The prefix was there already."""
    timings: Mapping[str, float]
    """Milliseconds by stage: `tokenize`, `prefill`, `decode`, `total`."""
    model: ModelIdentity
    warnings: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        """Refused: `if guard.check(text)` would be true for every verdict."""
        raise TypeError("A verdict is neither true nor false; ask verdict.safe.")

    @property
    def safe(self) -> bool:
        """True for `safe`."""
        return self.verdict == "safe"

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes that the answer lists, in its order."""
        return tuple(category.code for category in self.categories if category.listed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by `data/verdict.schema.json`."""
        plain = asdict(self)
        for key in ("tokens", "timings"):
            plain[key] = dict(plain[key])
        return plain
