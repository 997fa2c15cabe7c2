"""Work that can be taken up again after a kill: a journal of finished pieces, and a file that grows by such pieces.

A writer of one big file uses `GrowingFile` alone:

    with GrowingFile(out, identity) as file:        # out.partial, and beside it the journal .out.progress
        for name in order:                          # the same order in every run
            if file.finished(name) is None:
                with file.piece(name, align=32, type="Q4_K") as write:
                    write(array)                    # as often as needed
            record = file.finished(name)            # {"offset": ..., "length": ..., "crc": ..., "type": "Q4_K"}
        file.complete(check)                        # out.partial becomes out, when check(out.partial) raises nothing

`identity` says what the bytes depend on (source hash, settings, builder). Another identity, or a damaged journal, means that
work begins anew. When `out` is there already and its journal says that it belongs to this identity, it is taken up like a
partial one, so that nothing of it is redone. Without an identity (None) there is no journal and nothing is taken up.
The journal stays when the file is complete, until `remove_journals(folder)`; its name begins with a dot, so no manifest lists it.
Leaving the context by an exception keeps what is finished; without an identity the partial file is removed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

Checked = TypeVar("Checked")
Write = Callable[[NDArray[Any]], None]
SUFFIX = ".progress"
SYNC = 1 << 27
"""Bytes of finished pieces that a loss of power may cost; a killed process loses none."""
STRIDE = 1 << 24  # bytes read at once where a finished piece is checked


class Journal:
    """Names that are finished, each with a JSON record, one line each in the file before `finish` returns.

    Every line carries a checksum over itself and all lines before it; what follows the first damaged line counts as unfinished.
    With another `identity` (any JSON object) than the file's, everything does. Raises `OSError` where the disk fails.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        self._check, end = 0, 0
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        values = []
        for line in lines:
            check, _, text = line.partition(b" ")
            ours = zlib.crc32(text, self._check)
            if check != b"%08x" % ours or not line.endswith(b"\n"):
                break
            self._check, end = ours, end + len(line)
            values.append(json.loads(text))
        known = bool(values) and values[0] == json.loads(json.dumps(dict(identity)))
        self._records = dict(values[1:]) if known else {}
        self._stream: BinaryIO = path.open("r+b" if known else "wb")
        self._stream.truncate(end if known else 0)
        self._stream.seek(0, os.SEEK_END)
        if not known:
            self._check = 0
            self._append(dict(identity), sync=True)

    def finished(self, name: str) -> Mapping[str, Any] | None:
        """What was recorded of a finished name, None for one that is not."""
        return self._records.get(name)

    def records(self) -> dict[str, Mapping[str, Any]]:
        """All that is finished, in the order in which it was."""
        return dict(self._records)

    def finish(self, name: str, record: Mapping[str, Any], *, sync: bool = True) -> None:
        """Note a name as finished; with `sync` it is on the disk itself then, not only with the system."""
        self._append([name, dict(record)], sync=sync)
        self._records[name] = dict(record)

    def forget(self, names: list[str]) -> None:
        """Note names as unfinished again: the whole journal is written anew without them."""
        kept = [(name, record) for name, record in self._records.items() if name not in names]
        self._stream.seek(0)
        head = json.loads(self._stream.readline().partition(b" ")[2])
        self._stream.seek(0)
        self._stream.truncate(0)
        self._check, self._records = 0, {}
        self._append(head, sync=False)
        for name, record in kept:
            self.finish(name, record, sync=False)
        _sync(self._stream)

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._stream.close()

    def _append(self, value: object, *, sync: bool) -> None:
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        self._check = zlib.crc32(text, self._check)
        self._stream.write(b"%08x %s" % (self._check, text))
        self._stream.flush()
        if sync:
            os.fsync(self._stream.fileno())


class GrowingFile:
    """See the module. Positions are bytes from the start of the file; gaps for alignment are zeros.

    Every piece that the journal has is read and compared with its checksum when work is taken up.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._identity = identity
        self._journal: Journal | None = None
        self._records: dict[str, Mapping[str, Any]] = {}
        self._unsafe = 0  # bytes since the last one that is surely on the disk
        self._stream: BinaryIO

    def __enter__(self) -> GrowingFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._identity is not None:
            self._journal = Journal(journal_of(self.path), self._identity)
            self._records = self._journal.records()
            if self._records and not self.partial.exists() and self.path.exists():
                self.path.replace(self.partial)
        taken_up = bool(self._records) and self.partial.exists()
        self._stream = self.partial.open("r+b" if taken_up else "w+b")
        self._cut()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if kind is not None and self._identity is None:
            self.partial.unlink(missing_ok=True)

    def finished(self, name: str) -> Mapping[str, Any] | None:
        """`offset`, `length`, `crc` (CRC-32 of the bytes) and what the writer added, or None."""
        return self._records.get(name)

    @contextmanager
    def piece(self, name: str, align: int = 1, **extra: object) -> Iterator[Write]:
        """Append one piece by the function that the context gives; it is finished when the context is left without an error."""
        stream = self._stream
        stream.write(b"\0" * (-stream.tell() % align))
        offset, crc = stream.tell(), 0

        def write(data: NDArray[Any]) -> None:
            nonlocal crc
            view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            crc = zlib.crc32(view, crc)
            stream.write(view)

        try:
            yield write
        except BaseException:
            stream.seek(offset)
            stream.truncate()
            raise
        record = {"offset": offset, "length": stream.tell() - offset, "crc": crc, **extra}
        stream.flush()
        if self._journal is not None:
            self._unsafe += stream.tell() - offset
            sync = self._unsafe >= SYNC
            if sync:
                os.fsync(stream.fileno())
                self._unsafe = 0
            self._journal.finish(name, record, sync=sync)
        self._records[name] = record

    def pad(self, align: int) -> None:
        """Zeros up to a multiple of `align`, for a format that wants them behind its last piece."""
        self._stream.write(b"\0" * (-self._stream.tell() % align))

    def complete(self, check: Callable[[Path], Checked]) -> Checked:
        """Everything is written: the file gets its name when `check` of it raises nothing; the journal stays."""
        _sync(self._stream)
        self._close()
        try:
            checked = check(self.partial)
        except BaseException:
            self.partial.unlink()  # all that the journal says of it is void then
            raise
        self.partial.replace(self.path)
        return checked

    def _cut(self) -> None:
        """Drop what is not finished: pieces from the first damaged one on, and the bytes behind the last good one."""
        end, bad = 0, False
        lost = []
        for name, record in self._records.items():
            bad = bad or record["offset"] < end or not self._holds(record)
            if bad:
                lost.append(name)
            else:
                end = record["offset"] + record["length"]
        if lost and self._journal is not None:
            self._journal.forget(lost)
            self._records = self._journal.records()
        self._stream.seek(end)
        self._stream.truncate()

    def _holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the bytes of a piece are those that were written."""
        self._stream.seek(record["offset"])
        left, crc = record["length"], 0
        while left and (data := self._stream.read(min(left, STRIDE))):
            left, crc = left - len(data), zlib.crc32(data, crc)
        return not left and bool(crc == record["crc"])

    def _close(self) -> None:
        self._stream.close()
        if self._journal is not None:
            self._journal.close()


def journal_of(path: Path) -> Path:
    """Where the journal of a growing file lies."""
    return path.with_name(f".{path.name}{SUFFIX}")


def remove_journals(folder: Path) -> None:
    """When nothing has to be taken up any more."""
    for path in folder.glob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
