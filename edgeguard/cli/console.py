"""Results to standard output, colours only for a terminal; progress and warnings to standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from edgeguard.store import Progress

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BAR = 24  # characters


def terminal(stream: TextIO | None) -> bool:
    """A person may be looking at it; a closed stream is None."""
    return stream is not None and stream.isatty()


def write(text: str, end: str = "\n") -> None:
    """Exactly this text as UTF-8, whatever the console's own encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write((text + end).encode("utf-8"))
    sys.stdout.buffer.flush()


def write_json(value: object) -> None:
    """One JSON value on one line."""
    write(json.dumps(value, ensure_ascii=False, allow_nan=False))


def show(lines: Iterable[Text]) -> None:
    """Lines for people: styled on a terminal, plain elsewhere; control characters of names are made harmless."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True) if terminal(sys.stdout) else None
    for line in lines:
        if CONTROL.search(line.plain):
            line = Text(CONTROL.sub("\ufffd", line.plain))  # noqa: PLW2901
        if console:
            console.print(line)
        else:
            write(line.plain.rstrip())


def warn(messages: Iterable[str]) -> None:
    """Warnings to standard error, one a line."""
    for message in messages if sys.stderr else ():
        sys.stderr.write(f"edgeguard: warning: {CONTROL.sub(chr(0xFFFD), message)}\n")


def line(*parts: str | tuple[str, str]) -> Text:
    """One line from texts and (text, style) pairs."""
    return Text.assemble(*parts)


def facts(pairs: Iterable[tuple[str, str]]) -> list[Text]:
    """Dim labels and their values, aligned."""
    pairs = list(pairs)
    width = max((len(label) for label, _ in pairs), default=0)
    return [line("  ", (f"{label:<{width}}  ", "dim"), value) for label, value in pairs]


def bar(share: float) -> str:
    """A bar for a number from 0 to 1, in what the console can print."""
    full, empty = ("█", "░") if "utf" in (sys.stdout.encoding or "").lower() else ("#", "-")
    filled = round(share * BAR)
    return full * filled + empty * (BAR - filled)


def size(count: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.{unit == 'GB':d}f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal's standard error while something takes its time."""
    if terminal(sys.stderr):
        with Console(file=sys.stderr).status(what):
            yield
    else:
        yield


@contextmanager
def progress() -> Iterator[Progress | None]:
    """A bar per file on a terminal's standard error; None elsewhere."""
    if not terminal(sys.stderr):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(CONTROL.sub("\ufffd", name).replace("[", "("), total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report
