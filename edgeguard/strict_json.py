"""JSON in which every key of an object stands once: two readers of one text must not take different values from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class DuplicateKeyError(ValueError):
    """An object names a key twice."""

    def __init__(self, key: object) -> None:
        self.key = key
        super().__init__(f"the key {str(key)[:40]!r} is given twice")


def loads(text: str, *, parse_int: Callable[[str], Any] | None = None) -> Any:  # noqa: ANN401, any JSON value
    """As `json.loads`; raises `DuplicateKeyError` too, which is a ValueError, but no `json.JSONDecodeError`."""
    return json.loads(text, object_pairs_hook=_once, parse_int=parse_int)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(key)
        found[key] = value
    return found
