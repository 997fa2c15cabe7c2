"""Work on a loaded model that goes on while verdicts are given already: packing weights, gathering them into huge pages."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

_running: list[tuple[threading.Thread, Callable[[], object] | None]] = []


def start(name: str, work: Callable[[], object], stop: Callable[[], object] | None = None) -> threading.Thread:
    """A thread for the work; `stop` ends it soon. Without one, the work may be broken off at any place when the program ends."""
    thread = threading.Thread(target=work, name=f"edgeguard-{name}", daemon=True)
    _running[:] = [(thread, stop), *(each for each in _running if each[0].is_alive())]
    thread.start()
    return thread


def settled() -> None:
    """Return when all work is done, that which it has begun itself included."""
    while alive := [thread for thread, _ in _running if thread.is_alive()]:
        alive[0].join()


@atexit.register
def _end() -> None:
    """A thread within native code must not outlive the interpreter."""
    for thread, stop in _running:
        if stop and thread.is_alive():
            stop()
            thread.join()
