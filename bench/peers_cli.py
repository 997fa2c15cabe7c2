"""`edgeguard bench peers`: who else can be measured, and making what they need. The one command of the bench that uses the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from edgeguard import machine
from edgeguard.bench import environments
from edgeguard.bench.artifacts import Measured, find, write_source
from edgeguard.bench.contenders import Setting
from edgeguard.bench.environments import Told
from edgeguard.bench.peers import Peer, check_memory, contender, default_folder, named, prepare, source
from edgeguard.bench.report import PIPE_WIDTH, table
from edgeguard.cli import ERROR
from edgeguard.errors import EdgeGuardError


def peers(
    names: Annotated[list[str] | None, typer.Argument(help="Some of the peers; all by default.", show_default=False)] = None,
    *,
    make: Annotated[bool, typer.Option("--make", help="Make their environments (downloads packages) and prepare their models.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where both lie, if not in the cache.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "--models", show_default=False,
                                              help="Name, or folder with the artifacts of one model; the built-in one by default.")] = None,
    run: Annotated[Path | None, typer.Option("--out", help="Folder of a run of `bench speed`, for the artifacts made there.")] = None,
) -> None:
    """List other runtimes that `bench speed --peers` measures on the same weights, or make what they need."""
    wanted, place = named(names or []), folder or ((run / "peers") if run else default_folder())
    found = find(model, (run or place) / "models", make=False)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    failed = make_all(wanted, found, place, psutil.virtual_memory().total, errors.print) if make else []
    setting = Setting(machine.default_threads())
    made = table(f"Peers of {found.name}, in {place}", "", ("peer", "what", "state"))
    for peer in wanted:
        state = contender(peer, found, setting, place, psutil.virtual_memory().total)
        made.add_row(peer.name, peer.title, state.missing or f"ready, {state.bytes / 1e6:,.0f} MB")
    for column in made.columns:
        column.justify, column.no_wrap = "left", False
    made.columns[0].no_wrap = True
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(made)
    if failed:
        raise typer.Exit(ERROR)


def make_all(wanted: list[Peer], model: Measured, folder: Path, memory: float, told: Told,
             execute: environments.Run = environments.run) -> list[Peer]:
    """Make what each peer needs, and give those for which it failed; one that fails does not keep the others from being made.

    Before anything is downloaded, a peer must have its source and fit into so many bytes of memory.
    """
    failed = []
    for peer in wanted:
        try:
            origin = source(peer, model)
            for making in (False, True):
                check_memory(peer, model.shape, memory, making=making)
            environments.make(peer.environment, folder, told, execute)
            prepare(peer, write_source(model) if peer.reads == "hf" else origin, folder, told, execute)
        except (EdgeGuardError, OSError) as error:
            told(f"{peer.name}: {error}")
            failed.append(peer)
    return failed
