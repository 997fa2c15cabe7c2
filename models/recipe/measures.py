"""What is told of a training: the measures of scored rows, of all and by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeguard.bench.metrics import Counts, auprc, ece

Row = Mapping[str, Any]
SCORES = "held.jsonl.gz"
"""Where a training leaves the scored validation rows, in its folder."""


def measures(found: Sequence[Row]) -> dict[str, float]:
    """Rows, F1, recall and false positive rate at 0.5, AUPRC, ECE of rows with `label` and `score`; what they do not define is left out."""
    unsafe = [row["label"] == "unsafe" for row in found]
    scores = [row["score"] for row in found]
    counts = Counts.of(unsafe, [score >= 0.5 for score in scores])
    values = {"f1": counts.f1 if any(unsafe) else None, "recall": counts.recall, "fpr": counts.fpr,
              "auprc": auprc(unsafe, scores) if any(unsafe) else None, "ece": ece(unsafe, scores)}
    return {"rows": len(found), **{name: round(value, 4) for name, value in values.items() if value is not None}}


def by_source(found: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The measures of all rows and of each source."""
    groups: dict[str, list[Row]] = {"all": list(found)}
    for row in found:
        groups.setdefault(row["source"], []).append(row)
    return {name: measures(group) for name, group in groups.items()}
