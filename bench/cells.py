"""Cells of the suite: what one number is, the steps that measure them, and the folder that makes a run resumable.

A step is what is measured in one go, a worker's visit for instance, and gives samples for one or several cells. Each finished
step is a file; a cell's samples are put together from all steps that name it. Nothing here knows what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.errors import EdgeGuardError, InputError
from edgeguard.store import write_text

RUN = "run.json"


@dataclass(frozen=True)
class Cell:
    """One number of the result, with everything that belongs to it; without samples it was not measured."""

    id: str
    group: str
    """`ladder`, `peers`, `length`, `cold`, `packed`, `memory`, `ceiling` or `fidelity`."""
    contender: str
    unit: str
    """`s`, `B`, `GMAC/s`, `GB/s`, or `share`."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """What was asked of the contender: `tokens`, `answer`, `pack`, ..."""
    samples: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What really ran."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers that came with it."""
    reason: str | None = None
    """Why it was not measured."""

    @property
    def measured(self) -> bool:
        """There is at least one sample."""
        return bool(self.samples)

    @property
    def p50(self) -> float | None:
        """The median."""
        return self._quantile(0.5)

    @property
    def p95(self) -> float | None:
        """The 95th percentile."""
        return self._quantile(0.95)

    def with_samples(self, samples: Iterable[float], facts: Mapping[str, Any], **extra: object) -> Cell:
        """This cell, measured."""
        return replace(self, samples=tuple(map(float, samples)), facts=dict(facts), extra={**self.extra, **extra})

    def to_dict(self) -> dict[str, Any]:
        """Plain values of the result file."""
        return {
            "id": self.id, "group": self.group, "contender": self.contender, "measured": self.measured,
            "reason": None if self.measured else self.reason, "facts": dict(self.facts), "params": dict(self.params), "unit": self.unit,
            "samples": list(self.samples), "p50": self.p50, "p95": self._quantile(0.95), "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Cell:
        """The cell that `to_dict` was made of."""
        names = ("id", "group", "contender", "unit", "params", "facts", "extra", "reason")
        return cls(**{name: plain[name] for name in names}, samples=tuple(plain["samples"]))

    def _quantile(self, share: float) -> float | None:
        return float(np.quantile(self.samples, share)) if self.samples else None


Measure = Callable[[], Sequence[Cell]]


@dataclass(frozen=True)
class Step:
    """Cells that are measured in one go."""

    id: str
    """Its file's name, with folders."""
    cells: tuple[Cell, ...]
    """As they will be, still without samples."""
    seconds: float
    """How long it will take, a guess."""
    measure: Measure = field(repr=False)

    def wanted(self, pattern: str | None) -> bool:
        """The pattern, as of file names, fits the id of the step or of one of its cells."""
        return pattern is None or any(fnmatch(name, pattern) for name in (self.id, *(cell.id for cell in self.cells)))

    def run(self) -> list[Cell]:
        """Measure; whatever fails leaves its cells unmeasured, with the reason."""
        try:
            found = {cell.id: cell for cell in self.measure()}
        except Exception as error:  # a runtime can fail in ways of its own; the other steps are still measured
            reason = str(error) if isinstance(error, EdgeGuardError) else f"unexpected {type(error).__name__}: {error}"
            found = {cell.id: replace(cell, reason=reason) for cell in self.cells}
        return [found.get(cell.id, replace(cell, reason="it gave no sample")) for cell in self.cells]


class Store:
    """The folder of a run: `cells/STEP.json` for every finished step, and `run.json`, which says what run it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Take the folder for this run; raises `InputError` when it holds another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if differing := sorted(key for key in {*held, *identity} if held.get(key) != identity.get(key)):
                raise InputError(f"{self.folder} holds another run ({', '.join(differing)} differ); give --out a new folder.")
        write_text(path, json.dumps(identity, indent=1, sort_keys=True) + "\n")

    def cells(self, step: Step) -> list[Cell] | None:
        """What the step found in an earlier session; None when it is still to be done."""
        try:
            plain = json.loads(self._path(step.id).read_text(encoding="utf-8"))
            return [Cell.from_dict(each) for each in plain["cells"]]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measured again
            return None

    def done(self, step: Step) -> bool:
        """It needs no further run; one that failed is tried again."""
        found = self.cells(step)
        return found is not None and any(cell.measured for cell in found)

    def write(self, step: Step, cells: Sequence[Cell], seconds: float) -> None:
        """Keep what a step found; the file is written beside and renamed."""
        path = self._path(step.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {"step": step.id, "seconds": seconds, "cells": [cell.to_dict() for cell in cells]}
        write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def _path(self, id_: str) -> Path:
        return self.folder / "cells" / f"{id_}.json"


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """One cell for each id, in the order of their first appearance; samples of all steps one after the other."""
    found: dict[str, Cell] = {}
    for cell in cells:
        known = found.get(cell.id)
        if known is None or (cell.measured and not known.measured):
            found[cell.id] = cell
        elif cell.measured:
            found[cell.id] = replace(known, samples=known.samples + cell.samples, extra=_joined(known.extra, cell.extra))
    return list(found.values())


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of two visits one after the other; of single numbers the first visit's."""
    lists = {key: [*value, *other[key]] for key, value in one.items() if isinstance(value, list) and isinstance(other.get(key), list)}
    return {**other, **one, **lists}
