"""`edgeguard bench`: speed, accuracy, agreement. Tables for people, one line of JSON for programs, progress on stderr."""

from __future__ import annotations

import typer

from edgeguard.bench import result_commands
from edgeguard.bench.accuracy_cli import accuracy, agreement
from edgeguard.bench.gpu_check import gpu
from edgeguard.bench.peers_cli import peers
from edgeguard.bench.speed_cli import speed
from edgeguard.bench.synthesize_cli import synthesize

app = typer.Typer(help="Measure speed and quality on this machine.", add_completion=False,
                  context_settings={"help_option_names": ["-h", "--help"]})

app.command()(speed)
app.command()(synthesize)
app.command()(peers)
app.command()(accuracy)
app.command()(agreement)
for command in (result_commands.report, result_commands.compare, result_commands.picture, gpu):
    app.command()(command)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure speed and quality on this machine."""
    if context.invoked_subcommand is None:
        raise typer.BadParameter("A command is needed; edgeguard bench --help names them.", ctx=context)
