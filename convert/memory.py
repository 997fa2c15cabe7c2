"""How much memory this process has at its peak, by what the system says of it while it works."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import psutil

PERIOD = 0.02  # seconds between two looks; one costs some 20 microseconds


class MemoryMeter:
    """A context that looks at this process from a thread of its own.

    Anonymous memory is what no file stands for, so that it cannot be dropped and read again; resident memory counts the mapped parts of
    files too. A peak shorter than a look's distance may be missed.
    """

    def __init__(self, before: Mapping[str, Any] | None = None) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)
        before = before or {}
        self.anonymous: int | None = before.get("anonymous")
        """Bytes at the peak; None where the system does not say. Peaks `before` (of a run that was killed) count too."""
        self.resident: int = before.get("resident", 0)

    def __enter__(self) -> MemoryMeter:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> dict[str, int | None]:
        """Look now; the peaks so far, `anonymous` and `resident`."""
        resident, anonymous = usage(self._process)
        self.resident = max(self.resident, resident)
        if anonymous is not None:
            self.anonymous = max(self.anonymous or 0, anonymous)
        return {"anonymous": self.anonymous, "resident": self.resident}

    def _watch(self) -> None:
        while not self._done.wait(PERIOD):
            self.look()


def usage(process: psutil.Process) -> tuple[int, int | None]:
    """Bytes that are resident, and those of them that no file stands for.

    Linux: resident without shared pages. Windows: private commit, which counts what is swapped out as well. macOS: no cheap
    number tells the two apart; None.
    """
    found = process.memory_info()
    if hasattr(found, "shared"):
        return int(found.rss), int(found.rss) - int(found.shared)
    private = getattr(found, "private", None)
    return int(found.rss), None if private is None else int(private)
