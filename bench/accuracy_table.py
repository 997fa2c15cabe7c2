"""Results of accuracy and agreement as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from edgeguard.bench.metrics import Interval
from edgeguard.bench.report import NOTHING, caption, number, table
from edgeguard.cli.console import CONTROL

HEADINGS = ("rows judged", "n", "unsafe", "F1", "prec.", "recall", "FPR", "AUPRC", "AUROC", "ECE", "first code")


def accuracy_table(result: dict[str, Any]) -> Table:
    """A line for all rows, each role and each source; at a threshold that was chosen elsewhere, one for all rows and each role."""
    data, chosen = result["data"], result.get("chosen")
    left_out = "".join(f" Left out: {len(lines)} ({reason})." for reason, lines in data["left_out"].items())
    shown = table(f"{model_title(result['model'])}, threshold {result['threshold']:g}, on {data['name']}",
                  f"{data['rows']} of {data['of']} rows; in brackets 95% bootstrap intervals.{left_out}\n{caption(result)}", HEADINGS)
    groups = [("all", {"": result["overall"]}), ("role", result["by_role"])]
    if chosen:
        at = f"at {chosen['threshold']:.3g},"
        groups += [(f"{at} all", {"": chosen["overall"]}), (f"{at} role", chosen["by_role"])]
    for title, group in (*groups, ("source", result["by_source"])):
        for name, values in group.items():
            shown.add_row(Text(CONTROL.sub("\ufffd", f"{title} {name}".strip())), *_cells(values))  # a name is no markup
        shown.add_section()
    return shown


def agreement_table(result: dict[str, Any]) -> Table:
    """One line for all rows and one for each role."""
    data = result["data"]
    shown = table(f"{model_title(result['model'])}, then {model_title(result['other'])}, on {data['name']}",
                  f"{data['rows']} of {data['of']} rows, threshold {result['threshold']:g}.\n{caption(result)}",
                  ("rows judged", "n", "verdict alike", "to safe", "to unsafe", "mean drift", "signed", "largest", "codes alike"))
    for name, values in {"all": result["overall"], **result["by_role"]}.items():
        shown.add_row(
            name, str(values["rows"]), f"{values['agreement']:.2%}", str(values["unsafe_to_safe"]), str(values["safe_to_unsafe"]),
            number(values["drift"], 4), f"{values['drift_signed']:+.4f}", number(values["drift_max"], 4),
            f"{values['same_codes']} of {values['both_unsafe']}",
        )
    return shown


def with_interval(value: float | None, bounds: Interval | None) -> str:
    """A measure, with its interval in brackets where there is one."""
    return number(value) if bounds is None else f"{number(value)} ({bounds[0]:.2f}-{bounds[1]:.2f})"


def model_title(model: dict[str, Any]) -> str:
    """Name, precision and what it ran on."""
    return f"{model['name']} {model['precision']} on {model['backend']} ({model['device']})"


def _cells(values: dict[str, Any]) -> list[str]:
    codes = values["codes"]
    return [
        str(values["rows"]), str(values["unsafe"]),
        with_interval(values["f1"], values["f1_95"]), number(values["precision"]), number(values["recall"]),
        with_interval(values["fpr"], values["fpr_95"]), *(number(values.get(name)) for name in ("auprc", "auroc", "ece")),
        NOTHING if codes["accuracy"] is None else f"{codes['right']} of {codes['found']}",
    ]
