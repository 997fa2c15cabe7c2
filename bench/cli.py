"""`edgeguard bench`: speed, accuracy, agreement. Tables for people, one line of JSON for programs, progress on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard.bench import accuracy as quality
from edgeguard.bench import report, result_commands
from edgeguard.bench.gpu_check import gpu
from edgeguard.bench.peers_cli import peers
from edgeguard.bench.rows import Data, Row, judge_rows, read_rows
from edgeguard.bench.speed_cli import speed
from edgeguard.bench.synthesize_cli import synthesize
from edgeguard.cli.check import BackendName, BackendOption, DeviceOption, ModelOption, ThreadsOption
from edgeguard.errors import InputError
from edgeguard.guard import Guard
from edgeguard.verdict import Verdict

app = typer.Typer(help="Measure speed and quality on this machine.", add_completion=False,
                  context_settings={"help_option_names": ["-h", "--help"]})

File = Annotated[Path, typer.Argument(help="Labelled rows, .jsonl or .jsonl.gz.", show_default=False)]
Profile = Annotated[str | None, typer.Option(help="Which guard model it is, for files that do not say it.")]
Threshold = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Unsafe from this score on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Judge this many rows, drawn at random.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is random.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the JSON line here, not to standard output.")]


app.command()(speed)
app.command()(synthesize)
app.command()(peers)
for command in (result_commands.report, result_commands.compare, result_commands.picture, gpu):
    app.command()(command)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure speed and quality on this machine."""
    if context.invoked_subcommand is None:
        raise typer.BadParameter("A command is needed; edgeguard bench --help names them.", ctx=context)


@app.command()
def accuracy(
    file: File,
    *,
    model: ModelOption = None,
    backend: BackendOption = BackendName.AUTO,
    profile: Profile = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    threshold: Threshold = None,
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Hold a model's verdicts against labels."""
    _writable(json)
    data = read_rows(file).sample(limit, seed)
    result = {"bench": "accuracy", **report.circumstances()}
    load = {"backend": backend.value, "profile": profile, "device": device, "threads": threads}
    result |= quality.accuracy(data, _judge(data, model, threshold, load), seed)
    report.emit(result, [quality.accuracy_table(result)], json)


@app.command()
def agreement(
    file: File,
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
    report.emit(result, [quality.agreement_table(result)], json)


def _judge(data: Data, model: str | None, threshold: float | None, load: dict[str, Any]) -> Sequence[Verdict]:
    with Guard.load(model, **load) as guard, report.progress("Judging", sum(row.size for row in data.rows)) as advance:
        def done(row: Row) -> None:
            advance(row.size)

        return judge_rows(guard, data.rows, threshold, done)


def _writable(path: Path | None) -> None:
    """Before hours of work, not after."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; the result cannot be written there.")
