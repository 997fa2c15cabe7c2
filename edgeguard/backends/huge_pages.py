"""Weights in huge pages: a pass reads every weight once, and looking up each 4 KiB page can take longer than reading it.

Linux only, and only where the system leaves huge pages to the program (`madvise`, as Debian and Ubuntu do). The memory of an 8B
model is copied once, piece by piece, in a thread of its own, while verdicts are given already. See madvise(2), MADV_COLLAPSE.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from edgeguard.backends import background

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")
HUGE = 2 << 20
LEAST = 1 << 30
"""Bytes of new memory from which on it is worth while."""
HUGEPAGE, COLLAPSE = 14, 25  # madvise's advice

Region = tuple[int, int]
"""First address and end."""


def regions() -> list[Region]:
    """Memory of this process that is no file's, as it is mapped; nothing where huge pages are not the program's choice."""
    try:
        if sys.platform != "linux" or "[madvise]" not in MODE.read_text(encoding="ascii"):
            return []
        return [region for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if (region := _region(line))]
    except OSError:
        return []


def _region(line: str) -> Region | None:
    """Of a line of /proc/self/maps, None for files, stacks and what is smaller than a huge page."""
    span, rights, *rest = line.split()
    start, end = (int(address, 16) for address in span.split("-"))
    return (start, end) if rights == "rw-p" and len(rest) == 3 and end - start >= HUGE else None


def gather(before: Sequence[Region]) -> None:
    """Gather what was allocated since `before` into huge pages, in the background, if it is enough.

    Memory that is freed meanwhile does no harm: the advice on it is refused, or is good for what lies there now.
    """
    new = sorted(set(regions()) - set(before))
    if sum(end - start for start, end in new) < LEAST:
        return
    background.start("huge-pages", partial(_gather, new))


def _gather(new: Sequence[Region]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in new:
        # one by one: a piece that cannot be gathered, for want of room or on an older kernel, stays as it is
        for piece in range(-(-start // HUGE) * HUGE, end // HUGE * HUGE, HUGE):
            madvise(piece, HUGE, HUGEPAGE)
            madvise(piece, HUGE, COLLAPSE)
