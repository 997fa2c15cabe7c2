"""What `edgeguard tune` measured here, and what it chose. Only a preference: a record that is damaged or does not fit is none.

One file for each model, named by the SHA-256 of its artifacts' hashes; inside, the key says on which processor and with
which runtimes it was measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeguard import strict_json
from edgeguard.errors import StoreError
from edgeguard.store.catalogue import cache_folder
from edgeguard.store.files import write_text

FORMAT = 1
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One way to run a model."""

    backend: str
    artifact: str
    """Its digest."""
    threads: int
    prepacked: bool = False
    """Weights are mapped in the form in which the runtime multiplies them."""


@dataclass(frozen=True)
class Candidate:
    """A setting that was looked at."""

    setting: Setting
    title: str
    """Such as `onnx int8, 2 threads`."""
    milliseconds: float | None
    """Of a verdict: the median over the rounds; None where no round was finished."""
    left_out: str = ""
    """Why it could not be chosen, or empty."""


@dataclass(frozen=True)
class Tuned:
    """The setting that was chosen, and why."""

    setting: Setting
    reason: str
    created: str
    """ISO 8601, in UTC."""
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` gives the same record back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuned:
        """From plain values; raises `ValueError`, `TypeError` or `KeyError`."""
        candidates = tuple(Candidate(**{**each, "setting": _setting(each["setting"])}) for each in data["candidates"])
        if not all(isinstance(data[name], str) for name in ("reason", "created")):
            raise TypeError("texts are needed")
        return cls(_setting(data["setting"]), data["reason"], data["created"], candidates)


def tuned_path(artifacts: Sequence[str]) -> Path:
    """Where the record of a model lies, by its artifacts' digests."""
    return cache_folder() / "tuned" / (hashlib.sha256(",".join(sorted(artifacts)).encode()).hexdigest() + ".json")


def read_tuned(path: Path, key: Mapping[str, str]) -> tuple[Tuned | None, str]:
    """The record, or None and why it is not followed; `key` is the machine and its runtimes as they are now."""
    try:
        if not path.is_file():
            return None, "it was never measured here"
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        data = strict_json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["sha256"] != _digest(data["key"], data["tuned"]):
            raise ValueError("damaged, or of another format")
        if changed := sorted(name for name in {*data["key"], *key} if data["key"].get(name) != key.get(name)):
            return None, f"it was measured before something changed ({', '.join(changed)})"
        return Tuned.from_dict(data["tuned"]), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, "the record of its measurement cannot be read"


def write_tuned(path: Path, key: Mapping[str, str], tuned: Tuned) -> None:
    """Keep a record; raises `StoreError`."""
    plain = json.loads(json.dumps(tuned.to_dict()))
    data = {"format": FORMAT, "sha256": _digest(dict(key), plain), "key": dict(key), "tuned": plain}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be made: {error.strerror}. Set EDGEGUARD_HOME.") from error
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _setting(data: Mapping[str, Any]) -> Setting:
    setting = Setting(**data)
    kinds = (str, str, int, bool)
    if [type(value) for value in asdict(setting).values()] != list(kinds) or setting.threads < 1:
        raise TypeError("no setting")
    return setting


def _digest(key: object, tuned: object) -> str:
    return hashlib.sha256(json.dumps([key, tuned], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
