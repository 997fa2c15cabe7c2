"""Files on disk: hashing, checking, writing by rename, locking. Knows no model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard.errors import ModelFileError, StoreError

Progress = Callable[[str, int, int], None]
"""Called with a file's name, its bytes done and its bytes in all."""
BLOCK = 1 << 20
MAX_SEEN = 16 << 20
"""Largest memory of hashes that is read, in bytes; some ten thousand files."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Differences:
    """A folder compared with the records of its files."""

    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Files that no record names; no runtime reads them."""

    @property
    def ok(self) -> bool:
        """Every recorded file is there, byte for byte."""
        return not (self.missing or self.changed)


def sha256(path: str | Path, progress: Progress | None = None) -> str:
    """Of a file's bytes, read in blocks; raises `StoreError`."""
    path, digest, done = Path(path), hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while block := file.read(BLOCK):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(path.name, done, size)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def record(path: str | Path, progress: Progress | None = None) -> FileRecord:
    """Hash and size of a file as it is now; for those who write manifests."""
    return FileRecord(sha256(path, progress), Path(path).stat().st_size)


def records(folder: Path, progress: Progress | None = None) -> dict[str, FileRecord]:
    """Of every file below a folder, by its path there with `/`."""
    return {name: record(folder / name, progress) for name in names(folder)}


def names(folder: Path) -> list[str]:
    """Of all files below a folder, sorted; dot files and what is unfinished are left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def compare(folder: Path, expected: Mapping[str, FileRecord], own: str, progress: Progress | None = None) -> Differences:
    """Hash every recorded file anew; `own` is the file that holds the records."""
    missing, changed = [], []
    for name, want in expected.items():
        path = folder / name
        if not path.is_file():
            missing.append(name)
        elif path.stat().st_size != want.size or sha256(path, progress) != want.sha256:
            changed.append(name)
    extra = (name for name in names(folder) if name not in expected and name != own)
    return Differences(tuple(missing), tuple(changed), tuple(extra))


class Seen:
    """Hashes of files already read once, kept by path, size, times and inode, so that a load need not read 8 GB twice.

    Only a shortcut: an unreadable or unwritable memory means that files are hashed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError):
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_SEEN:  # a pipe would wait for ever, a device never end
                data = json.loads(path.read_text(encoding="utf-8"))
                self.known = data if isinstance(data, dict) else {}

    def sha256(self, path: Path, progress: Progress | None = None) -> str:
        """As remembered while the file is unchanged, else computed and remembered."""
        if remembered := self.recall(path):
            return remembered
        before = mark(path)
        digest = sha256(path, progress)
        self.known[str(path.resolve())] = [*before, digest]
        with suppress(OSError):
            self._write()
        return digest

    def recall(self, path: Path) -> str:
        """As remembered while the file is unchanged, else empty."""
        entry = self.known.get(str(path.resolve()))
        return entry[-1] if isinstance(entry, list) and entry[:-1] == mark(path) and isinstance(entry[-1], str) else ""

    def once(self, path: Path, progress: Progress | None = None) -> str:
        """As `sha256`, but empty where it could not be remembered: a large file is not read again and again."""
        try:
            if not self.recall(path):
                self._write()
            return self.sha256(path, progress)
        except OSError:
            return ""

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.known))


def mark(path: Path) -> list[int]:
    """What tells that a file is still the same one, with the same bytes; whoever sets its time back cannot set back when (st_ctime)."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def check(folder: Path, expected: Mapping[str, FileRecord], seen: Seen, progress: Progress | None = None) -> None:
    """The check at load: sizes of all files, and the hash of those not seen before; raises `ModelFileError`."""
    for name, want in expected.items():
        path = folder / name
        if not path.is_file():
            raise ModelFileError(f"{path} is missing, though the manifest names it. Install the model again.")
        if (size := path.stat().st_size) != want.size:
            raise ModelFileError(f"{path} has {size} bytes instead of {want.size}: cut off or changed. Install the model again.")
    for name, want in expected.items():
        if seen.sha256(folder / name, progress) != want.sha256:
            raise ModelFileError(f"{folder / name} is not what its manifest says (SHA-256 differs). Install the model again.")


class Unchanged:
    """Files that must not be written to while they are used, as weights that a runtime maps.

    They are held open, so that files that are put in their places by a rename do not count. Raises `ModelFileError` for one that
    cannot be opened.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._held: list[tuple[Path, int, tuple[int, int]]] = []
        self.close = weakref.finalize(self, _close, self._held)
        """Let the files go; again is harmless."""
        for path in paths:
            try:
                handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise ModelFileError(f"{path} cannot be opened: {error.strerror}.") from error
            self._held.append((path, handle, _state(handle)))

    def check(self) -> None:
        """Raises `ModelFileError` when one was written to: what was computed since is worth nothing."""
        for path, handle, state in self._held:
            if _state(handle) != state:
                raise ModelFileError(f"{path} was written to while it was in use, so nothing was judged. Load the model again; "
                                     "put new files beside old ones and rename them.")


def _state(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


def _close(held: list[tuple[Path, int, tuple[int, int]]]) -> None:
    while held:
        os.close(held.pop()[1])


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all: beside it as `.partial`, then renamed; raises `StoreError`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
    return path


@contextmanager
def locked(path: Path, timeout: float = 10, what: str = "") -> Iterator[None]:
    """Hold a lock on `what` (by default the lock's name) that the system lets go when its process dies.

    Raises `StoreError` when another process has it.
    """
    import filelock  # brings asyncio, and no verdict needs a lock

    held = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path, timeout=timeout):
            held = True
            yield
    except filelock.Timeout:
        raise StoreError(f"Another process is working on {what or path.stem}; try again when it has finished.") from None
    except OSError as error:
        if held:
            raise
        hint = "Choose a shorter name" if error.errno == errno.ENAMETOOLONG else "Set EDGEGUARD_HOME"
        raise StoreError(f"{error.filename or path} cannot be written: {error.strerror}. {hint}.") from error
