"""A run for people: what it will measure and how long that takes, its progress, and its result as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.report import NOTHING, table
from edgeguard.bench.result import agreement, figure
from edgeguard.bench.suite import Plan

TITLES = {
    "ladder": "The ladder, a message of 23 tokens", "peers": "Peers, a message of 23 tokens",
    "length": "Time to verdict by length of the text",
    "cold": "Cold starts", "packed": "Several messages in one pass, time of each", "memory": "Memory and disk",
    "ceiling": "Ceilings of this machine", "fidelity": "Verdicts beside those of the most exact artifact",
}
SPEEDS = ("ladder", "peers", "length", "packed")
"""Groups whose cells have their fidelity beside them."""
MARKS = {True: "met", False: "NOT MET", None: "not measured"}


def plan_table(plan: Plan, done: int) -> Table:
    """Cells by group and the time they will take."""
    told = (f"{len(plan.steps)} steps, {done} of them done already; about {span(_seconds(plan.steps))} in all. "
            "Ctrl-C loses the running step only; the same command goes on.")
    shown = table("What will be measured", told, ("group", "cells", "steps", "about"))
    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.cells[0].group if not step.id.startswith(("ladder", "peers")) else step.id.split("/")[0], []).append(step)
    cells = Counter(cell.group for cell in plan.cells)
    for group, inside in steps.items():
        shown.add_row(group, str(cells[group]), str(len(inside)), span(_seconds(inside)))
    return shown


def cell_list(plan: Plan) -> list[Text]:
    """Every cell's id."""
    return [Text(cell.id) for cell in plan.cells]


def step_line(step: Step, place: int, count: int, taken: float, left: float) -> Text:
    """A step that is done."""
    return Text(f"[{place}/{count}] {step.id}: {span(taken)}; about {span(left)} left")


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def result_tables(result: Mapping[str, Any]) -> list[RenderableType]:
    """A table for each group, the targets, and the reason for every contender that was not measured."""
    cells = [Cell.from_dict(each) for each in result["cells"]]
    beside = {"fidelity": lambda cell: figure(found.p50 or 0.0, found.unit) if (found := agreement(cells, cell)) else NOTHING}
    shown: list[RenderableType] = []
    host = result["machine"]
    for group, title in TITLES.items():
        inside = [cell for cell in cells if cell.group == group and cell.measured]
        if inside:
            shown.append(_cells(title, inside, {**_COLUMNS.get(group, {}), **(beside if group in SPEEDS else {})}))
    shown.append(Text(f"{host['cpu'] or host['arch']}, {host['cores']} cores, threads {host['threads']}, edgeguard {result['edgeguard']}; "
                      f"model {result['model']['name']}{' (random weights)' if result['model']['random'] else ''}. "
                      "Compare within one run only."))
    cost = result["cost"]
    shown.append(Text(f"Costs are electricity for a prompt's tokens at an assumed {cost['watts']:g} W and {cost['price']:g} USD/kWh; "
                      f"the hosted model asks {cost['hosted']:g} USD a million."))
    reasons: dict[tuple[str, str], None] = {
        (cell.contender, cell.reason or ""): None for cell in cells if not cell.measured
    }
    shown += [Text(f"{name} was not measured: {reason}") for name, reason in reasons]
    return [*shown, targets_table(result["targets"])]


def targets_table(targets: Sequence[Mapping[str, Any]]) -> Table:
    """What was wanted and what came out; unmet is said as unmet."""
    shown = table("Targets", "", ("target", "wanted", "got", "", "note"))
    for target in targets:
        got = NOTHING if target["got"] is None else f"{target['got']:.3g}"
        mark = "told" if target["wanted"] == "told" and target["got"] is not None else MARKS[target["met"]]
        shown.add_row(Text(target["what"]), target["wanted"], got, mark, Text(target["note"]))
    return shown


Column = Callable[[Cell], str]


def _cells(title: str, cells: Sequence[Cell], columns: Mapping[str, Column]) -> Table:
    shown = table(title, "", ("cell", "contender", "median", "95%", "n", *columns))
    for cell in cells:
        shown.add_row(cell.id, Text(cell.contender), figure(cell.p50 or 0.0, cell.unit), figure(cell.p95 or 0.0, cell.unit),
                      str(len(cell.samples)), *(column(cell) for column in columns.values()))
    return shown


def _extra(name: str, shape: str = "{:.3g}") -> Column:
    def column(cell: Cell) -> str:
        value = cell.extra.get(name)
        return NOTHING if value is None else shape.format(value)

    return column


def _bytes(cell: Cell) -> str:
    count = cell.facts.get("bytes")
    return figure(float(count), "B") if isinstance(count, int) else NOTHING


_SPEED: dict[str, Column] = {
    "on disk": _bytes, "GMAC/s": _extra("gmacs"), "of int8 ceiling": _extra("share_of_int8_ceiling", "{:.0%}"),
    "USD/M tokens": _extra("usd_per_million_tokens"),
}
_COLUMNS: dict[str, Mapping[str, Column]] = {
    "ladder": _SPEED, "peers": _SPEED, "length": _SPEED, "packed": {"messages/s": _extra("messages_per_second"), **_SPEED},
    "fidelity": {"to safe": _extra("unsafe_to_safe", "{}"), "to unsafe": _extra("safe_to_unsafe", "{}"),
                 "mean drift": _extra("drift", "{:.4f}"), "rows": _extra("rows", "{}")},
    "ceiling": {"operator": lambda cell: str(cell.facts.get("kernel", ""))},
}


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)
