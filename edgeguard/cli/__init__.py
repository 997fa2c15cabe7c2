"""The command line. Status 0: safe, or done; 1: unsafe; 2: every error, so that nothing else can be taken for a verdict."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Sequence

from edgeguard.cli.status import ERROR, SAFE, UNSAFE

__all__ = ["ERROR", "SAFE", "UNSAFE", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status; never raises."""
    if sys.stdout is None:  # closed before the program began
        _complain("edgeguard: error: standard output is closed, so that no result could be told; nothing was done.")
        return ERROR
    try:
        # an import that fails must not end in Python's own status 1, which would read as "unsafe"
        from edgeguard.cli.app import run

        status = run(sys.argv[1:] if argv is None else list(argv))
    except BaseException as error:
        status = ERROR
        with contextlib.suppress(Exception):  # there may be no memory left to explain it
            _complain(_explain(error))
            if os.environ.get("EDGEGUARD_DEBUG") == "1":
                _complain(traceback.format_exc())
    return status if _flushed() else ERROR


def _explain(error: BaseException) -> str:
    """One line for people; never the text that was to be judged."""
    from edgeguard.errors import EdgeGuardError

    if isinstance(error, EdgeGuardError):
        return f"edgeguard: error: {' '.join(str(error).split())}"
    if hasattr(error, "format_message"):  # a usage error; its class is click's or typer's, depending on the version
        return f"edgeguard: error: {_usage(error)}"
    if isinstance(error, (BrokenPipeError, SystemExit)):
        return "edgeguard: error: the output could not be written."
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "edgeguard: interrupted; nothing was decided."
    if isinstance(error, OSError) and error.strerror:
        return f"edgeguard: error: {error.strerror}{f': {error.filename}' if error.filename else ''}."
    return f"edgeguard: error: unexpected {type(error).__name__}. This is a bug; EDGEGUARD_DEBUG=1 shows where."


def _usage(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "edgeguard"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and not re.fullmatch(r"--?[A-Za-z][\w-]*", str(option)):
        message = "The text begins with a dash; write -- before it."  # naming the "option" would print the text
    else:
        message = str(error.format_message()).removeprefix("Invalid value: ")  # type: ignore[attr-defined]
    return f"{' '.join(message.split())} See: {command} --help"


def _complain(message: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(message.rstrip("\n").encode("utf-8", "replace").decode("utf-8") + "\n")
        sys.stderr.flush()


def _flushed() -> bool:
    """False when standard output is gone: a reader that closed the pipe, a full disk."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # else the interpreter tries again at exit and sets its own status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain("edgeguard: error: the output could not be written.")
        return False
    return True
