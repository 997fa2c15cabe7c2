"""Rows in the corpus's format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

LICENSE = "Apache-2.0"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(source: str, kind: str, messages: list[dict[str, str]], codes: Iterable[str], quality: str, frame: str) -> Row:
    """A row whose last message is judged; no codes means safe. `kind` and `frame` tell where it comes from."""
    text = json.dumps(messages, ensure_ascii=False)
    categories = sorted(set(codes), key=lambda code: int(code[1:]))
    return {"id": f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", "source": source, "license": LICENSE,
            "role": messages[-1]["role"], "messages": messages, "label": "unsafe" if categories else "safe",
            "categories": categories, "categories_known": True, "quality": quality, "kind": kind, "frame": frame}


def plain(text: str) -> str:
    """Lower case, letters and digits only."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The first of the rows that read the same; raises ValueError where two of them have different labels."""
    seen: dict[str, Row] = {}
    for one in rows:
        key = " / ".join(plain(message["content"]) for message in one["messages"])
        first = seen.setdefault(key, one)
        if first["label"] != one["label"]:
            raise ValueError(f"{first['kind']} and {one['kind']} give the same message with different labels: {first['frame']!r}")
    return list(seen.values())
