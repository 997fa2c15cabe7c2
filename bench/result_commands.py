"""What can be done with a result: `edgeguard bench report`, `compare`, `picture`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.bench import accuracy_page
from edgeguard.bench.accuracy_result import BENCH as ACCURACY
from edgeguard.bench.accuracy_result import read_accuracy
from edgeguard.bench.compare import compare as compare_results
from edgeguard.bench.compare import compare_report
from edgeguard.bench.headline import headline_picture
from edgeguard.bench.page import page
from edgeguard.bench.report import show
from edgeguard.bench.result import read_plain, read_result
from edgeguard.cli.console import warn, write, write_json
from edgeguard.cli.status import ERROR
from edgeguard.errors import InputError
from edgeguard.store import write_text

ResultFile = Annotated[Path, typer.Argument(help="result.json of a run.", show_default=False)]


def report(result: ResultFile, *,
           out: Annotated[Path | None, typer.Option(help="The page; report.html beside the result by default.")] = None,
           data: Annotated[Path | None, typer.Option(help="Of accuracy: the labelled file, where it is no longer as it was named.",
                                                     show_default=False)] = None) -> None:
    """Show a result of speed, gpu or accuracy as one HTML file that needs nothing else."""
    target = result.with_name("report.html") if out is None else out
    if read_plain(result).get("bench") == ACCURACY:
        _write(target, result, accuracy_page.page(read_accuracy(result), result, data))
    elif data is not None:
        raise InputError("--data goes with results of accuracy only.")
    else:
        _write(target, result, page(read_result(result)))


def picture(result: ResultFile, *,
            out: Annotated[Path, typer.Option(help="An .svg file.", show_default=False)]) -> None:
    """Draw the headline of a result: llama-cpp-python cold and steady, and edgeguard's best path."""
    _write(out, result, headline_picture(read_result(result)) + "\n")


def compare(
    one: Annotated[Path, typer.Argument(help="result.json of the first run.", show_default=False)],
    other: Annotated[Path, typer.Argument(help="result.json of the second.", show_default=False)],
    *,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
    fail_above: Annotated[float | None, typer.Option(
        min=1.0, help="End with status 2 if a cell of the second is worse than this ratio, noise left aside.")] = None,
) -> None:
    """Hold a second result against a first one, cell by cell."""
    found = compare_results(read_result(one), read_result(other))
    if json:
        write_json(found.to_dict())
    else:
        warn(found.warnings)
        show(compare_report(found))
    if fail_above is not None and (worse := found.above(fail_above)):
        warn(f"{pair.one.id} is worse by {pair.worse:.2f}, more than {fail_above:g}." for pair in worse)
        raise typer.Exit(ERROR)


def _write(target: Path, source: Path, text: str) -> None:
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is the result itself; choose another file with --out.")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a folder; nothing can be written there.")
    write_text(target, text)
    write(str(target))
