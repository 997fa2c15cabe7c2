"""A conversion in a process of its own that kills itself at its n-th event; run by test_resume.

Events are what progress is told, and every file that reaches the disk or gets its name. With n = 0 it runs to its end and prints
how many there were.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from edgeguard.convert import prefixes
from edgeguard.convert.pipeline import convert

source, out, target, precision, last = sys.argv[1:]
events = count(1)


def event() -> int:
    number = next(events)
    if number == int(last):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows ends a process at once by SIGTERM
    return number


def counted(function: Any) -> Any:
    def wrapped(*arguments: Any) -> Any:
        event()
        result = function(*arguments)
        event()
        return result

    return wrapped


prefixes.EVERY = 1
for place, name in ((os, "fsync"), (Path, "replace"), (Path, "rename")):
    setattr(place, name, counted(getattr(place, name)))
convert(source, out, target=target, precision=precision, threads=1, progress=lambda *_: event())
sys.stdout.write(f"{event()}\n")
