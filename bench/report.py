"""What every result says of the machine and the moment, and how results leave the program."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from edgeguard import machine
from edgeguard.cli.console import write_json
from edgeguard.store import write_text

FORMAT = 1
PIPE_WIDTH = 180  # characters, where there is no terminal
NOTHING = "-"

Advance = Callable[[float], None]


def circumstances() -> dict[str, Any]:
    """Machine, versions and load as they are now; call it before anything is measured."""
    cpu = machine.cpu()
    versions = {name: importlib.metadata.version(name) for name in ("edgeguard", "numpy", "tokenizers")}
    return {
        "format": FORMAT,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu.model, "arch": cpu.arch, "flags": sorted(cpu.flags), "system": platform.platform(terse=True),
            "cores": psutil.cpu_count(logical=False), "logical": os.cpu_count(), "usable": machine.default_threads(),
            "memory": psutil.virtual_memory().total, "available": machine.available_memory(),
            "load": [round(load, 2) for load in psutil.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(), **versions,
            **{runtime.name: runtime.version for runtime in machine.runtimes()},
        },
    }


def caption(result: Mapping[str, Any]) -> str:
    """The circumstances in one line for people."""
    host = result["machine"]
    return (f"{host['cpu'] or host['arch']}, {host['cores'] or host['logical']} cores, "
            f"load {host['load'][0]} at the start, edgeguard {result['versions']['edgeguard']}")


def table(title: str, below: str, headings: Sequence[str]) -> Table:
    """A narrow table: names on the left, figures on the right."""
    made = Table(title=Text(title), title_justify="left", caption=Text(below), caption_justify="left",
                 box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
    return made


def show(parts: Sequence[RenderableType]) -> None:
    """Tables and lines for people, on stdout."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for part in parts:
        console.print(part)


def emit(result: Mapping[str, Any], shown: Sequence[RenderableType], path: Path | None) -> None:
    """The part for people on stdout, then the result as one line of JSON: in the file, or else as the last line of stdout."""
    show(shown)
    if path is None:
        write_json(result)
    else:
        write_text(path, json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """A bar with the time left, on stderr; the value moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
