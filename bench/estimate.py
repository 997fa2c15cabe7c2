"""How long a run will take: a guess from the model's shape and a probe of the machine, corrected by what steps really took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edgeguard.architecture import Shape
from edgeguard.bench.contenders import Contender
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.work import macs

SPEED = {"int8": 2.5, "int4": 1.4, "fp32": 0.9, "q4_k_m": 0.8, "q4_0": 0.9, "q8_0": 0.9}
"""Multiply-accumulates of a pass beside those of NumPy's float32 product, measured once; only for guesses."""
OTHERS = 0.7
START = 2.0  # seconds: interpreter, imports
LOAD = 0.6e9  # bytes a second: from a warm file cache, packed


@dataclass
class Guess:
    """Seconds of things to come."""

    shape: Shape
    gmacs: float
    """Of a float32 product."""
    _taken: float = field(default=0.0, init=False)
    _guessed: float = field(default=0.0, init=False)

    def learn(self, guessed: float, taken: float) -> None:
        """A step that was guessed to take so long took so long."""
        self._guessed += guessed
        self._taken += taken

    @property
    def correction(self) -> float:
        """What later guesses are to be multiplied by; one step alone moves it little."""
        weight = 30.0  # seconds
        return (self._taken + weight) / (self._guessed + weight)

    def evaluate(self, contender: Contender, tokens: float) -> float:
        """One pass, attention included roughly."""
        linear = sum(macs(self.shape, tokens).values())
        attention = self.shape.layers * self.shape.heads * self.shape.head_dim * tokens * tokens
        return (linear + attention) / (self.gmacs * 1e9 * SPEED.get(contender.precision, OTHERS)) + 0.005

    def start(self, contender: Contender) -> float:
        """Process start and load."""
        return START + contender.bytes / LOAD

    def message(self, contender: Contender, prompts: Prompts, tokens: int, *, unsafe: bool = False) -> float:
        """A message of so many tokens of text, on a kept prefix where the contender keeps one."""
        kept = 0 if contender.keeps else prompts.prefix
        once = self.evaluate(contender, prompts.size(tokens) + prompts.around - prompts.prefix + kept)
        return once * (1.6 if unsafe else 1.0)

    def visit(self, contender: Contender, prompts: Prompts, messages: int) -> float:
        """Load, first call over the whole prompt, then messages."""
        first = self.evaluate(contender, 23 + prompts.around)
        return self.start(contender) + first + messages * self.message(contender, prompts, 23)


def probe(clock: Callable[[], float] = time.perf_counter) -> float:
    """GMAC/s of NumPy's float32 product, in about half a second."""
    left, right = np.ones((64, 1024), np.float32), np.ones((1024, 1024), np.float32)
    np.dot(left, right)
    began, done = clock(), 0
    while (taken := clock() - began) < 0.4:
        np.dot(left, right)
        done += 1
    return max(1.0, done * left.size * right.shape[1] / max(taken, 1e-6) / 1e9)
