"""Work on a loaded model that goes on while verdicts are given already: packing weights, gathering them into huge pages."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

_lock = threading.Lock()
_running: list[tuple[threading.Thread, Callable[[], object] | None]] = []


def start(name: str, work: Callable[[], object], stop: Callable[[], object] | None = None) -> threading.Thread:
    """A thread for the work; `stop` ends it soon. Without one, the work may be broken off at any place when the program ends."""
    thread = threading.Thread(target=work, name=f"edgeguard-{name}", daemon=True)
    with _lock:
        thread.start()
        _running[:] = [(thread, stop), *_alive()]
    return thread


def settled() -> None:
    """Return when all work is done, that which it has begun itself included."""
    while True:
        with _lock:
            alive = _alive()
        if not alive:
            return
        alive[0][0].join()


def _alive() -> list[tuple[threading.Thread, Callable[[], object] | None]]:
    return [each for each in _running if each[0].is_alive()]


@atexit.register
def _end() -> None:
    """A thread within native code must not outlive the interpreter."""
    stopped = [(thread, stop) for thread, stop in list(_running) if stop and thread.is_alive()]
    for _, stop in stopped:
        stop()
    for thread, _ in stopped:
        thread.join()


if hasattr(os, "register_at_fork"):  # another thread may have held the lock
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001  as logging does
