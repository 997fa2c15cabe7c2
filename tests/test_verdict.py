"""The published schema holds for every verdict, and for nothing else."""

from __future__ import annotations

import copy
import json
import re
from importlib import resources
from typing import Any

import pytest
from fakes import make_verdict

import edgeguard

SCHEMA = json.loads(resources.files(edgeguard).joinpath("data/verdict.schema.json").read_text(encoding="utf-8"))
NOTES = {"$schema", "$id", "$defs", "title", "description"}
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
}
RULES = {
    "type": lambda value, want: isinstance(value, TYPES[want]) and (want == "boolean" or not isinstance(value, bool)),
    "enum": lambda value, want: value in want,
    "minimum": lambda value, want: value >= want,
    "maximum": lambda value, want: value <= want,
    "minLength": lambda value, want: len(value) >= want,
    "pattern": lambda value, want: re.search(want, value) is not None,
    "required": lambda value, want: set(want) <= value.keys(),
}


def faults(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """What breaks the schema; knows the keywords that this schema uses and refuses others."""
    found = []
    for keyword, want in schema.items():
        if keyword == "$ref":
            found += faults(value, SCHEMA["$defs"][want.removeprefix("#/$defs/")], where)
        elif keyword == "properties":
            for name in want.keys() & value.keys():
                found += faults(value[name], want[name], f"{where}.{name}")
        elif keyword == "additionalProperties":
            assert want is False
            found += [f"{where}.{name}: not allowed" for name in value.keys() - schema["properties"].keys()]
        elif keyword == "items":
            found += [fault for index, item in enumerate(value) for fault in faults(item, want, f"{where}[{index}]")]
        elif keyword not in NOTES:
            found += [] if RULES[keyword](value, want) else [f"{where}: {keyword}"]
        if found and keyword == "type":
            return found
    return found


def plain(**options: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(make_verdict(**options).to_dict()))
    return result


@pytest.mark.parametrize("options", [
    {"score": 0.0}, {"score": 1.0}, {"score": 0.9, "verdict_only": True},
    {"score": 0.9, "role": "assistant", "warnings": ("look",)},
])
def test_a_verdict_follows_the_schema(options: dict[str, Any]) -> None:
    assert faults(plain(**options), SCHEMA) == []


@pytest.mark.parametrize(("path", "value"), [
    ("verdict", "error"), ("verdict", None), ("score", 1.2), ("score", "0.5"), ("mass", -0.1), ("role", "system"),
    ("raw", "unsafe\nS1, S2"), ("tokens.more", 1), ("passes", -1), ("passes", True), ("windows", 0), ("timings.total", -1),
    ("model.sha256", "xyz"), ("more", 1), ("categories", [{"code": "S1"}]),
    ("categories", [{"code": "9", "slug": "hate", "name": "Hate", "probability": 1, "listed": True}]),
    ("warnings", [1]), ("cache_hit", 1),
])
def test_what_is_no_verdict_breaks_the_schema(path: str, value: Any) -> None:
    broken = copy.deepcopy(plain(score=0.9))
    *folders, name = path.split(".")
    place = broken
    for folder in folders:
        place = place[folder]
    place[name] = value
    assert faults(broken, SCHEMA)


@pytest.mark.parametrize("name", SCHEMA["required"])
def test_every_field_is_required(name: str) -> None:
    lacking = plain(score=0.9)
    del lacking[name]
    assert faults(lacking, SCHEMA) == ["$: required"]


def test_schema_requires_all_that_it_describes() -> None:
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"]) == set(plain())


def test_safe_and_codes_read_the_record() -> None:
    unsafe = make_verdict(0.9)
    assert (unsafe.safe, unsafe.codes) == (False, ("S9",))
    assert (make_verdict(0.1).safe, make_verdict(0.1).codes) == (True, ())


def test_a_verdict_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        make_verdict().verdict = "safe"  # type: ignore[misc]
