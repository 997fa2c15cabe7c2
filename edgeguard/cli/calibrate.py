"""`edgeguard calibrate`: fit a model's scores and its threshold to labelled rows of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.text import Text

from edgeguard import calibration, loading, store
from edgeguard.calibration import Calibration, Wish
from edgeguard.cli.check import BackendName, BackendOption, DeviceOption, ModelOption, ProfileOption, ThreadsOption
from edgeguard.cli.console import facts, line, show, write_json
from edgeguard.errors import InputError, ModelFileError, StoreError
from edgeguard.guard import Guard
from edgeguard.store import Artifact, Model
from edgeguard.verdict import Verdict

if TYPE_CHECKING:
    from edgeguard.bench.rows import Data

RATES = ("f1", "fpr", "recall")
SHOWN = {"threshold": "threshold", "ece": "ECE", "f1": "F1", "fpr": "FPR", "recall": "recall"}
NO_CODES = 1.0
"""A threshold at which hardly any row is unsafe, so that no pass is spent on codes: only scores are needed."""
LEAST_SLOPE = 0.2
"""Of what is stored: below it scores hardly depend on what the model says."""
COLUMN = 30  # characters


def calibrate(
    rows: Annotated[Path | None, typer.Argument(
        metavar="ROWS", help="Labelled rows, .jsonl, .jsonl.gz or .jsonl.xz.", show_default=False)] = None,
    model: ModelOption = None,
    backend: BackendOption = BackendName.AUTO,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    profile: ProfileOption = None,
    fpr: Annotated[float | None, typer.Option("--fpr", help="Choose the threshold for this false positive rate, as 0.02.")] = None,
    recall: Annotated[float | None, typer.Option("--recall", help="Choose the threshold for this recall, as 0.9.")] = None,
    artifact: Annotated[bool, typer.Option("--artifact", help="Write into the artifact's manifest, for those who publish it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print; store nothing.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove the calibration instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object, on one line.")] = False,
) -> None:
    """Fit a model's scores to your own labelled rows, and choose a threshold; later loads of the same weights follow it.

    Example: edgeguard calibrate rows.jsonl --fpr 0.02
    """
    if fpr is not None and recall is not None:
        raise typer.BadParameter("Give --fpr or --recall, not both.")
    if forget == (rows is not None) or (forget and (dry_run or fpr is not None or recall is not None)):
        raise typer.BadParameter("Give either a file of labelled rows, or --forget and the model.")
    wish = Wish("fpr", fpr) if fpr is not None else Wish("recall", recall) if recall is not None else None
    choice = loading.choose(model, backend.value, device)
    place = _Place.of(choice.model, profile, artifact, dry_run)
    if rows is None:
        result = {"calibration": None, "stored": None, "removed": place.forget()}
    else:
        result = measure(choice, rows, wish, device=device, threads=threads, profile=profile)
        if not dry_run:
            _check_use(result)
        result["stored"] = None if dry_run else str(place.keep(Calibration.from_dict(result["calibration"])))
        result["shadowed"] = place.shadowed()
    if as_json:
        write_json(result)
    else:
        show(report(result))


def _check_use(result: dict[str, Any]) -> None:
    """Raises `InputError` for a calibration that would make the guard blind, as wrong labels do."""
    slope, recall = result["calibration"]["slope"], result["after"]["recall"]
    if slope < LEAST_SLOPE or not recall:
        raise InputError(f"The model's scores say little of these labels: slope {slope:.3g}, recall {recall:.3f} on rows that were not "
                         "fitted on. Nothing was stored. Are the labels right? --dry-run shows all numbers.")


@dataclass(frozen=True)
class _Place:
    """Where a calibration is kept: in the user's configuration, or in the artifact's manifest."""

    model: Model
    profile: str
    artifact: bool

    @classmethod
    def of(cls, model: Model, profile: str | None, artifact: bool, dry_run: bool) -> _Place:
        """Before hours of work it is seen that the result can be kept; raises `ModelError` or `StoreError`."""
        if artifact and not isinstance(model, Artifact):
            raise ModelFileError(f"{model.folder} has no manifest to write into. Leave out --artifact, or convert the model.")
        if artifact and not dry_run and not os.access(model.folder, os.W_OK):
            raise StoreError(f"{model.folder} cannot be written. Leave out --artifact, or copy the artifact.")
        if not artifact and not store.digest(model):
            raise ModelFileError(f"{model.name} cannot be told from other models, so that no calibration can be kept for it: only "
                                 "artifacts with a manifest and GGUF files can.")
        if not artifact and not dry_run:
            store.check_calibrations()
        return cls(model, loading.profile_of(model, profile).name, artifact)

    def keep(self, fitted: Calibration) -> Path:
        """Store it; raises `StoreError`, and `ModelFileError` for an artifact that was changed meanwhile."""
        if self.artifact:
            return self._write(fitted)
        return store.write_calibration(store.digest(self.model), self.profile, fitted)

    def forget(self) -> str | None:
        """Remove it: where from, None if there was none."""
        if not self.artifact:
            digest = store.digest(self.model)
            return str(store.calibration_path(digest, self.profile)) if store.forget_calibration(digest, self.profile) else None
        had = isinstance(self.model, Artifact) and self.model.manifest.calibration
        return str(self._write(None)) if had else None

    def _write(self, fitted: Calibration | None) -> Path:
        now = Artifact.read(self.model.folder)
        if store.digest(now) != store.digest(self.model):
            raise ModelFileError(f"{self.model.folder} was changed while its scores were measured; nothing was written.")
        return replace(now.manifest, calibration=fitted).write(now.folder)

    def shadowed(self) -> str | None:
        """Where a calibration of this user's lies that counts before the one in the manifest."""
        path = store.calibration_path(store.digest(self.model), self.profile)
        return str(path) if self.artifact and path.exists() else None


def measure(choice: loading.Choice, rows: Path, wish: Wish | None, *, device: str = "auto", threads: int | None = None,
            profile: str | None = None) -> dict[str, Any]:
    """Judge the rows, fit on all of them, and say how good scores and verdicts are before it and, on held-out folds, after it.

    Before is without the user's calibration. Raises `InputError` for rows that are wrong or too few, and what a load does.
    """
    from edgeguard.bench.rows import read_rows

    data = read_rows(rows)
    unsafe = np.array([row.unsafe for row in data.rows])
    calibration.check_rows(unsafe, wish)
    parts = loading.open_choice(choice, device=device, threads=threads, profile=profile, calibration="artifact")
    with Guard(parts.backend, parts.tokenizer, parts.profile, parts.identity, calibration=parts.calibration) as guard:
        verdicts = _verdicts(guard, data)
    raw, scores = (np.array([getattr(verdict, name) for verdict in verdicts]) for name in ("raw_score", "score"))
    fitted = replace(calibration.calibrate(raw, unsafe, wish), data_sha256=data.sha256, rows=len(unsafe))
    held_scores, held_judged = calibration.held_out(raw, unsafe, wish)
    return {
        "model": vars(parts.identity),
        "data": {"name": data.name, "sha256": data.sha256, "rows": len(unsafe), "unsafe": int(unsafe.sum())},
        "wish": {wish.rate: wish.value} if wish else None,
        "before": {"threshold": parts.calibration.threshold, **_measures(unsafe, scores, scores >= parts.calibration.threshold)},
        "after": {"threshold": fitted.threshold, "folds": calibration.FOLDS, **_measures(unsafe, held_scores, held_judged)},
        "calibration": asdict(fitted),
    }


def _verdicts(guard: Guard, data: Data) -> Sequence[Verdict]:
    from edgeguard.bench.report import progress
    from edgeguard.bench.rows import judge_rows

    with progress("Judging", sum(row.size for row in data.rows)) as advance:
        return judge_rows(guard, data.rows, NO_CODES, lambda row: advance(row.size))


def _measures(unsafe: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], judged: np.ndarray[Any, Any]) -> dict[str, Any]:
    """ECE, counts and rates, with bootstrap intervals."""
    from edgeguard.bench import metrics

    counts = metrics.Counts.of(unsafe, judged)
    rates = {name: attrgetter(name) for name in RATES}
    return {
        "ece": metrics.ece(unsafe, scores), **vars(counts), **{name: rate(counts) for name, rate in rates.items()},
        **{f"{name}_95": metrics.interval(counts, rate) for name, rate in rates.items()},
    }


def report(result: dict[str, Any]) -> list[Text]:
    """What was fitted and what it is worth, for people."""
    fitted = result["calibration"]
    if fitted is None:
        return [line(f"removed {result['removed']}" if result["removed"] else "There was no calibration to remove.")]
    model, data, before, after = (result[name] for name in ("model", "data", "before", "after"))

    pairs = [
        ("model", f"{model['name']} {model['precision']}, {model['backend']} on {model['device']}"),
        ("rows", f"{data['rows']} of {data['name']}, {data['unsafe']} of them unsafe"),
        ("fitted", f"score = sigmoid({fitted['slope']:.4g} * logit(raw_score) {fitted['offset']:+.4g})"),
        ("", f"{'before':<{COLUMN}}after, on rows that were not fitted on ({after['folds']} folds)"),
        *((title, f"{_shown(before, name):<{COLUMN}}{_shown(after, name)}") for name, title in SHOWN.items()),
    ]
    kept = ("  stored  ", "green") if result["stored"] else ("  dry run  ", "yellow")
    shadowed = [line(("  note  ", "yellow"), f"{result['shadowed']} is yours and counts first on this machine; --forget removes it")]
    return [*facts(pairs), line(kept, result["stored"] or "nothing was stored"), *(shadowed if result["shadowed"] else [])]


def _shown(values: dict[str, Any], name: str) -> str:
    """A number with its interval, where it has one."""
    bounds = values.get(f"{name}_95")
    return f"{values[name]:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
