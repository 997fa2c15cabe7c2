"""`edgeguard convert`: the command around `convert.pipeline`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.text import Text

from edgeguard.cli.console import CONTROL, facts, show, size, terminal, warn, write_json
from edgeguard.convert import notices
from edgeguard.convert.pipeline import PRECISIONS, PROFILE, convert
from edgeguard.loading import MAX_THREADS
from edgeguard.profiles import NAMES
from edgeguard.store import Manifest
from edgeguard.store.files import Progress

app = typer.Typer(add_completion=False, help="Convert a guard model to ONNX or GGUF.")
STAGES = {"reference": "source in full precision", "graph": "ONNX graph", "gguf": "GGUF", "optimum": "optimum's export",
          "gate": "comparison with the source", "shards": "checkpoint", "prefixes": "prefixes"}
LINE_PERIOD = 20.0
"""Seconds between two lines of a long stage where there is no terminal."""
SPEED_PERIOD = 300.0
"""Seconds that the time left is estimated from."""

CHOICES = "; ".join(f"{target}: {', '.join(precisions)}" for target, precisions in PRECISIONS.items())
OF_SOURCE = f"{', '.join(NAMES)}. By default an artifact's own, {PROFILE} for other sources."
SHARED = "Quantise so that ONNX int8 and GGUF q8_0 (or int4 and q4_0) hold the very same weights."


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a .gguf file, or a GGUF artifact.", show_default=False)],
    *,
    to: Annotated[str, typer.Option("--to", help=f"{' or '.join(PRECISIONS)}.", show_default=False)],
    precision: Annotated[str, typer.Option(help=f"{CHOICES}.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The artifact's folder.", show_default=False)],
    profile: Annotated[str | None, typer.Option(help=OF_SOURCE, show_default=False)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, if not the source's own.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="The artifact's name, if not the default one.", show_default=False)] = None,
    exporter: Annotated[str, typer.Option(help="guard, or optimum (ONNX fp32 from a folder).")] = "guard",
    shared: Annotated[bool, typer.Option("--shared", help=SHARED)] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="If not the machine's choice.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON, on one line.")] = False,
) -> None:
    """Convert a guard model to ONNX or GGUF, hold it against its source, and say the numbers."""
    with stages() as report:
        made = convert(source, out, target=to, precision=precision, profile=profile, tokenizer=tokenizer, name=name,
                       exporter=exporter, shared=shared, force=force, threads=threads, progress=report, tell=say)
    if as_json:
        write_json(made.to_dict())
    else:
        show(summary(made, out))
    warn(notices.duties(made.profile, made.name, made.files))


def summary(made: Manifest, out: Path) -> list[Text]:
    """What was made, what the source says at the verdict's place, and how near the artifact comes to it."""
    asked, numbers = made.probe, made.gate
    forms = ", ".join(f"{form!r} {share:.3g}" for form, share in asked["forms"].items())
    agreement = "not judged, too few decided texts" if numbers["agreement"] is None else (
        f"{numbers['agreement']:.0%} of {numbers['decided']} decided texts")
    licence, memory = notices.LICENCES.get(made.profile), made.conversion["memory"]
    anonymous = "not told by this system" if memory["anonymous"] is None else size(memory["anonymous"])
    return [Text(f"{made.name} ({made.kind} {made.precision}) in {out}"), *facts([
        ("size", f"{size(made.size)} in {len(made.files)} files"),
        ("types", ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))),
        ("head", f"{len(made.head_ids)} of {made.shape.vocab} rows" if made.head_ids else "whole vocabulary"),
        ("forms", forms),
        ("mass", f"{asked['mass']['mean']:.3g} of the whole vocabulary, {asked['mass_in_rows']['mean']:.3g} of the kept rows"),
        ("gate", f"logits differ by {numbers['difference']} at most, noise {numbers['noise']}"),
        ("", f"scores drift by {numbers['drift']}, at most {numbers['drift_most']}"),
        ("", f"verdicts agree: {agreement}"),
        ("memory", f"anonymous {anonymous} at the peak, resident {size(memory['resident'])}"),
        *([("licence", ". ".join(filter(None, [licence.name, licence.built_with])))] if licence else []),
    ])]


def say(sentence: str) -> None:
    """On standard error, as progress."""
    if sys.stderr:
        sys.stderr.write(f"edgeguard: {CONTROL.sub(chr(0xFFFD), sentence)}\n")
        sys.stderr.flush()


@contextmanager
def stages() -> Iterator[Progress | None]:
    """A bar for each stage on a terminal's standard error, elsewhere lines; None without a standard error."""
    if not terminal(sys.stderr):
        yield plain_stages(sys.stderr) if sys.stderr else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(file=sys.stderr), speed_estimate_period=SPEED_PERIOD) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(named(stage).replace("[", "("), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def named(stage: str) -> str:
    """A stage for people."""
    return STAGES.get(stage, f"hash of {stage}")


def plain_stages(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A line when a stage begins, and one now and then while it goes on, with its share and the time left."""
    begun: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = clock()
        start, before = begun.setdefault(stage, (now, done))
        if stage in told and (now - told[stage] < LINE_PERIOD or done >= total):
            return
        line = named(stage)
        if stage in told:
            # what an earlier run has done took no time now
            left = f", about {span((now - start) * (total - done) / (done - before))} left" if done > before else ""
            line += f": {done / total:.0%}{left}"
        told[stage] = now
        stream.write(f"edgeguard: {CONTROL.sub(chr(0xFFFD), line)}\n")
        stream.flush()

    return report


def span(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
