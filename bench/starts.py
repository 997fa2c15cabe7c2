"""From the start of a process to its first verdict, files in the system's cache: with the stored prefix, and evaluating it first.

ONNX weights also in the form that is mapped as it is packed, made for the step and removed after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeguard.bench.artifacts import Measured
from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender, Setting, guard
from edgeguard.bench.driver import Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Item, Prompts
from edgeguard.bench.visits import FORCED, TOKENS


@dataclass(frozen=True)
class Pair:
    """The same artifact, opened in two ways."""

    key: str
    stored: Contender
    evaluated: Contender
    packed: Path | None = None
    """Folder of weights that are mapped."""


def pairs(labels: Sequence[str], model: Measured, setting: Setting, folder: Path) -> list[Pair]:
    """Of each artifact, and once more of ONNX artifacts on a CPU with mapped weights; `folder` is the run's."""
    made = []
    for label in labels:
        ways: list[tuple[str, dict[str, str]]] = [(label, {})]
        if label.startswith("onnx") and setting.device == "cpu":
            ways.append((f"{label}-mapped", {"packed": str(folder / "packed")}))
        for key, options in ways:
            stored = guard(model, label, "L2", setting, **options)
            evaluated = guard(model, label, "L2", setting, prefix="evaluate", **options)
            made.append(Pair(key, stored, evaluated, Path(options["packed"]) if options else None))
    return made


def steps(pairs: Sequence[Pair], starts: int, prompts: Prompts, guess: Guess, logs: Path) -> list[Step]:
    """A step for each artifact; both ways take turns."""
    made = []
    for pair in pairs:
        key, name = pair.key, pair.stored.name
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
    try:
        return _taken(pair, starts, cells, prompts, logs)
    finally:
        if pair.packed:
            shutil.rmtree(pair.packed, ignore_errors=True)


def _taken(pair: Pair, starts: int, cells: dict[str, Cell], prompts: Prompts, logs: Path) -> list[Cell]:
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
