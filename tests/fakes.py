"""A guard that answers by its text, for tests of what stands around a guard."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import numpy as np

from edgeguard.backends.base import BackendInfo
from edgeguard.conversation import Conversation
from edgeguard.errors import DeadlineError
from edgeguard.guard import Guard
from edgeguard.verdict import Category, ModelIdentity, Verdict

MODEL = ModelIdentity("mini", "edgeguard-mini", "int8", "ab" * 32, "scripted", "scripted 1", "cpu")
HATE = Category("S9", "hate", "Hate", 0.9, listed=True)
PRIVACY = Category("S6", "privacy", "Privacy", 0.2, listed=False)
CRIMES = Category("S1", "violent-crimes", "Violent Crimes", 0.01, listed=False)


def make_verdict(score: float = 0.1, threshold: float = 0.5, role: Any = "user", *, verdict_only: bool = False,
                 warnings: tuple[str, ...] = ()) -> Verdict:
    unsafe = score >= threshold
    categories = (HATE, PRIVACY, CRIMES) if unsafe and not verdict_only else ()
    raw = "safe" if not unsafe else "unsafe\nS9" if categories else "unsafe"
    return Verdict(
        verdict="unsafe" if unsafe else "safe", score=score, raw_score=score, threshold=threshold, mass=0.99, role=role,
        categories=categories, unexplored=0.01 if categories else 0.0, raw=raw,
        tokens={"prompt": 30, "prefix": 10, "decoded": 0}, passes=1, windows=1, cache_hit=True,
        timings={"tokenize": 0.1, "prefill": 5.0, "decode": 1.0, "total": 6.1}, model=MODEL, warnings=warnings,
    )


class FakeGuard:
    """Unsafe for texts with "bomb" in them; "crash" and "slow" do what they say."""

    backend_info = BackendInfo("scripted", "scripted 1", "cpu", "int8", 1, 8192, np.arange(3))

    def __init__(self, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.given, self.options, self.asked, self.closed = given, options, [], False

    @classmethod
    def install(cls, monkeypatch: Any = None) -> list[FakeGuard]:
        """Let `Guard.load` give fakes; the list grows by each that is loaded."""
        loaded: list[FakeGuard] = []

        def load(*given: Any, **options: Any) -> FakeGuard:
            loaded.append(cls(given, options))
            return loaded[-1]

        if monkeypatch is None:
            Guard.load = staticmethod(load)
        else:
            monkeypatch.setattr(Guard, "load", staticmethod(load))
        return loaded

    def warmup(self) -> None:
        pass

    def check(self, given: Any, role: str | None = None, threshold: float | None = None, *, timeout: float | None = None,
              verdict_only: bool = False) -> Verdict:
        conversation = Conversation.of(given, role)
        self.asked.append((given, role, threshold, timeout, verdict_only))
        text = conversation.messages[-1].content
        if "crash" in text:
            raise ZeroDivisionError(text)
        if "slow" in text:
            raise DeadlineError("The call ran out of time; no verdict was reached.")
        time.sleep(0.001)
        warnings = ("Message 1 (user) holds [/INST].",) if "[/INST]" in text else ()
        score = 0.93 if "bomb" in text else 0.02
        limit = 0.5 if threshold is None else threshold
        return make_verdict(score, limit, conversation.role, verdict_only=verdict_only, warnings=warnings)

    def __enter__(self) -> FakeGuard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed = True
