"""The verdicts of a set, judged in chunks and kept in a folder, so that a run that was ended goes on where it was. Knows no measures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeguard import __version__
from edgeguard.bench.report import FORMAT
from edgeguard.bench.rows import Data, Row, judge_rows
from edgeguard.errors import InputError, StoreError
from edgeguard.guard import Guard
from edgeguard.policy import Policy
from edgeguard.store import write_text

CHUNK = 32
"""Rows that are judged again at most when a run goes on; two packs of `check_many`."""
KEY, VERDICTS = "run.json", "verdicts.jsonl"


@dataclass(frozen=True)
class Answer:
    """What the guard said of one row; no text."""

    line: int
    score: float
    raw_score: float
    """Before calibration."""
    codes: tuple[str, ...]
    """As listed; empty below the threshold of the run."""


@dataclass(frozen=True)
class Judged:
    """The guard as it was loaded, as far as verdicts depend on it."""

    model: Mapping[str, Any]
    policy: Mapping[str, Any]
    """Its name, the SHA-256 of its categories, and their slugs by code."""
    calibration: Mapping[str, Any]

    @classmethod
    def by(cls, guard: Guard) -> Judged:
        """What a loaded guard tells of itself."""
        return cls(asdict(guard.identity), policy_facts(guard.policy), asdict(guard.calibration))

    @property
    def threshold(self) -> float:
        """The default."""
        return float(self.calibration["threshold"])

    @property
    def scale(self) -> list[float]:
        """What makes scores comparable: slope and offset of the calibration."""
        return [float(self.calibration["slope"]), float(self.calibration["offset"])]


def policy_facts(policy: Policy) -> dict[str, Any]:
    """What a policy was, without its wording."""
    wording = json.dumps([asdict(category) for category in policy.categories], sort_keys=True)
    return {"name": policy.name, "sha256": hashlib.sha256(wording.encode()).hexdigest(),
            "slugs": {category.code: category.slug for category in policy.categories}}


def run_key(data: Data, judged: Judged, threshold: float) -> dict[str, Any]:
    """What must be alike for verdicts to belong to one run; which rows were drawn is not among it."""
    return {"bench": "accuracy", "format": FORMAT, "edgeguard": __version__, "data": data.sha256, "set": data.set,
            "model": dict(judged.model), "policy": judged.policy["sha256"], "calibration": judged.scale, "threshold": threshold}


class Kept:
    """The verdicts of a run in its folder: `run.json` says which run, `verdicts.jsonl` has a line for each row that was judged."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Take the folder; raises `InputError` when it holds another run, or verdicts of a model that cannot be told from others."""
        self.path = folder / VERDICTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made: {error.strerror}.") from error
        if (folder / KEY).exists():
            _check_same(folder, key)
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} holds other files than a run's; give --out a new folder.")
        else:
            write_text(folder / KEY, json.dumps(key, indent=1, sort_keys=True) + "\n")

    def read(self, codes: Collection[str]) -> dict[int, Answer]:
        """All whole lines by the rows' lines; a line that was cut off by a kill is dropped, and its row judged again.

        `codes` are those that answers can have. Raises `InputError` for lines that no run of this model wrote.
        """
        try:
            held = self.path.read_bytes() if self.path.exists() else b""
            whole = held[: held.rfind(b"\n") + 1]
            if whole != held:
                os.truncate(self.path, len(whole))
            answers = [_answer(json.loads(line), codes) for line in whole.splitlines()]
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path} is damaged ({type(error).__name__}); give --out a new folder.") from error
        return {answer.line: answer for answer in answers}

    def add(self, answers: Sequence[Answer]) -> None:
        """Written in one piece, and on the disk when this returns."""
        text = "".join(json.dumps(asdict(answer), allow_nan=False) + "\n" for answer in answers)
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}.") from error


def judge(guard: Guard, rows: Sequence[Row], threshold: float, done: Callable[[Row], object],
          keep: Callable[[Sequence[Answer]], object] | None = None) -> list[Answer]:
    """An answer for each row, in the rows' order; `keep` gets those of each chunk as soon as they are there.

    By role and from the longest on, as `judge_rows`, so that what is too long shows at once.
    """
    order = sorted(rows, key=lambda row: (row.conversation.role != "user", -row.size))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), CHUNK):
        chunk = order[start: start + CHUNK]
        verdicts = judge_rows(guard, chunk, threshold, done)
        answers = [Answer(row.line, verdict.score, verdict.raw_score, verdict.codes) for row, verdict in zip(chunk, verdicts, strict=True)]
        if keep:
            keep(answers)
        found |= {answer.line: answer for answer in answers}
    return [found[row.line] for row in rows]


def _answer(plain: Mapping[str, Any], codes: Collection[str]) -> Answer:
    """Raises `KeyError`, `TypeError` or `ValueError` for anything else than a line that `Kept` wrote."""
    line, score, raw = plain["line"], float(plain["score"]), float(plain["raw_score"])
    if type(line) is not int or not (0 <= score <= 1 and 0 <= raw <= 1):
        raise ValueError("no line or no score")
    if not set(plain["codes"]) <= set(codes):
        raise ValueError("codes of another model")
    return Answer(line, score, raw, tuple(plain["codes"]))


def _check_same(folder: Path, key: Mapping[str, Any]) -> None:
    try:
        held = json.loads((folder / KEY).read_text("utf-8"))
        differing = sorted(name for name in {*held, *key} if held.get(name) != key.get(name))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / KEY} cannot be read ({type(error).__name__}); give --out a new folder.") from error
    if differing:
        raise InputError(f"{folder} holds another run ({', '.join(differing)} differ); give --out a new folder.")
    if not key["model"]["sha256"]:
        raise InputError(f"{folder} holds a run of a model without a hash, which cannot be told from others; give --out a new folder.")
