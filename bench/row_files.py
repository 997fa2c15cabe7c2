"""Labelled files as they are published: CSV, JSON lines or one JSON value, packed or not. Knows records, no labels."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeguard import strict_json
from edgeguard.errors import InputError, StoreError

LONGEST_FIELD = 1 << 24
"""Characters of a CSV field; the csv module's own limit of 131,072 is less than a long prompt."""
NOTHING = (None, "", "None")
"""How an absent value is written in JSON, in CSV, and in files that pandas wrote."""
FLAGS = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}


class Content(NamedTuple):
    """A file's bytes."""

    plain: bytes
    """Unpacked."""
    sha256: str
    """Of the file as it is, packed or not."""


class LeftOut(Exception):  # noqa: N818, no error: such a record is counted and told
    """A record that a set's own rule does not judge; the text says why, in fixed words."""


@dataclass(frozen=True)
class Record:
    """One record of a file; whatever it raises names the column and holds nothing of the text."""

    line: int
    """Where it begins, from 1; its place in a JSON array."""
    values: Mapping[str, Any]

    def value(self, name: str) -> Any:  # noqa: ANN401, any JSON value
        """As it stands there, None for nothing; raises `InputError` where there is no such column."""
        found = self._held(name)
        return None if found in NOTHING else found

    def text(self, name: str) -> str:
        """A text to judge; raises `LeftOut` for a blank one."""
        found = self._held(name)  # not `value`: a message may well be the word None
        if found is not None and not isinstance(found, str):
            raise InputError(f"the column {name!r} holds {type(found).__name__}; text is needed.")
        if found is None or not found.strip():
            raise LeftOut("no text to judge")
        return found

    def name(self, name: str) -> str:
        """A word of the file's own vocabulary, such as a class; empty for nothing."""
        found = self.value(name)
        if found is not None and not isinstance(found, str):
            raise InputError(f"the column {name!r} holds {type(found).__name__}; a name is needed.")
        return (found or "").strip()

    def flag(self, name: str) -> bool:
        """True or false, 1 or 0; raises `LeftOut` where the row has no label."""
        found = self.value(name)
        if found is None:
            raise LeftOut("no label")
        flag = found if isinstance(found, bool) else FLAGS.get(str(found).strip().lower())
        if flag is None:
            raise InputError(f"the column {name!r} is neither 0 nor 1, true nor false.")
        return flag

    def choice(self, name: str, labels: Mapping[str, bool]) -> bool:
        """One of the labels by its name; raises `LeftOut` where the row has no label."""
        if not (found := self.name(name)):
            raise LeftOut("no label")
        if found not in labels:
            raise InputError(f"the column {name!r} is none of {', '.join(labels)}.")
        return labels[found]

    def _held(self, name: str) -> Any:  # noqa: ANN401, any JSON value
        if name not in self.values:
            raise InputError(f"the column {name!r} is missing.")
        return self.values[name]


def read_content(path: Path) -> Content:
    """A file's bytes, unpacked if its name ends as one of `PACKED`; raises `StoreError`."""
    unpack = PACKED.get(path.suffix)
    try:
        packed = path.read_bytes()
        plain = unpack(packed) if unpack else packed
    except (OSError, EOFError, zlib.error, ImportError) as error:
        raise StoreError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return Content(plain, hashlib.sha256(packed).hexdigest())


def _xz(packed: bytes) -> bytes:
    """Every stream of the file; what `lzma.decompress` would pass over behind the first one is an error, as it is in gzip."""
    import lzma  # not every Python has it

    parts: list[bytes] = []
    while packed:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        try:
            parts.append(stream.decompress(packed))
        except lzma.LZMAError as error:
            raise EOFError(str(error)) from error
        if not stream.eof:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        packed = stream.unused_data.lstrip(b"\0")  # streams may be padded
    return b"".join(parts)


PACKED: Mapping[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": _xz}
"""How a file is unpacked, by the end of its name."""


def records(path: Path, plain: bytes) -> Iterator[Record]:
    """The records of a `.csv`, `.jsonl` or `.json` file; raises `InputError` naming the line that is malformed.

    A `.json` file is an array of objects, or an object whose values are such arrays.
    """
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    if kind not in READERS:
        raise InputError(f"{path} is none of {', '.join(READERS)}, packed as {' or '.join(PACKED)} or not; write the set as one of these.")
    try:
        text = plain.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = plain.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: it is not UTF-8.") from error
    yield from READERS[kind](path, text)


def _csv(path: Path, text: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    begins = 1
    try:
        for values in reader:
            begins, line = reader.line_num + 1, begins
            if not columns:
                columns = values
                if len(set(columns)) < len(columns):
                    raise InputError(f"{path}, line {line}: a column stands there twice.")
            elif len(values) != len(columns) and values:
                raise InputError(f"{path}, line {line}: {len(values)} fields instead of the {len(columns)} of the header.")
            elif values:  # an empty line holds none
                yield Record(line, dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {begins}: no CSV record ({error}).") from error


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _object(path, number, _parsed(f"{path}, line {number}", line))


def _json(path: Path, text: str) -> Iterator[Record]:
    whole = _parsed(str(path), text)
    parts = list(whole.values()) if isinstance(whole, dict) else [whole]
    if not all(isinstance(part, list) for part in parts):
        raise InputError(f"{path}: a list of objects is needed, or an object of such lists.")
    for number, value in enumerate((value for part in parts for value in part), 1):
        yield _object(path, number, value)


def _parsed(where: str, text: str) -> Any:  # noqa: ANN401, any JSON value
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        told = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{where}: not valid JSON ({type(error).__name__}{told}).") from error


def _object(path: Path, number: int, value: object) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number}: {type(value).__name__} instead of an object.")
    return Record(number, value)


READERS = {".csv": _csv, ".jsonl": _json_lines, ".json": _json}
