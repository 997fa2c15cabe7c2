"""What is to be judged, from the command line, standard input or a file: bounded, UTF-8, never echoed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from edgeguard import strict_json
from edgeguard.errors import ConversationError

MAX_BYTES = 4 << 20
"""Largest input; some hundred times what a model's context holds."""

TextArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="TEXT|-", help="The text, in quotes; - reads it from standard input.", show_default=False),
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        "--messages", "-m", metavar="FILE", help='JSON, [{"role": "user", "content": "..."}, ...]; - for standard input.'
    ),
]
RoleOption = Annotated[
    str | None, typer.Option("--role", help="Whose turn is judged: user or assistant. By default the last message's.")
]
PolicyOption = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="YAML or JSON file with your own categories.")
]
NeutraliseOption = Annotated[
    bool, typer.Option("--neutralise", help="Defuse pieces of the prompt's template inside the text, not only warn of them.")
]


def given(text: list[str] | None, messages: Path | None) -> str | list[Any]:
    """The text or the messages that were asked for; raises `ConversationError` or a usage error."""
    if text and messages is None:
        return _text(text)
    if messages is not None and not text:
        return _messages(messages)
    raise typer.BadParameter("Give either a text (or - for standard input) or --messages FILE.")


def _text(text: list[str]) -> str:
    if len(text) > 1:
        raise typer.BadParameter(f"{len(text)} arguments were given; put the text in quotes.")
    return _decode(_stdin(), "Standard input") if text[0] == "-" else text[0]


def _messages(path: Path) -> list[Any]:
    what = "Standard input" if str(path) == "-" else str(path)
    try:
        if what == "Standard input":
            data = _stdin()
        else:
            with path.open("rb") as file:
                data = _bounded(file, what)
    except OSError as error:
        raise ConversationError(f"{what} cannot be read: {error.strerror}.") from error
    try:
        found = strict_json.loads(_decode(data, what))
    except json.JSONDecodeError as error:
        raise ConversationError(f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except strict_json.DuplicateKeyError as error:
        raise ConversationError(f"{what}: {error}, so it is not clear which one is meant.") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConversationError):
            raise
        raise ConversationError(f"{what} is not JSON that can be read: {type(error).__name__}.") from None
    if not isinstance(found, list):
        raise ConversationError(f"{what} must hold a list of messages, not {type(found).__name__}.")
    return found


def _stdin() -> bytes:
    if sys.stdin is None:
        raise ConversationError("There is no standard input.")
    return _bounded(sys.stdin.buffer, "Standard input")


def _bounded(file: BinaryIO, what: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConversationError(f"{what} is larger than {MAX_BYTES} bytes; judge it in parts.")
    return data


def _decode(data: bytes, what: str) -> str:
    """UTF-8 without a byte order mark, which Windows shells put in front."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConversationError(f"{what} is not valid UTF-8: the byte at offset {error.start} does not fit.") from None
