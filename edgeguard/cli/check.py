"""`edgeguard check`: judge one text or conversation."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated

import typer
from rich.text import Text

from edgeguard.cli.console import bar, facts, line, show, waiting, write_json
from edgeguard.cli.inputs import MessagesOption, NeutraliseOption, PolicyOption, RoleOption, TextArgument, given
from edgeguard.cli.status import SAFE, UNSAFE
from edgeguard.guard import Guard
from edgeguard.loading import MAX_THREADS
from edgeguard.verdict import Verdict

WORTH_SHOWING = 0.05  # probability from which a category that the answer does not list is shown to people
STYLES = {"safe": "bold white on green", "unsafe": "bold white on red"}


class BackendName(str, Enum):
    """Backends that can be asked for by name."""

    AUTO = "auto"
    ONNX = "onnx"
    LLAMA = "llama"
    REFERENCE = "reference"


ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME|PATH", help="An installed model or a path; the built-in one by default.")
]
BackendOption = Annotated[BackendName, typer.Option("--backend", help="What runs the model.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, metal, ...; only auto falls back.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Which guard model a file is, when it does not say so itself.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="By default the physical cores that may be used.")
]


def check(
    text: TextArgument = None,
    messages: MessagesOption = None,
    model: ModelOption = None,
    backend: BackendOption = BackendName.AUTO,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    profile: ProfileOption = None,
    role: RoleOption = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Unsafe from this score, 0 to 1, on; by default the calibration's, or 0.5.")
    ] = None,
    policy: PolicyOption = None,
    neutralise: NeutraliseOption = False,
    verdict_only: Annotated[bool, typer.Option("--verdict-only", help="Leave out the categories.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds for the check, loading not counted.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Judge a text or a conversation. Exit status: 0 safe, 1 unsafe, 2 every error.

    Example: edgeguard check "How do I kill a Python process?"
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise typer.BadParameter("--threshold must be from 0 to 1.")
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise typer.BadParameter("--timeout must be a positive number of seconds.")
    asked = given(text, messages)
    with waiting("Loading the model"):
        guard = Guard.load(
            model, backend=backend.value, device=device, threads=threads, profile=profile, policy=policy, neutralise=neutralise
        )
    with guard, waiting("Judging"):
        verdict = guard.check(asked, role, threshold, timeout=timeout, verdict_only=verdict_only)
    if as_json:
        write_json(verdict.to_dict())
    else:
        show(report(verdict))
    raise typer.Exit(SAFE if verdict.safe else UNSAFE)


def report(verdict: Verdict) -> list[Text]:
    """The verdict for people."""
    colour = "green" if verdict.safe else "red"
    lines = [
        line(
            (f" {verdict.verdict.upper()} ", STYLES[verdict.verdict]), "  ", (bar(verdict.score), colour),
            f"  {verdict.score:.3f}", (f"  unsafe from {verdict.threshold:.4g}", "dim"),
        )
    ]  # fmt: skip
    lines += _categories(verdict)
    lines += facts(_facts(verdict))
    lines += [line("  ", ("warning  ", "yellow"), warning) for warning in verdict.warnings]
    return lines


def _categories(verdict: Verdict) -> list[Text]:
    shown = [category for category in verdict.categories if category.listed or category.probability >= WORTH_SHOWING]
    width = max((len(category.name) for category in shown), default=0)
    return [
        line(
            f"  {category.code:<4}",
            (f"{category.name:<{width}}  {category.probability:.3f}", "bold" if category.listed else "dim"),
            ("" if category.listed else "  possible", "dim"),
        )
        for category in shown
    ]


def _facts(verdict: Verdict) -> list[tuple[str, str]]:
    stages = ", ".join(f"{name} {verdict.timings[name]:.0f}" for name in ("tokenize", "prefill", "decode"))
    tokens, model = verdict.tokens, verdict.model
    kept = f", {tokens['prefix']} of them kept from before" if tokens["prefix"] else ""
    passes = "1 pass" if verdict.passes == 1 else f"{verdict.passes} passes"
    precision = f" {model.precision}" if model.precision else ""
    return [
        ("judged", f"the {verdict.role}'s last turn"),
        ("took", f"{verdict.timings['total']:.0f} ms ({stages})"),
        ("read", f"{tokens['prompt']} tokens{kept}; {passes}"),
        ("model", f"{model.name}{precision}, {model.backend} ({model.runtime}) on {model.device}"),
    ]
