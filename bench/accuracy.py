"""A guard against labels, and two guards against each other, on the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from rich.table import Table
from rich.text import Text

from edgeguard.bench import metrics
from edgeguard.bench.metrics import Counts, Interval, ratio
from edgeguard.bench.report import NOTHING, caption, number, table
from edgeguard.bench.rows import Data, Row
from edgeguard.verdict import ModelIdentity, Verdict

Judged = Sequence[tuple[Row, Verdict]]
BINS = 10


def accuracy(data: Data, verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """All measures over all rows, by role and by source, with the data and the model that they belong to."""
    judged = list(zip(data.rows, verdicts, strict=True))
    return {
        "data": data_facts(data, seed),
        "model": model_facts(verdicts[0].model),
        "threshold": verdicts[0].threshold,
        "ece_bins": BINS,
        "overall": measures(judged, seed),
        "by_role": _groups(judged, lambda row: row.conversation.role, seed),
        "by_source": _groups(judged, lambda row: row.source, seed),
    }


def measures(judged: Judged, seed: int = 0) -> dict[str, Any]:
    """Every measure of some rows; None where the rows do not define it."""
    unsafe = [row.unsafe for row, _ in judged]
    scores = [verdict.score for _, verdict in judged]
    counts = Counts.of(unsafe, [not verdict.safe for _, verdict in judged])
    return {
        "rows": counts.total, "unsafe": counts.tp + counts.fn, **vars(counts),
        "f1": counts.f1, "f1_95": metrics.interval(counts, lambda drawn: drawn.f1, seed),
        "precision": counts.precision, "recall": counts.recall,
        "fpr": counts.fpr, "fpr_95": metrics.interval(counts, lambda drawn: drawn.fpr, seed),
        "auprc": metrics.auprc(unsafe, scores), "auroc": metrics.auroc(unsafe, scores), "ece": metrics.ece(unsafe, scores, BINS),
        "codes": first_codes(judged),
    }


def first_codes(judged: Judged) -> dict[str, Any]:
    """Is the first category that the model lists one of the row's? Of unsafe rows with known categories, found unsafe.

    Compared by slug, so that guards of every generation can be held against one file. A found row without a category
    (an answer that ended early) counts as wrong.
    """
    known = [(row, verdict) for row, verdict in judged if row.slugs]
    found = [(row, verdict) for row, verdict in known if not verdict.safe]
    right = sum(next((each.slug for each in verdict.categories if each.listed), None) in row.slugs for row, verdict in found)
    return {"rows": len(known), "found": len(found), "right": right, "accuracy": ratio(right, len(found))}


def agreement(data: Data, first: Sequence[Verdict], second: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """How far the second guard's verdicts and scores are from the first's, over all rows and by role."""
    triples = list(zip(data.rows, first, second, strict=True))
    by_role = {
        role: [(one, other) for row, one, other in triples if row.conversation.role == role]
        for role in sorted({row.conversation.role for row in data.rows})
    }
    return {
        "data": data_facts(data, seed),
        "model": model_facts(first[0].model), "other": model_facts(second[0].model),
        "threshold": first[0].threshold,
        "overall": differences([(one, other) for _, one, other in triples]),
        "by_role": {role: differences(pairs) for role, pairs in by_role.items()},
    }


class Said(Protocol):
    """What two guards are compared by; a `Verdict` is one."""

    @property
    def verdict(self) -> str:
        """`safe` or `unsafe`."""
        ...

    @property
    def score(self) -> float:
        """P(unsafe)."""
        ...

    @property
    def codes(self) -> tuple[str, ...]:
        """As listed."""
        ...


def differences(pairs: Sequence[tuple[Said, Said]]) -> dict[str, Any]:
    """Agreement of the second with the first of each pair, flips by direction, drift of the score, codes where both are unsafe."""
    turns = Counter((one.verdict, other.verdict) for one, other in pairs)
    drift = np.array([other.score - one.score for one, other in pairs])
    both = [(one, other) for one, other in pairs if one.verdict == other.verdict == "unsafe"]
    alike = sum(one.codes == other.codes for one, other in both)
    return {
        "rows": len(pairs), "agreement": ratio(turns["safe", "safe"] + turns["unsafe", "unsafe"], len(pairs)),
        "unsafe_to_safe": turns["unsafe", "safe"], "safe_to_unsafe": turns["safe", "unsafe"],
        "drift": float(np.abs(drift).mean()), "drift_signed": float(drift.mean()), "drift_max": float(np.abs(drift).max()),
        "both_unsafe": len(both), "same_codes": alike,
    }


def data_facts(data: Data, seed: int) -> dict[str, Any]:
    """Which rows were judged."""
    return {"name": data.name, "sha256": data.sha256, "rows": len(data.rows), "of": data.total, "seed": seed}


def model_facts(model: ModelIdentity) -> dict[str, Any]:
    """Which model judged them, and on what."""
    return dict(vars(model))


def accuracy_table(result: dict[str, Any]) -> Table:
    """For people: a line for all rows, each role and each source."""
    data = result["data"]
    shown = table(f"{_model_title(result['model'])}, threshold {result['threshold']:g}, on {data['name']}",
                  f"{data['rows']} of {data['of']} rows; in brackets 95% bootstrap intervals.\n{caption(result)}",
                  ("rows judged", "n", "unsafe", "F1", "prec.", "recall", "FPR", "AUPRC", "AUROC", "ECE", "first code"))
    for title, group in (("all", {"": result["overall"]}), ("role", result["by_role"]), ("source", result["by_source"])):
        for name, values in group.items():
            shown.add_row(Text(f"{title} {name}".strip()), *_cells(values))  # a name is no markup
        shown.add_section()
    return shown


def agreement_table(result: dict[str, Any]) -> Table:
    """For people: one line for all rows and one for each role."""
    data = result["data"]
    shown = table(f"{_model_title(result['model'])}, then {_model_title(result['other'])}, on {data['name']}",
                  f"{data['rows']} of {data['of']} rows, threshold {result['threshold']:g}.\n{caption(result)}",
                  ("rows judged", "n", "verdict alike", "to safe", "to unsafe", "mean drift", "signed", "largest", "codes alike"))
    for name, values in {"all": result["overall"], **result["by_role"]}.items():
        shown.add_row(
            name, str(values["rows"]), f"{values['agreement']:.2%}", str(values["unsafe_to_safe"]), str(values["safe_to_unsafe"]),
            number(values["drift"], 4), f"{values['drift_signed']:+.4f}", number(values["drift_max"], 4),
            f"{values['same_codes']} of {values['both_unsafe']}",
        )
    return shown


def _groups(judged: Judged, key: Callable[[Row], str], seed: int) -> dict[str, Any]:
    names = sorted({key(row) for row, _ in judged})
    return {name: measures([(row, verdict) for row, verdict in judged if key(row) == name], seed) for name in names}


def _cells(values: dict[str, Any]) -> list[str]:
    codes = values["codes"]
    return [
        str(values["rows"]), str(values["unsafe"]),
        _with_interval(values["f1"], values["f1_95"]), number(values["precision"]), number(values["recall"]),
        _with_interval(values["fpr"], values["fpr_95"]), number(values["auprc"]), number(values["auroc"]), number(values["ece"]),
        NOTHING if codes["accuracy"] is None else f"{codes['right']} of {codes['found']}",
    ]


def _with_interval(value: float | None, bounds: Interval | None) -> str:
    return number(value) if bounds is None else f"{number(value)} ({bounds[0]:.2f}-{bounds[1]:.2f})"


def _model_title(model: dict[str, Any]) -> str:
    return f"{model['name']} {model['precision']} on {model['backend']} ({model['device']})"
