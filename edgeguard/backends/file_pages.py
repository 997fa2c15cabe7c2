"""Pages of mapped files that were read once, to be packed: they stay in the file cache and are no more this process's memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

DONTNEED = 4  # madvise's advice


def let_go(folder: Path) -> None:
    """Give back the pages of files in `folder`; Linux only. Whoever reads them again finds what was there.

    A mapping with pages that were written to is left alone: they would be lost.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for mapped in psutil.Process().memory_maps(grouped=False):
        if Path(mapped.path).parent == folder and not mapped.anonymous:
            start, end = (int(address, 16) for address in mapped.addr.split("-"))
            madvise(start, end - start, DONTNEED)
