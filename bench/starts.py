"""From the start of a process to its first verdict, files in the system's cache: with the stored prefix, and evaluating it first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender
from edgeguard.bench.driver import Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Item, Prompts
from edgeguard.bench.visits import FORCED, TOKENS


@dataclass(frozen=True)
class Pair:
    """The same artifact, opened in two ways."""

    stored: Contender
    evaluated: Contender


def steps(pairs: Sequence[Pair], starts: int, prompts: Prompts, guess: Guess, logs: Path) -> list[Step]:
    """A step for each artifact; both ways take turns."""
    made = []
    for pair in pairs:
        key, name = pair.stored.key, pair.stored.name
        cells = {
            way: Cell(f"cold/{key}/{way}", "cold", name, "s", {"what": "process start to first verdict", "prefix": way, "tokens": TOKENS})
            for way in ("stored", "evaluated")
        }
        once = 2 * guess.start(pair.stored) + guess.evaluate(pair.stored, TOKENS + prompts.around)
        step = f"cold/{key}"
        made.append(Step(step, tuple(cells.values()), (starts + 0.5) * once,
                         partial(_measure, pair, starts, cells, prompts, logs / step)))
    return made


def _measure(pair: Pair, starts: int, cells: dict[str, Cell], prompts: Prompts, logs: Path) -> list[Cell]:
    items = prompts.items("safe", TOKENS, 0, 2 * starts + 1)
    ways = {"stored": pair.stored, "evaluated": pair.evaluated}
    _start(pair.stored, items.pop(), prompts, logs / "warm.log")  # files into the system's cache, their hashes into the store's
    taken: dict[str, list[float]] = {way: [] for way in ways}
    facts: dict[str, dict[str, object]] = {}
    for turn in range(starts):
        for way, contender in ways.items():
            seconds, facts[way] = _start(contender, items.pop(), prompts, logs / f"{way}-{turn}.log")
            taken[way].append(seconds)
    return [cells[way].with_samples(seconds, facts[way]) for way, seconds in taken.items()]


def _start(contender: Contender, item: Item, prompts: Prompts, log: Path) -> tuple[float, dict[str, object]]:
    """Seconds by the driver's clock, interpreter and imports included."""
    with Worker(contender.program, log) as worker:
        worker.load()
        worker.judge([item], prompts.answers, threshold=FORCED["safe"])
        return worker.since_start(), dict(worker.facts)
