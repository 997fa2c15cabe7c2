"""The comparison that the project is about: the usual way, cold and steady, and edgeguard's best path, on one usual message."""

from __future__ import annotations

from edgeguard.bench.cells import Cell
from edgeguard.bench.charts import Bar, picture
from edgeguard.bench.markup import Markup
from edgeguard.bench.result import Result, ours, shown, size_or_words, spread, words
from edgeguard.bench.tables import level
from edgeguard.errors import InputError


def usual_way(result: Result) -> tuple[Cell | None, Cell | None]:
    """L0, of the first format that was measured: the first call of a process, and the steady stream."""
    usual = [cell for cell in result.group("ladder") if level(cell) == "L0" and cell.measured and cell.params.get("answer") == "safe"]
    first = next((cell for cell in usual if cell.params.get("start") == "cold"), None)
    further = [cell for cell in usual if cell.params.get("start") != "cold" and (first is None or cell.contender == first.contender)]
    steady = next(iter(further), None)
    return first, steady


def headline_cells(result: Result) -> tuple[Cell | None, Cell | None, Cell | None]:
    """The usual way's two cells, and the fastest one of edgeguard that judges message by message."""
    first, steady = usual_way(result)
    alike = [cell for cell in result.group("ladder") if ours(cell) and cell.p50 is not None and cell.params.get("start") != "cold"
             and cell.params.get("answer") == "safe" and cell.params.get("pack", 1) == 1]
    return first, steady, min(alike, key=lambda cell: cell.p50 or 0.0, default=None)


def headline_bars(result: Result) -> list[Bar]:
    """One for each cell that there is, with how many times as fast the best one is."""
    first, steady, best = headline_cells(result)
    made = []
    for cell, what in ((first, "first call"), (steady, "every further message"), (best, "every further message")):
        if cell is None:
            continue
        times = f", {cell.p50 / best.p50:.1f} times as long" if best and best.p50 and cell.p50 and cell is not best else ""
        note = f"weights {size_or_words('bytes', cell.facts.get('bytes'))}{times}"
        made.append(Bar(f"{cell.contender}, {what}", cell.p50, shown(cell), cell.id, ours(cell), note, spread(cell)))
    return made


def headline_picture(result: Result) -> Markup:
    """An SVG file; raises `InputError` when a side of the comparison is missing."""
    if None in (cells := headline_cells(result)):
        names = ("the usual way's first call (L0)", "the usual way's steady stream (L0)", "a path of edgeguard")
        lacking = [name for name, cell in zip(names, cells, strict=True) if cell is None]
        raise InputError(f"The result has no measured cell of the ladder for {' and for '.join(lacking)}; nothing can be drawn.")
    bars, machine = headline_bars(result), result.machine
    processor = words(machine.get("cpu") or machine.get("arch"))
    below = [f"Medians of one run, suite {result.suite}, {words(machine.get('threads'))} threads of {processor}."]
    if result.model.get("random"):
        below.append("Random weights at the true shape: they have the speed of the real model, not its verdicts.")
    told = "; ".join(f"{bar.label}, {bar.note}: {bar.shown}" for bar in bars)
    tokens = next(words(cell.params.get("tokens")) for cell in cells if cell)
    return picture(f"One safe verdict on {tokens} tokens of text, {words(result.model.get('name'))}", told, bars, below, "s")
