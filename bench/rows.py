"""Labelled conversations from a JSONL file, and a guard's verdicts on them; a row that is wrong ends the run, named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeguard import strict_json
from edgeguard.bench.row_files import read_content
from edgeguard.conversation import Conversation, Message
from edgeguard.errors import EdgeGuardError, InferenceError, InputError
from edgeguard.taxonomy import LLAMA_GUARD_2
from edgeguard.verdict import Verdict

SLUGS = {category.code: category.slug for category in LLAMA_GUARD_2}
"""The files' codes are Llama Guard 2's; slugs compare them with any generation's."""
OWN = "rows"
"""Name of the corpus's own format."""


@dataclass(frozen=True)
class Row:
    """One labelled conversation."""

    line: int
    """In its file, from 1."""
    conversation: Conversation
    unsafe: bool
    slugs: frozenset[str]
    """Of its categories; empty when safe or not known."""
    source: str

    @property
    def size(self) -> int:
        """Characters of all messages."""
        return sum(len(message.content) for message in self.conversation.messages)


@dataclass(frozen=True)
class Data:
    """The rows of a file, and which file that was."""

    rows: tuple[Row, ...]
    name: str
    sha256: str
    """Of the file as it is, packed or not."""
    total: int
    """Rows of the file that can be judged, those left out by a limit included."""
    set: str = OWN
    """How the file was read, a name of `sets.SETS`."""
    left_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Lines that the set's rule does not judge, by the reason."""
    uncoded: Mapping[str, int] = field(default_factory=dict)
    """Classes that the set names and that no code stands for, with the number of their rows."""

    def sample(self, limit: int | None, seed: int = 0) -> Data:
        """At most `limit` rows, drawn by `seed`, in the file's order."""
        if limit is None or limit >= len(self.rows):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.rows))[:limit])
        return replace(self, rows=tuple(self.rows[index] for index in chosen))


def read_rows(path: Path) -> Data:
    """Every row of a `.jsonl` file, packed as `row_files.PACKED` or not.

    A row has `messages`, `role`, `label`, `categories`, `categories_known` and `source`; other fields are let be.
    Raises `StoreError` for an unreadable file and `InputError` naming the first line that is wrong.
    """
    plain, digest = read_content(path)
    rows = tuple(_row(number, line, f"{path}, line {number}") for number, line in enumerate(plain.splitlines(), 1))
    if not rows:
        raise InputError(f"{path} holds no rows.")
    return Data(rows, path.name, digest, len(rows))


def _row(number: int, line: bytes, where: str) -> Row:
    try:
        data = strict_json.loads(line.decode("utf-8"))
        if not isinstance(data, dict):
            raise InputError("it is not a JSON object.")
        return _checked(number, data)
    except (ValueError, RecursionError) as error:  # InputError is a ValueError, and so is what json and UTF-8 raise
        reason = error if isinstance(error, InputError) else _reason(error)
        raise InputError(f"{where}: {reason}") from error


def _reason(error: Exception) -> str:
    """Why a line is no JSON object, without what stands in it."""
    if isinstance(error, strict_json.DuplicateKeyError):
        return "it names a key twice."
    return "it is not UTF-8." if isinstance(error, UnicodeDecodeError) else "it is not a JSON object; other formats are read with --set."


def _checked(number: int, data: Mapping[str, Any]) -> Row:
    if missing := {"messages", "role", "label", "categories", "categories_known", "source"} - data.keys():
        raise InputError(f"lacks {', '.join(sorted(missing))}.")
    label, codes, known = data["label"], data["categories"], data["categories_known"]
    if label not in ("safe", "unsafe"):
        raise InputError("label is neither 'safe' nor 'unsafe'.")
    if not isinstance(known, bool):
        raise InputError("categories_known is neither true nor false.")
    if not isinstance(codes, list) or any(not isinstance(code, str) or code not in SLUGS for code in codes):
        raise InputError(f"categories is no list of codes from {', '.join(SLUGS)}.")
    if bool(codes) != (label == "unsafe" and known):
        raise InputError(f"label {label!r}, categories_known {known} and {len(codes)} categories contradict each other.")
    if not isinstance(data["source"], str) or not data["source"]:
        raise InputError("source is no name.")
    if data["role"] is None or isinstance(data["messages"], str):
        raise InputError("role must be a name and messages a list.")
    conversation = Conversation.of(data["messages"], data["role"])
    return Row(number, conversation, label == "unsafe", frozenset(SLUGS[code] for code in codes), data["source"])


class Judge(Protocol):
    """The part of a guard that is measured here."""

    def check_many(self, items: Iterable[Sequence[Message]], role: str | None = None,
                   threshold: float | None = None) -> Iterator[Verdict]:
        """Verdicts in order."""
        ...


def judge_rows(guard: Judge, rows: Sequence[Row], threshold: float | None = None,
               done: Callable[[Row], object] | None = None) -> list[Verdict]:
    """A verdict for each row, in the rows' order; raises `InputError` or `InferenceError` naming the line that cannot be judged.

    They are judged by role and from the longest on: what is too long for the model shows at once, and packed rows are alike.
    """
    verdicts: dict[int, Verdict] = {}
    for role in ("user", "assistant"):
        order = sorted((index for index, row in enumerate(rows) if row.conversation.role == role),
                       key=lambda index: rows[index].size, reverse=True)
        judged = guard.check_many([rows[index].conversation.messages for index in order], role, threshold)
        for index in order:
            try:
                verdicts[index] = next(judged)
            except InputError as error:
                raise InputError(f"line {rows[index].line} cannot be judged: {error}") from error
            except EdgeGuardError as error:
                raise InferenceError(f"line {rows[index].line}, or a row in its pass, cannot be judged: {error}") from error
            if done:
                done(rows[index])
    return [verdicts[index] for index in range(len(rows))]
