"""`edgeguard models`: what is here, where it is, whether it is whole; fetch and remove."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from edgeguard import loading, store
from edgeguard.cli.console import line, progress, show, size, terminal, warn, write, write_json
from edgeguard.cli.status import ERROR
from edgeguard.errors import ModelError, StoreError
from edgeguard.store import Artifact, Differences, Entry, Model

app = typer.Typer(help="List, find, verify, fetch and remove models.")
Name = Annotated[str, typer.Argument(help="Name of a model, or a path.", show_default=False)]
HEADER = ("NAME", "KIND", "PROFILE", "PRECISION", "CALIBRATION", "SIZE", "FOLDER")


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """List, find, verify, fetch and remove models."""
    if context.invoked_subcommand is None:
        show(table(store.models()))


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="A JSON list, on one line.")] = False) -> None:
    """The built-in model and the installed ones."""
    entries = store.models()
    if as_json:
        write_json([_plain(entry) for entry in entries])
    else:
        show(table(entries))


@app.command()
def path(model: Name, kind: Annotated[str | None, typer.Option("--kind", help="onnx, gguf or hf.")] = None) -> None:
    """Print the folder of a model; with --kind, its main file of that kind."""
    write(str(store.resolve(model, (kind,)).weights if kind else store.locate(model)))


@app.command()
def verify(model: Name) -> None:
    """Hash every file of a model anew and name what is missing or changed."""
    place = store.locate(model)
    with progress() as report:
        results = store.verify(place.parent if place.is_file() else place, report)
    for folder, found in results:
        show(differences(folder, found))
    if not all(found.ok for _, found in results):
        raise typer.Exit(ERROR)


@app.command()
def pull(
    hub_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Id on the Hugging Face hub.", show_default=False)],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Only files of this pattern, as *Q4_K_M.gguf.")] = None,
) -> None:
    """Fetch a model from the hub (extra: convert)."""
    with progress() as report:
        entry = store.pull(hub_id, revision, report, include=include or ())
    show(table([entry]))


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="Name of an installed model.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete an installed model."""
    entry = store.entry(model)
    if not yes and not entry.built_in:
        if not terminal(sys.stdin):
            raise typer.BadParameter("There is nobody to ask; say --yes to remove it.")
        typer.confirm(f"Remove {entry.folder} ({size(sum(each.size for each in entry.models))})?", abort=True, err=True)
    write(f"removed {store.remove(model)}")


def table(entries: Iterable[Entry]) -> list[Text]:
    """One line a model, columns aligned; problems below."""
    entries = list(entries)
    rows = [HEADER, *(_row(entry, model) for entry in entries for model in entry.models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    problems = [line((f"{entry.name}: {entry.problem}", "red")) for entry in entries if entry.problem]
    return [line((lines[0], "dim")), *map(line, lines[1:]), *problems]


def differences(folder: Path, found: Differences) -> list[Text]:
    """What verifying a folder showed."""
    warn(f"{folder / name} is not named by the manifest." for name in found.extra)
    bad = [("missing", name) for name in found.missing] + [("changed", name) for name in found.changed]
    if not bad:
        return [line(("whole    ", "green"), str(folder))]
    return [line((f"{what}  ", "red"), str(folder / name)) for what, name in bad]


def _row(entry: Entry, model: Model) -> tuple[str, ...]:
    manifest = model.manifest if isinstance(model, Artifact) else None
    profile, precision = (manifest.profile, manifest.precision) if manifest else ("", "")
    return (entry.name, model.kind, profile, precision, _calibration(model), size(model.size), str(model.folder))


def _calibration(model: Model) -> str:
    """Whose is in force: `user`, `artifact` or `none`; empty where that depends on the profile that a load names."""
    try:
        return loading.calibration_of(model, loading.profile_of(model), known=True)[1]
    except ModelError:
        return ""
    except StoreError:
        return "damaged"


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "folder": str(entry.folder),
        "built_in": entry.built_in,
        "problem": entry.problem or None,
        "models": [_plain_model(model) for model in entry.models],
    }


def _plain_model(model: Model) -> dict[str, Any]:
    own = ("name", "kind", "size")
    known = ("profile", "precision", "licence")
    manifest = model.manifest if isinstance(model, Artifact) else None
    return {
        **{name: getattr(model, name) for name in own},
        **{name: getattr(manifest, name, None) for name in known},
        "calibration": _calibration(model) or None,
        "folder": str(model.folder),
        "weights": str(model.weights),
    }
