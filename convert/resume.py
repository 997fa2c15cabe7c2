"""The partial folder of a conversion: what it depends on, and whether what an earlier run left there can be taken up again.

The folder holds a journal of its own (`convert.journal`): the hashes of the source's files, and the peaks of memory so far. Files that
grow have journals beside them; the walk saves its state there too. All of them begin with a dot and are removed at the end.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeguard import __version__
from edgeguard.convert.journal import SUFFIX, Journal
from edgeguard.store import sha256
from edgeguard.store.files import Progress
from edgeguard.store.manifest import MANIFEST

STAGES = f".conversion{SUFFIX}"
WALK = f".walk{SUFFIX}"
BEGUN, MEMORY = "begun", "memory"


def identity(files: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the bytes of an artifact depend on: the source's files by name, size and time, the settings, and the builder."""
    marks = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"files": marks, "settings": dict(settings), "builder": __version__}


def take_up(folder: Path, own: Mapping[str, Any]) -> Journal:
    """The journal of the partial folder, which is made, or emptied when it is of another identity or damaged."""
    journal = Journal(folder / STAGES, own) if folder.is_dir() else None
    if journal is None or journal.finished(BEGUN) is None:
        if journal is not None:
            journal.close()
            clear(folder, STAGES)
        folder.mkdir(parents=True)
        journal = Journal(folder / STAGES, own)
        journal.finish(BEGUN, {})
    (folder / MANIFEST).unlink(missing_ok=True)  # killed before the folder was renamed
    return journal


def clear(folder: Path, mark: str) -> None:
    """Remove a folder, if it is there; `mark`, which tells that it is a conversion's, goes last. Raises `OSError`."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != mark:
            path.unlink()
    shutil.rmtree(folder)


def hashed(files: Sequence[Path], journal: Journal, progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of every file by its name; each is read once, whatever kills the process afterwards."""
    found = {}
    for path in files:
        record = journal.finished(f"sha256 {path.name}")
        if record is None:
            record = {"sha256": sha256(path, progress)}
            journal.finish(f"sha256 {path.name}", record)
        found[path.name] = str(record["sha256"])
    return found


def combined(hashes: Mapping[str, str]) -> str:
    """One hash for a folder: over those of its files in the order of their names."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items())).encode()).hexdigest()
