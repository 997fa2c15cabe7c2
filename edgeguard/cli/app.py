"""The commands put together; `convert` and `bench` are imported only when they are called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from edgeguard import __version__
from edgeguard.cli.calibrate import calibrate
from edgeguard.cli.check import check
from edgeguard.cli.console import write
from edgeguard.cli.doctor import doctor
from edgeguard.cli.models import app as models
from edgeguard.cli.prompt import prompt
from edgeguard.cli.serve import serve
from edgeguard.cli.status import ERROR, SAFE, UNSAFE
from edgeguard.cli.tune import tune
from edgeguard.errors import RuntimeMissingError

INTERRUPTED = 130
"""What typer makes of Ctrl-C: 128 and the number of SIGINT."""

app = typer.Typer(
    name="edgeguard",
    help="On-device inference for Llama Guard 2: a conversation in, safe or unsafe with categories out.",
    epilog="Exit status: 0 safe (or done), 1 unsafe, 2 every error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(check)
app.command()(prompt)
app.add_typer(models, name="models")
app.command()(doctor)
app.command()(tune)
app.command()(calibrate)
app.command()(serve)


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command line; usage errors and errors of the command are raised."""
    result = _result(typer.main.get_command(app), arguments, "edgeguard")
    return result if result in (SAFE, UNSAFE) else ERROR


def _result(command: Any, arguments: Sequence[str], name: str) -> int:  # noqa: ANN401  the class depends on typer's version
    """The status that a command ends with; raises `KeyboardInterrupt` again, which typer turns into a status of its own."""
    result: int | None = command.main(list(arguments), name, standalone_mode=False)
    if result == INTERRUPTED:
        raise KeyboardInterrupt
    return SAFE if result is None else result


def _print_version(asked: bool) -> None:
    if asked:
        write(f"edgeguard {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001, handled before the body
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A command line without a command is an error, though asking for help is none."""
    if context.invoked_subcommand is None:
        names = "check, prompt, models, doctor, tune, calibrate, serve, convert or bench"
        raise typer.BadParameter(f"A command is needed: {names}.", ctx=context)


def _hand_over(context: typer.Context, package: str) -> None:
    """Run the command line of an optional part of edgeguard with the rest of the arguments."""
    try:
        part = importlib.import_module(f"edgeguard.{package}.cli")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeguard"):
            raise
        raise RuntimeMissingError(str(error.name), package) from error
    except ImportError as error:
        raise RuntimeMissingError(f"A package that {package} needs", package, str(error)) from error
    if _result(typer.main.get_command(part.app), context.args, f"edgeguard {package}") != SAFE:
        raise typer.Exit(ERROR)


REST = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=REST, add_help_option=False)
def convert(context: typer.Context) -> None:
    """Convert a checkpoint to GGUF or ONNX, held against its source (extra: convert)."""
    _hand_over(context, "convert")


@app.command(context_settings=REST, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure speed and quality on this machine (extra: bench)."""
    _hand_over(context, "bench")
