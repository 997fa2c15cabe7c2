"""`edgeguard bench speed`: plans a run, says what it will take, measures it cell by cell, and writes result.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from edgeguard import machine
from edgeguard.bench import assemble, suite_table
from edgeguard.bench.artifacts import Measured, find
from edgeguard.bench.cells import Step, Store
from edgeguard.bench.contenders import Setting
from edgeguard.bench.cost import Power
from edgeguard.bench.estimate import Guess, probe
from edgeguard.bench.peers import taking_part
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.report import PIPE_WIDTH
from edgeguard.bench.rows import Data, read_rows
from edgeguard.bench.suite import NOBODY, SUITES, Plan, Suite, identity, measure, plan
from edgeguard.cli import ERROR
from edgeguard.cli.check import ThreadsOption
from edgeguard.errors import InputError
from edgeguard.store import built_in_folder, check_files, write_text

RESULT = "result.json"


def speed(
    *,
    suite: Annotated[Literal["short", "full"], typer.Option(help="short: minutes, for the built-in model; full: hours, at 8B.")] = "short",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; one that was begun is gone on with.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "--models", show_default=False,
                                              help="Name, or folder with the artifacts of one model; the built-in one by default.")] = None,
    only: Annotated[str | None, typer.Option(help="Only cells that this pattern fits, as ladder/*.", show_default=False)] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the cells and the time they take, and measure nothing.")] = False,
    with_peers: Annotated[bool, typer.Option("--peers", help="Other runtimes too, each in its own environment.")] = False,
    device: Annotated[str, typer.Option(help="For edgeguard's own cells.")] = "cpu",
    threads: ThreadsOption = None,
    rows: Annotated[Path | None, typer.Option(help="Labelled rows to compare verdicts on, if not the mini's.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Compare verdicts on so many rows.", show_default=False)] = None,
    watts: Annotated[float, typer.Option(min=0.0, help="Assumed power of the machine under load.")] = Power.watts,
    price: Annotated[float, typer.Option(min=0.0, help="Assumed USD for a kWh.")] = Power.price,
    seed: Annotated[int, typer.Option(min=0, help="Of messages and samples.")] = 0,
) -> None:
    """Measure speed, memory and fidelity of one model in all its artifacts, beside the machine's ceilings and other runtimes."""
    if out is None and not listing:
        raise InputError("Where shall the run lie? Give --out FOLDER.")
    folder, chosen = out or Path(), SUITES[suite]
    errors = Console(stderr=True, highlight=False)
    found = find(model, folder / "models", errors.print, make=not listing)
    setting = Setting(threads or machine.default_threads(), device, seed)
    guess = Guess(found.shape, probe())
    whole = plan(chosen, found, setting, Prompts(found, seed), guess, folder, data=_rows(rows, limit, chosen, seed),
                 peers=taking_part(found, setting, folder) if with_peers else NOBODY)
    wanted = whole.only(only)
    if not wanted.steps:
        raise InputError(f"No cell and no step fits {only!r}; see them with --list.")
    output = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    if listing:
        for line in (*suite_table.cell_list(wanted), suite_table.plan_table(wanted, 0)):
            output.print(line)
        return
    _measured(whole, wanted, found, chosen, setting, Store(folder), Power(watts, price), errors, output)


def _measured(whole: Plan, wanted: Plan, found: Measured, suite: Suite, setting: Setting, store: Store, power: Power, errors: Console,
              output: Console) -> None:
    store.begin(identity(suite, found, setting))
    for artifact in found.found.values():  # hashes are read once and remembered; the first load would pay for it
        check_files(artifact)
    errors.print(suite_table.plan_table(wanted, sum(map(store.done, wanted.steps))))

    def told(step: Step, place: int, count: int, taken: float, left: float) -> None:
        errors.print(suite_table.step_line(step, place, count, taken, left))

    measure(wanted, store, told)
    result = assemble.result(whole, store, found, suite.name, setting.threads, power)
    write_text(store.folder / RESULT, json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    for part in suite_table.result_tables(result):
        output.print(part)
    output.print(f"Written to {store.folder / RESULT}; as a page: edgeguard bench report {store.folder / RESULT}", soft_wrap=True)
    if not any(cell["measured"] and cell["samples"] for cell in result["cells"] if cell["group"] in ("ladder", "peers", "length")):
        raise typer.Exit(ERROR)


def _rows(given: Path | None, limit: int | None, suite: Suite, seed: int) -> Data | None:
    """The rows asked for, else the mini's validation set, which a checkout has."""
    path = given or built_in_folder().parent / "recipe" / "data" / "val.jsonl.gz"
    return read_rows(path).sample(limit or suite.rows, seed) if given or path.is_file() else None
