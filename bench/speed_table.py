"""The result of the speed bench for people."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgeguard.bench.report import NOTHING, caption, number
from edgeguard.bench.speed import PEER

HEADINGS = ("harmless", "", "harmful", "", "first call", "load", "memory", "judged unsafe", "same answer")


def speed_report(result: dict[str, Any]) -> list[RenderableType]:
    """A line for each contender, and the reason for each that was not measured."""
    threads = result["settings"]["threads"]
    table = Table(title=f"Milliseconds a verdict, median (quartiles), and how many times as fast as {PEER}; threads: {threads}",
                  caption=f"All in one run: compare within it only. {caption(result)}")
    table.add_column("", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        packed = f" by {row['pack']}" if row["pack"] > 1 else ""
        table.add_row(f"{row['name']}{packed}", *(_cells(row) if row["measured"] else ["not measured"]))
    lacking = [Text(f"{row['name']} was not measured: {row['reason']}") for row in result["rows"] if not row["measured"]]
    return [table, *lacking]


def _cells(row: dict[str, Any]) -> list[str]:
    kinds, cold = row["kinds"].values(), row["cold"]
    alone = row["pack"] == 1  # a start is the engine's, it is told once
    messages = sum(kind["messages"] for kind in kinds)
    alike = [kind["same_answer"] for kind in kinds]
    return [
        *(cell for kind in kinds for cell in _stream(kind)),
        f"{number(cold['first_ms'], 0)} ms" if alone else NOTHING,
        f"{number(cold['load_s'], 1)} s" if alone else NOTHING,
        f"{cold['resident'] / 1e6:.0f} MB" if alone else NOTHING,
        f"{sum(kind['judged_unsafe'] for kind in kinds)} of {messages}",
        NOTHING if row["name"] == PEER or None in alike else f"{sum(alike)} of {messages}",
    ]


def _stream(kind: dict[str, Any]) -> tuple[str, str]:
    times = f"{number(kind['ms'], 1)} ({number(kind['ms_q1'], 1)}-{number(kind['ms_q3'], 1)})"
    return times, NOTHING if kind["times_faster"] is None else f"{number(kind['times_faster'], 2)}x"
