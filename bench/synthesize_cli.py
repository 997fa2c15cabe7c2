"""`edgeguard bench synthesize`: the command around `bench.synthesize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from edgeguard.bench.synthesize import CHECKPOINT, SHAPES, WHATS
from edgeguard.bench.synthesize import synthesize as make
from edgeguard.cli.console import facts, show, size
from edgeguard.convert.cli import say, stages
from edgeguard.convert.memory import MemoryMeter

ALL = "all"
FOLDERS = {CHECKPOINT: "master"}
"""Names below --out that differ from what is made: `bench speed` takes the checkpoint from there."""
SHAPE = f"{', '.join(SHAPES)}, or the path of a config.json; its vocabulary must hold Llama 3's."


def synthesize(
    *,
    what: Annotated[str, typer.Option(help=f"{', '.join(WHATS)}; or {ALL}, each into a folder of its own that is not there yet.")] = ALL,
    out: Annotated[Path, typer.Option(help=f"The folder to make; of {ALL}, the one to make folders in.", show_default=False)],
    shape: Annotated[str, typer.Option(help=SHAPE)] = "llama-guard-2",
    seed: Annotated[int, typer.Option(min=0, help="All that is made of one shape and seed holds the very same weights.")] = 0,
) -> None:
    """Make models of random weights at true size, to measure speed with; their verdicts mean nothing."""
    if what != ALL:
        _make(what, out, shape, seed)
        return
    for each in WHATS:
        folder = out / FOLDERS.get(each, each)
        if folder.exists():
            show([Text(f"{folder} is there and stays; shape and seed were not compared")])
        else:
            _make(each, folder, shape, seed)


def _make(what: str, out: Path, shape: str, seed: int) -> None:
    with MemoryMeter() as meter, stages() as report:
        made = make(what, out, shape=shape, seed=seed, tell=say, progress=report)
    peaks = meter.look()
    anonymous = "not told by this system" if peaks["anonymous"] is None else size(peaks["anonymous"])
    about = made.manifest
    show([Text(f"{about.name if about else CHECKPOINT} in {made.folder}"), *facts([
        ("size", size(sum(path.stat().st_size for path in made.folder.iterdir()))),
        *([("types", ", ".join(f"{count} {kind}" for kind, count in sorted(about.types.items())))] if about else []),
        ("memory", f"anonymous {anonymous} at the peak, resident {size(peaks['resident'] or 0)}"),
    ])])
