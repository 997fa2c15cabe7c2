"""Cells for pytest-benchmark: `pytest bench/test_cells.py --benchmark-json=out.json`; not part of the default tests.

The built-in model on each backend, alone and packed. A runtime that is not installed makes its cells fail, by its name.
"""

from __future__ import annotations

import atexit
from functools import lru_cache
from itertools import cycle
from typing import Any

from edgeguard.bench.speed import CONTENDERS, ENGINES, Contender, Engine, Setting
from edgeguard.bench.texts import KINDS, messages

DISTINCT = 512  # more than the rounds of a cell, so that no prompt follows itself


def pytest_generate_tests(metafunc: Any) -> None:  # noqa: ANN401  pytest is no part of an installation
    """A cell for each contender and kind of message."""
    metafunc.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
    metafunc.parametrize("kind", KINDS)


@lru_cache(maxsize=len(ENGINES))
def engine(name: str) -> Engine:
    """Loaded once for all cells."""
    made = ENGINES[name](Setting())
    atexit.register(made.close)
    return made


def test_verdict(benchmark: Any, contender: Contender, kind: str) -> None:  # noqa: ANN401
    """Time of one pass: of one message, or of a whole pack."""
    judge = engine(contender.engine)
    made = messages(kind, DISTINCT)
    blocks = cycle([made[at: at + contender.pack] for at in range(0, DISTINCT, contender.pack)])
    judge.answers(next(blocks))
    benchmark.extra_info.update(judge.facts, messages=contender.pack)
    benchmark.pedantic(judge.answers, setup=lambda: ((next(blocks),), {}), rounds=16)
