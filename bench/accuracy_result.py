"""The result of `edgeguard bench accuracy` as it lies in a file: written, read, and asked for its best threshold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeguard.bench.quality_run import Judged
from edgeguard.bench.report import FORMAT
from edgeguard.bench.result import read_plain
from edgeguard.bench.rows import Data
from edgeguard.errors import InputError
from edgeguard.store import write_text

RESULT = "result.json"
BENCH = "accuracy"


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(folder / RESULT, json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")


def read_accuracy(path: Path) -> dict[str, Any]:
    """A result of `edgeguard bench accuracy` of this format; raises as `read_plain`."""
    found = read_plain(path)
    if found.get("bench") != BENCH:
        raise InputError(f"{path} is no result of edgeguard bench accuracy, but of {found.get('bench')!r}.")
    if found.get("format") != FORMAT or "policy" not in found:
        raise InputError(f"{path} is of another version of edgeguard bench accuracy; repeat the run.")
    return found


def best_threshold(path: Path, data: Data, judged: Judged) -> dict[str, Any]:
    """The threshold with the best F1 on another set, and which that was.

    Raises `InputError` where it was another model, profile, policy or calibration, where it cannot be told which, or the same file.
    """
    other = read_accuracy(path)
    try:
        best, before, model, policy = other["best_f1"], other["data"], other["model"], other["policy"]
        same = {"model": model["sha256"] == judged.model["sha256"] != "", "profile": model["profile"] == judged.model["profile"],
                "policy": policy["sha256"] == judged.policy["sha256"],
                "calibration": [float(other["calibration"][name]) for name in ("slope", "offset")] == judged.scale}
        facts = {name: before[name] for name in ("name", "set", "sha256", "rows")}
        if best is not None:
            facts |= {"f1": float(best["f1"]), "threshold": float(best["threshold"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole result of edgeguard bench accuracy ({type(error).__name__}).") from error
    if differing := sorted(name for name, alike in same.items() if not alike):
        raise InputError(f"{path} is of another {' and '.join(differing)}; its threshold says nothing of this one.")
    if facts["sha256"] == data.sha256:
        raise InputError(f"{path} is of the same file; a threshold has to be chosen on other rows than it is told for.")
    if best is None or not 0 <= facts["threshold"] <= 1:
        raise InputError(f"{path} has no best threshold: it has no unsafe row.")
    return {"threshold": facts.pop("threshold"), "from": facts}
