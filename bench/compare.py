"""Two results of the suite beside each other: ratios of medians by cell, and what makes them hard to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from edgeguard.bench.cells import Cell
from edgeguard.bench.report import NOTHING, table
from edgeguard.bench.result import Result, more_is_better, shown, spread, why_not, words

MACHINE = ("cpu", "arch", "cores", "threads", "memory_bytes", "os", "python")
MODEL = ("name", "profile", "random", "shape")


@dataclass(frozen=True)
class Pair:
    """One cell in both results, measured in both."""

    one: Cell
    other: Cell

    @property
    def ratio(self) -> float:
        """Median of the second over that of the first; infinite over zero."""
        first, second = self.one.p50 or 0.0, self.other.p50 or 0.0
        return second / first if first else 1.0 if not second else float("inf")

    @property
    def worse(self) -> float:
        """How many times as bad the second is: above 1 it costs more, or does less."""
        if not more_is_better(self.one):
            return self.ratio
        return 1 / self.ratio if self.ratio else float("inf")

    @property
    def noise(self) -> bool | None:
        """Whether the quartile ranges overlap; None when one sample each says nothing of noise."""
        if min(len(self.one.samples), len(self.other.samples)) < 2:
            return None
        (low, high), (other_low, other_high) = spread(self.one), spread(self.other)
        return low <= other_high and other_low <= high

    @property
    def word(self) -> str:
        """`within noise`, `one sample`, `better`, `worse`, or `same`."""
        if self.worse == 1:
            return "same"
        if self.noise:
            return "within noise"
        return ("worse" if self.worse > 1 else "better") + (", one sample" if self.noise is None else "")


@dataclass(frozen=True)
class Comparison:
    """All that can be said of two results."""

    warnings: tuple[str, ...]
    pairs: tuple[Pair, ...]
    missing: tuple[tuple[str, str], ...]
    """Ids of cells that cannot be compared, and why."""

    def above(self, ratio: float) -> list[Pair]:
        """Pairs whose second is worse by more than this, noise left aside."""
        return [pair for pair in self.pairs if pair.worse > ratio and not pair.noise]

    def to_dict(self) -> dict[str, Any]:
        """For programs; an infinite ratio is null."""
        return {
            "bench": "compare", "warnings": list(self.warnings),
            "cells": [
                {"id": pair.one.id, "unit": pair.one.unit, "one": pair.one.p50, "other": pair.other.p50,
                 "ratio": pair.ratio if pair.ratio != float("inf") else None, "within_noise": pair.noise, "told": pair.word}
                for pair in self.pairs
            ],
            "not_compared": [{"id": id_, "reason": reason} for id_, reason in self.missing],
        }


def compare(one: Result, other: Result) -> Comparison:
    """The second result against the first."""
    first, second = ({cell.id: cell for cell in result.cells} for result in (one, other))
    pairs, missing = [], []
    for id_ in [*first, *(name for name in second if name not in first)]:
        if reason := _reason(first.get(id_), second.get(id_)):
            missing.append((id_, reason))
        else:
            pairs.append(Pair(first[id_], second[id_]))
    return Comparison(tuple(_warnings(one, other)), tuple(pairs), tuple(missing))


def _reason(one: Cell | None, other: Cell | None) -> str:
    """Why two cells of one id cannot be compared; empty if they can."""
    if one is None:
        return "in the second result only"
    if other is None:
        return "in the first result only"
    for cell, place in ((one, "first"), (other, "second")):
        if not cell.measured:
            return f"not measured in the {place}: {why_not(cell)}"
    return "" if one.unit == other.unit else f"in {one.unit} and in {other.unit}"


def _warnings(one: Result, other: Result) -> Iterator[str]:
    """What differs, from the machine on; ratios between different machines say more of the machines."""
    machines = list(_differences(one.machine, other.machine, MACHINE))
    if machines:
        yield f"The machines differ ({'; '.join(machines)}): the ratios say more of them than of edgeguard."
    if models := list(_differences(one.model, other.model, MODEL)):
        yield f"The models differ ({'; '.join(models)})."
    artifacts = [{str(each.get("label")): each for each in result.model.get("artifacts") or ()} for result in (one, other)]
    shared = sorted(artifacts[0].keys() & artifacts[1].keys())
    for what, key in (("weights", "sha256"), ("files", "digest")):  # a digest is of all files; older results have none
        if changed := [label for label in shared if len({each[label].get(key) for each in artifacts} - {None}) > 1]:
            yield f"The {what} of {', '.join(changed)} differ."
            break
    first, second = ({"edgeguard": result.edgeguard, **(result.machine.get("packages") or {})} for result in (one, other))
    if versions := list(_differences(first, second, tuple(dict.fromkeys([*first, *second])))):
        yield f"The versions differ ({'; '.join(versions)})."
    if (one.bench, one.suite) != (other.bench, other.suite):
        yield f"The suites differ ({one.bench} {one.suite}, {other.bench} {other.suite})."


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if one.get(name) != other.get(name):
            yield f"{name} {words(one.get(name))}, then {words(other.get(name))}"


def compare_report(comparison: Comparison) -> list[RenderableType]:
    """For people: a line for each cell, then those that have no partner."""
    cells = table("The second result over the first", "Below 1 the second has less. Within noise: the ranges between quartiles overlap.",
                  ("cell", "first", "second", "ratio", ""))
    for pair in comparison.pairs:
        cells.add_row(Text(pair.one.id), shown(pair.one), shown(pair.other), f"{pair.ratio:.3f}", pair.word)
    lacking = [Text(f"{id_}: {reason}.") for id_, reason in comparison.missing]
    return [cells if comparison.pairs else Text(f"{NOTHING} no cell is in both results"), *lacking]
