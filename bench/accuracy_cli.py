"""`edgeguard bench accuracy` and `agreement`: verdicts against labels, and two artifacts against each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard.bench import accuracy as quality
from edgeguard.bench import report, sets
from edgeguard.bench.accuracy_result import RESULT, best_threshold, write_result
from edgeguard.bench.accuracy_table import accuracy_table, agreement_table
from edgeguard.bench.quality_run import Answer, Judged, Kept, judge, run_key
from edgeguard.bench.rows import OWN, Data, judge_rows, read_rows
from edgeguard.calibration import Whose
from edgeguard.cli.check import BackendName, BackendOption, DeviceOption, ModelOption, ThreadsOption
from edgeguard.cli.console import write
from edgeguard.cli.inputs import PolicyOption
from edgeguard.errors import InputError
from edgeguard.guard import Guard
from edgeguard.store.files import locked
from edgeguard.verdict import Verdict

File = Annotated[Path, typer.Argument(help="Labelled rows; .csv, .jsonl or .json, or one of them as .gz or .xz.", show_default=False)]
Rows = Annotated[Path, typer.Argument(help="Labelled rows, .jsonl, .jsonl.gz or .jsonl.xz.", show_default=False)]
Profile = Annotated[str | None, typer.Option(help="Which guard model it is, for files that do not say it.")]
Threshold = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Unsafe from this score on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Judge this many rows, drawn at random.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is random.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the JSON line here, not to standard output.")]


def accuracy(
    file: File,
    *,
    set_: Annotated[str, typer.Option("--set", help=f"What the file is: {', '.join((OWN, *sets.SETS))}.")] = OWN,
    model: ModelOption = None,
    backend: BackendOption = BackendName.AUTO,
    profile: Profile = None,
    policy: PolicyOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    calibration: Annotated[Whose, typer.Option(help="Whose scores and default threshold.")] = "artifact",
    threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Measure at this threshold too, not only the default.")] = None,
    threshold_from: Annotated[Path | None, typer.Option(
        help="Measure at the threshold of the best F1 on another set too: that run's result.json.", show_default=False)] = None,
    limit: Limit = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; one that was begun is gone on with.", show_default=False)] = None,
) -> None:
    """Hold a model's verdicts against the labels of a set."""
    if threshold is not None and threshold_from is not None:
        raise InputError("Give --threshold or --threshold-from, not both.")
    data = sets.load(file, set_).sample(limit, seed)
    load: dict[str, Any] = {"backend": backend.value, "profile": profile, "policy": policy, "device": device, "threads": threads}
    result = {"bench": "accuracy", **report.circumstances()}
    held = locked(out / ".lock", 0, f"the run in {out}") if out else nullcontext()
    with held, Guard.load(model, **load, calibration=calibration) as guard:
        judged = Judged.by(guard)
        chosen = _chosen(threshold, threshold_from, data, judged)
        answers = _answers(guard, data, judged, min(judged.threshold, chosen["threshold"] if chosen else 1.0), out)
        result |= quality.accuracy(data, answers, judged, chosen, seed)
        result["data"]["path"] = file.as_posix()
        if out:
            write_result(out, result)
    if out:
        report.show([accuracy_table(result)])
        write(f"Written to {out / RESULT}; as a page: edgeguard bench report {out / RESULT}")
    else:
        report.emit(result, [accuracy_table(result)], None)


def agreement(
    file: Rows,
    *,
    model: ModelOption = None,
    other: Annotated[str | None, typer.Option(help="Name or path of the second; the same model by default.")] = None,
    backend: BackendOption = BackendName.AUTO,
    other_backend: Annotated[BackendName, typer.Option(help="What runs the second.")] = BackendName.AUTO,
    profile: Profile = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    threshold: Threshold = None,
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare the verdicts and scores of two artifacts, or of one on two backends."""
    _writable(json)
    if other is None and backend == other_backend:
        raise InputError("There is nothing to compare: give --other, or different --backend and --other-backend.")
    data = read_rows(file).sample(limit, seed)
    result = {"bench": "agreement", **report.circumstances()}
    load = {"profile": profile, "device": device, "threads": threads}
    first = _judge(data, model, threshold, {**load, "backend": backend.value})
    second = _judge(data, other or model, threshold, {**load, "backend": other_backend.value})
    result |= quality.agreement(data, first, second, seed)
    report.emit(result, [agreement_table(result)], json)


def _chosen(threshold: float | None, source: Path | None, data: Data, judged: Judged) -> dict[str, Any] | None:
    """The threshold that is measured besides the default, and where it is from."""
    if source is not None:
        return best_threshold(source, data, judged)
    return None if threshold is None else {"threshold": threshold, "from": "given"}


def _answers(guard: Guard, data: Data, judged: Judged, threshold: float, out: Path | None) -> Sequence[Answer]:
    """Those of the folder, and the guard's for the rows that lack; kept there as they come."""
    kept = Kept(out, run_key(data, judged, threshold)) if out else None
    found = kept.read(judged.policy["slugs"]) if kept else {}
    missing = [row for row in data.rows if row.line not in found]
    with report.progress("Judging", sum(row.size for row in missing)) as advance:
        new = judge(guard, missing, threshold, lambda row: advance(row.size), kept.add if kept else None)
    found |= {answer.line: answer for answer in new}
    return [found[row.line] for row in data.rows]


def _judge(data: Data, model: str | None, threshold: float | None, load: dict[str, Any]) -> Sequence[Verdict]:
    size = sum(row.size for row in data.rows)
    with Guard.load(model, **load, calibration="artifact") as guard, report.progress("Judging", size) as advance:
        return judge_rows(guard, data.rows, threshold, lambda row: advance(row.size))


def _writable(path: Path | None) -> None:
    """Before hours of work, not after."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; the result cannot be written there.")
