"""A bench result as it lies in a file: read, checked, and put into words. Knows no charts and no measuring."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard.bench.cells import Cell
from edgeguard.bench.metrics import quartiles
from edgeguard.bench.report import FORMAT
from edgeguard.errors import InputError, StoreError
from edgeguard.strict_json import loads

KINDS = ("speed", "gpu")
MOST_BYTES = 64 << 20
RATES = ("GMAC/s", "GB/s", "share", "messages/s", "tokens/s")
"""Units of which more is better; of all others less is."""
STEPS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def spread(cell: Cell) -> tuple[float, float]:
    """First and third quartile of a measured cell."""
    low, _, high = quartiles(cell.samples)
    return low, high


def ours(cell: Cell) -> bool:
    """One of edgeguard's own paths."""
    return cell.contender.startswith("edgeguard")


def shown(cell: Cell) -> str:
    """The median with its unit, for people."""
    return "not measured" if cell.p50 is None else figure(cell.p50, cell.unit)


def more_is_better(cell: Cell) -> bool:
    """Its unit is that of a rate, not of a cost."""
    return cell.unit in RATES


def agreement(cells: Sequence[Cell], cell: Cell) -> Cell | None:
    """The fidelity cell that belongs to a speed: of the same contender, or of the same precision on the same runtime's kernels."""
    def key(each: Cell) -> tuple[object, ...]:
        return each.facts.get("precision"), str(each.facts.get("runtime") or "").split(" ")[0]

    fidelity = [each for each in cells if each.group == "fidelity" and each.measured]
    same = [each for each in fidelity if each.contender == cell.contender]
    alike = [each for each in fidelity if all(key(each)) and key(each) == key(cell)]
    return next(iter([*same, *alike]), None)


def why_not(cell: Cell) -> str:
    """Why there is no number; empty if there is one."""
    return "" if cell.measured else cell.reason or "no reason was recorded"


@dataclass(frozen=True)
class Target:
    """What was wanted, and what came out."""

    what: str
    wanted: str
    got: float | None
    met: bool | None
    """None where it was not measured."""
    cells: tuple[str, ...]
    """Ids of the cells that it was computed from."""
    note: str


@dataclass(frozen=True)
class Result:
    """A whole run."""

    bench: str
    suite: str
    created: str
    edgeguard: str
    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    cost: Mapping[str, Any]
    """Assumptions of the cost: `watts`, `price`, `hosted`; empty where none was computed."""

    def group(self, name: str) -> list[Cell]:
        """Its cells, in the order of the file."""
        return [cell for cell in self.cells if cell.group == name]


def read_plain(path: Path) -> dict[str, Any]:
    """Any result of the bench as plain values; raises `StoreError` for a file that cannot be read, `InputError` for what is no result."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} is larger than any result of the bench.")
        text = path.read_text("utf-8")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no result of the bench: it is not UTF-8.") from error
    try:
        found = loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no result of the bench: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no result of the bench: it is not a JSON object.")
    return found


def read_result(path: Path) -> Result:
    """The result in a file, of cells; raises as `read_plain`, and `InputError` for results of another kind or format."""
    data = read_plain(path)
    try:
        return _result(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is no result of the bench: {told}.") from error


def _result(data: Mapping[str, Any]) -> Result:
    if data["bench"] not in KINDS:
        raise ValueError(f"it is of the bench {data['bench']!r}; results of {' and '.join(KINDS)} with cells can be shown")
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, this edgeguard reads {FORMAT}; repeat the run")
    if "cells" not in data:
        raise ValueError("it has no cells; make it with: edgeguard bench speed --suite short --out FOLDER")
    _check_finite(data)
    cells = tuple(_cell(each) for each in data["cells"])
    ids = [cell.id for cell in cells]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"the cell {twice[0]!r} is there twice")
    targets = tuple(_target(each) for each in data.get("targets", ()))
    return Result(data["bench"], str(data["suite"]), str(data["created"]), str(data["edgeguard"]),
                  dict(data["machine"]), dict(data["model"]), cells, targets, dict(data.get("cost") or {}))


def _cell(data: Mapping[str, Any]) -> Cell:
    cell = Cell.from_dict({"params": {}, "facts": {}, "extra": {}, "reason": None, **data})
    if not all(isinstance(each, str) for each in (cell.id, cell.group, cell.contender, cell.unit)):
        raise TypeError(f"the cell {cell.id!r} has no proper id, group, contender or unit")
    if not all(isinstance(each, Mapping) for each in (cell.params, cell.facts, cell.extra)):
        raise TypeError(f"params, facts or extra of the cell {cell.id!r} are no objects")
    if not all(map(_is_number, cell.samples)):
        raise TypeError(f"the cell {cell.id!r} has samples that are no numbers")
    told = data.get("p50")
    same = isinstance(told, (int, float)) and cell.p50 is not None and math.isclose(told, cell.p50)
    if data["measured"] is not cell.measured or (cell.measured and not same):
        raise ValueError(f"the median of the cell {cell.id!r} is not that of its samples")
    return cell


def _target(data: Mapping[str, Any]) -> Target:
    got, met = data.get("got"), data.get("met")
    if not (got is None or _is_number(got)) or met not in (True, False, None):
        raise TypeError(f"the target {str(data['what'])!r} has no number or no verdict")
    return Target(str(data["what"]), str(data["wanted"]), got, met, tuple(map(str, data.get("from") or ())), str(data.get("note") or ""))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_finite(value: object) -> None:
    """NaN and infinity are no results, wherever they stand."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _check_finite(each)


def figure(value: float, unit: str = "") -> str:
    """A number with its unit for people, three significant digits: `24.5 s`, `2.50 ms`, `4.92 GB`, `99.5%`."""
    if unit == "s" and value:
        value, unit = (value * 1e6, "µs") if abs(value) < 1e-3 else (value * 1e3, "ms") if abs(value) < 1 else (value, unit)
    if unit == "B":
        unit, size = next(((name, size) for name, size in STEPS if abs(value) >= size), ("B", 1.0))
        value /= size
    if unit == "share":
        return f"{value * 100:.2f}".rstrip("0").rstrip(".") + "%"
    digits = f"{value:,.0f}" if abs(value) >= 99.95 or not value else f"{value:#.3g}"
    return f"{digits} {unit}".rstrip()


def words(value: object) -> str:
    """Any value of facts, params or extra for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(each)}" for key, each in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        counts = Counter(words(each) for each in value)
        return ", ".join(each if count == 1 else f"{count} x {each!r}" for each, count in counts.items()) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def pairs(values: Mapping[str, Any]) -> str:
    """Facts in one line: `runtime onnxruntime 1.32.0; threads 2`."""
    return "; ".join(f"{name.replace('_', ' ')} {size_or_words(name, value)}" for name, value in values.items() if value not in (None, ""))


def size_or_words(name: str, value: object) -> str:
    """Bytes as sizes, everything else in words."""
    sized = name in ("bytes", "resident", "anonymous", "peak", "weights") or name.endswith("_bytes")
    return figure(float(value), "B") if sized and isinstance(value, (int, float)) else words(value)
