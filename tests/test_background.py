"""Work behind a loaded model: it can be waited for, and a program that ends does not wait for it."""

from __future__ import annotations

import subprocess
import sys
import threading

from edgeguard.backends import background

ENDING = """
import threading, time
from edgeguard.backends import background
stop = threading.Event()
background.start("long", lambda: stop.wait(60), stop.set)
print("begun", flush=True)
"""


def test_work_is_waited_for_with_what_it_begins() -> None:
    done = list[str]()

    def outer() -> None:
        background.start("inner", lambda: done.append("inner"))
        done.append("outer")

    background.start("outer", outer)
    background.settled()
    assert sorted(done) == ["inner", "outer"]
    background.settled()


def test_a_program_that_ends_stops_the_work() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "begun\n" and not ended.stderr


def test_threads_are_named() -> None:
    go = threading.Event()
    thread = background.start("packing", go.wait)
    assert thread.name == "edgeguard-packing" and thread.daemon
    go.set()
    background.settled()
