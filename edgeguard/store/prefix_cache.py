"""Prefix states on disk, so that a new process pays no prefix evaluation. Only a shortcut: whatever is wrong is a miss.

A file is

    MAGIC | SHA-256 of all that follows | header's length (8 bytes, little endian) | header (JSON: key, arrays) | the arrays' bytes

where the header is filled up with spaces so that numbers begin at a multiple of ALIGNED. Its name
is the SHA-256 of its key. It holds what a policy's text became, never a text that was judged. Many processes may read and
write at once: a file appears whole, by rename, and one that is read may be removed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"edgeguard-prefix-1\n"
HEAD = len(MAGIC) + 32 + 8
SUFFIX = ".prefix"
MOST_FILES = 64
MOST_BYTES = 2 << 30
"""Of all files; the state of an 8B's longest policy takes some 200 MB."""
MAX_HEADER = 1 << 20
ALIGNED = 64
KINDS = ("float32", "float16", "uint8")
ABANDONED = 3600.0
"""Seconds after which an unfinished file is nobody's any more."""


@dataclass(frozen=True)
class PrefixCache:
    """The states that one model may restore."""

    folder: Path
    identity: Mapping[str, str]
    """What every key of this model has in common: its hash, its profile, the processor."""

    def read(self, key: Mapping[str, str]) -> dict[str, NDArray[Any]] | None:
        """What was written under the key, or None; a file that is damaged or of another format is removed."""
        whole = {**self.identity, **key}
        path = self._path(whole)
        try:
            data = _bytes(path)
        except OSError:
            return None
        try:
            arrays = _unpacked(data, whole)
        except (ValueError, KeyError, TypeError, RecursionError):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # the least recently used leave first
        return arrays

    def write(self, key: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays (float32, float16 or uint8) under the key; where that cannot be done, nothing happens."""
        whole = {**self.identity, **key}
        size = sum(array.nbytes for array in arrays.values())
        if size > MOST_BYTES:
            return
        path = self._path(whole)
        partial = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _make_room(self.folder, size)
            with partial.open("wb") as file:
                for piece in _packed(whole, arrays):
                    file.write(piece)
            partial.replace(path)
        except OSError:  # read-only, full, or a reader on Windows holds the file
            with suppress(OSError):
                partial.unlink()

    def entries(self) -> list[tuple[dict[str, str], int]]:
        """Keys and sizes in bytes of this model's files; not checked."""
        found = []
        for path in _files(self.folder):
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError), path.open("rb") as file:
                header = _header(file.read(HEAD + MAX_HEADER))
                if self.identity.items() <= header["key"].items():
                    found.append((header["key"], path.stat().st_size))
        return found

    def _path(self, key: Mapping[str, str]) -> Path:
        return self.folder / (hashlib.sha256(_canonical(key)).hexdigest() + SUFFIX)


def ids_key(ids: tuple[int, ...]) -> str:
    """The part of a key that stands for token ids."""
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _bytes(path: Path) -> NDArray[np.uint8]:
    """A regular file as a whole; anything else would be waited for, or never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES + MAX_HEADER:
        raise OSError
    return np.fromfile(path, np.uint8)


def _packed(key: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> Iterator[Any]:
    """The pieces of a file, in order: buffers of bytes."""
    listed = [{"name": name, "dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()]
    header = _canonical({"key": dict(key), "arrays": listed})
    header += b" " * (-(HEAD + len(header)) % ALIGNED)
    numbers = (np.ascontiguousarray(each).reshape(-1).view(np.uint8).data for each in arrays.values())
    rest: list[Any] = [len(header).to_bytes(8, "little"), header, *numbers]
    digest = hashlib.sha256()
    for piece in rest:
        digest.update(piece)
    yield from (MAGIC, digest.digest(), *rest)


def _unpacked(data: NDArray[np.uint8], key: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The arrays of a file, as views of its bytes; raises `ValueError`, `KeyError` or `TypeError` for what is none."""
    at = len(MAGIC)
    rest: Any = data[at + 32 :]
    if hashlib.sha256(rest).digest() != data[at : at + 32].tobytes():
        raise ValueError("damaged")
    header = _header(data[: HEAD + MAX_HEADER].tobytes())
    if header["key"] != key:
        raise ValueError("another key")
    arrays, start = {}, HEAD + int.from_bytes(data[HEAD - 8 : HEAD].tobytes(), "little")
    for each in header["arrays"]:
        if each["dtype"] not in KINDS:
            raise ValueError("unknown numbers")
        kind, count = np.dtype(each["dtype"]), int(np.prod(each["shape"], dtype=np.int64))
        stop = start + count * kind.itemsize
        arrays[each["name"]] = data[start:stop].view(kind).reshape(each["shape"])
        start = stop
    if start != len(data):
        raise ValueError("too long")
    return arrays


def _header(begin: bytes) -> dict[str, Any]:
    """The header in a file's first bytes."""
    length = int.from_bytes(begin[HEAD - 8 : HEAD], "little")
    if not begin.startswith(MAGIC) or len(begin) < HEAD or length > MAX_HEADER:
        raise ValueError("another format")
    header = json.loads(begin[HEAD : HEAD + length])
    if not isinstance(header, dict) or not isinstance(header["key"], dict) or not isinstance(header["arrays"], list):
        raise TypeError("another format")
    return header


def _files(folder: Path) -> list[Path]:
    """All cached states, the least recently used first."""
    found: list[tuple[float, Path]] = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):  # another process may have removed it
                if path.suffix == SUFFIX and stat.S_ISREG((status := path.stat()).st_mode):
                    found.append((status.st_mtime, path))
    return [path for _, path in sorted(found)]


def _make_room(folder: Path, size: int) -> None:
    """Let the least recently used leave until one more of this size may come; what was left unfinished goes as well."""
    for path in folder.glob("*.partial"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    files = [(path, path.stat().st_size) for path in _files(folder)]
    total = sum(held for _, held in files)
    for place, (path, held) in enumerate(files):
        if len(files) - place < MOST_FILES and total + size <= MOST_BYTES:
            break
        with suppress(OSError):
            path.unlink()
        total -= held
