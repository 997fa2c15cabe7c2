"""The result of the speed bench for people."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.text import Text

from edgeguard.bench.report import NOTHING, caption, number, table
from edgeguard.bench.speed import PEER


def speed_report(result: dict[str, Any]) -> list[RenderableType]:
    """The steady streams, what they start from, and the reason for each contender that was not measured."""
    threads = result["settings"]["threads"]
    streams = table(f"Milliseconds a verdict: median (quartiles), times as fast as {PEER}",
                    f"All in one run, threads: {threads}; compare within it only.\n{caption(result)}",
                    ("steady stream", "harmless", "", "harmful", ""))
    costs = table("A fresh process, and the answers", "", ("", "load", "first", "memory", "judged unsafe", "answers alike"))
    for row in result["rows"]:
        name, streaming, cost = _cells(row) if row["measured"] else (row["name"], ["not measured"], [])
        streams.add_row(name, *streaming)
        if cost:
            costs.add_row(name, *cost)
    lacking = [Text(f"{row['name']} was not measured: {row['reason']}") for row in result["rows"] if not row["measured"]]
    return [streams, *([costs] if costs.row_count else []), *lacking]


def _cells(row: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """Name, steady stream, costs and answers."""
    kinds, cold = row["kinds"].values(), row["cold"]
    messages, alike = sum(kind["messages"] for kind in kinds), [kind["same_answer"] for kind in kinds]
    alone = row["pack_limit"] == 1
    start = [f"{cold['load_s']:.1f} s", f"{cold['first_ms']:.0f} ms", f"{cold['resident'] / 1e6:.0f} MB"]
    answers = [
        f"{sum(kind['judged_unsafe'] for kind in kinds)} of {messages}",
        NOTHING if row["name"] == PEER or None in alike else f"{sum(alike)} of {messages}",
    ]
    name = row["name"] if alone else f"{row['name']} by {max(kind['pack'] for kind in kinds):.0f}"
    # a start is the engine's, and told once
    return name, [cell for kind in kinds for cell in _stream(kind)], [*(start if alone else [NOTHING] * 3), *answers]


def _stream(kind: dict[str, Any]) -> tuple[str, str]:
    times = f"{kind['ms']:.3g} ({kind['ms_q1']:.3g}-{kind['ms_q3']:.3g})"
    return times, NOTHING if kind["times_faster"] is None else f"{number(kind['times_faster'], 2)}x"
