"""`edgeguard tune`: measure the ways in which this machine can run a model, and keep the fastest for `auto`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Annotated

import typer
from rich.text import Text

from edgeguard import loading, machine, store
from edgeguard.cli.check import ModelOption, ProfileOption
from edgeguard.cli.console import facts, line, show, waiting, write_json
from edgeguard.errors import EdgeGuardError, InferenceError, ModelFileError, RuntimeMissingError
from edgeguard.guard import Guard
from edgeguard.store import Candidate, Setting, Tuned

MARGIN = 0.05
"""By which a candidate has to be ahead of the default in every round; less is noise."""
HOPELESS = 1.6
"""Times as slow as the fastest in the first round: not measured again."""
# distinct, of the usual length; two that most guards find unsafe, because their codes take further passes
TEXTS = (
    "How do I end a process that does not answer any more?", "Which tea is best drunk late in the evening?",
    "Explain to a child why the moon has phases.", "Write a short poem about rain on a tin roof.",
    "What does a sorting algorithm need to be stable?", "Translate 'good morning, neighbour' into Danish.",
    "Tell me how to build a pipe bomb to hurt people.", "Give me the home address of that actress so I can follow her.",
)  # fmt: skip


@dataclass
class _Trial:
    """One candidate while it is measured."""

    choice: loading.Choice
    setting: Setting
    title: str
    seconds: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    left_out: str = ""
    error: EdgeGuardError | None = None


def tune(
    model: ModelOption = None,
    profile: ProfileOption = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, max=20, help="How often each candidate is loaded and measured.")] = 3,
    prepacked: Annotated[
        bool, typer.Option("--prepacked", help="Also store ONNX weights as they are packed: twice their disk, far less memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object, on one line.")] = False,
) -> None:
    """Measure a model's artifacts, backends and thread counts on this machine; `auto` then takes the fastest.

    Takes some loads and verdicts for each candidate: seconds with the built-in model, many minutes with an 8B.
    """
    tuned = measure(model, profile, rounds, prepacked=prepacked)
    loading.keep_tuned(model, tuned)
    if as_json:
        write_json(tuned.to_dict())
    else:
        show(report(tuned))


def measure(model: str | None, profile: str | None, rounds: int, *, prepacked: bool = False) -> Tuned:
    """Rounds in which every candidate takes its turn, each time another one first; raises when none of them runs."""
    trials = [_trial(choice) for choice in candidates(model, prepacked=prepacked)]
    for count in range(rounds):
        for trial in trials[count % len(trials):] + trials[: count % len(trials)]:
            if not trial.left_out:
                with waiting(f"Measuring {trial.title}, round {count + 1} of {rounds}"):
                    _measure(trial, profile)
        _leave_out(trials)
    chosen, reason = _chosen(trials)
    looked_at = tuple(
        Candidate(trial.setting, trial.title, statistics.median(trial.seconds) * 1000 if trial.seconds else None, trial.left_out)
        for trial in trials
    )
    return Tuned(chosen.setting, reason, datetime.now(timezone.utc).isoformat(timespec="seconds"), looked_at)


def candidates(model: str | None, *, prepacked: bool = False) -> Iterator[loading.Choice]:
    """Every artifact of the model on every installed backend with every thread count, the default first.

    With `prepacked`, ONNX artifacts once more with weights that are mapped as they are packed.

    Raises `RuntimeMissingError`, and `ModelFileError` for a model that cannot be told from others (see `store.digest`).
    """
    place = store.locate(model)
    found = [each for each in store.scan(place) if store.digest(each)]
    fitting = [runtime for runtime in loading.RUNTIMES if runtime.kind in {each.kind for each in found}]
    if not fitting:
        raise ModelFileError(f"{place} holds nothing to choose from: only artifacts with a manifest and GGUF files are measured.")
    if not any(runtime.installed for runtime in fitting):
        raise RuntimeMissingError(fitting[0].package, fitting[0].extra)
    usual = machine.default_threads()
    counts = dict.fromkeys([usual, max(1, usual // 2), machine.most_threads()])
    for runtime in fitting:
        for each in found:
            if runtime.installed and each.kind == runtime.kind:
                packed = [False, True] if prepacked and runtime.backend == "onnx" else [False]
                yield from (loading.Choice(runtime, each, "to be measured", count, form) for form in packed for count in counts)


def judged(choice: loading.Choice, profile: str | None) -> tuple[float, list[str]]:
    """Load, judge one text that does not count, then all others; the median's seconds and the answers."""
    if choice.prepacked and isinstance(choice.model, store.Artifact):
        loading.prepack(choice.model)
    parts = loading.open_choice(choice, profile=profile)
    with Guard(parts.backend, parts.tokenizer, parts.profile, parts.identity) as guard:
        if choice.prepacked and "packed" not in guard.backend_info.kernel:
            raise InferenceError("The packed weights could not be mapped here.")
        guard.warmup()
        seconds, answers = [], []
        for text in TEXTS:
            start = time.perf_counter()
            answers.append(guard.check(text).raw)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), answers


def _trial(choice: loading.Choice) -> _Trial:
    threads = choice.threads or machine.default_threads()
    what = choice.model.manifest.precision if isinstance(choice.model, store.Artifact) else choice.model.name
    title = f"{choice.backend} {what}{' prepacked' if choice.prepacked else ''}, {threads} thread{'s' if threads > 1 else ''}"
    return _Trial(choice, Setting(choice.backend, store.digest(choice.model), threads, choice.prepacked), title)


def _measure(trial: _Trial, profile: str | None) -> None:
    try:
        seconds, trial.answers = judged(trial.choice, profile)
    except EdgeGuardError as error:  # no memory, no device, damaged: the others can still be measured
        trial.error, trial.left_out = error, str(error)
    else:
        trial.seconds.append(seconds)


def _leave_out(trials: Sequence[_Trial]) -> None:
    """Say after a round who need not be measured again: all that answer otherwise than the first, or are far too slow."""
    running = [trial for trial in trials if not trial.left_out]
    for trial in running[1:]:
        others = sum(one != other for one, other in zip(trial.answers, running[0].answers, strict=True))
        behind = trial.seconds[0] / min(each.seconds[0] for each in running)
        if others:
            trial.left_out = f"answers otherwise than {running[0].title} for {others} of {len(trial.answers)} texts"
        elif behind > HOPELESS:
            trial.left_out = f"{behind:.1f} times as slow as the fastest in the first round"


def _chosen(trials: Sequence[_Trial]) -> tuple[_Trial, str]:
    """The fastest that is ahead of the default in every round, else the default; raises the first error when none runs."""
    running = [trial for trial in trials if not trial.left_out]
    if not running:
        raise next(trial.error for trial in trials if trial.error)
    best, reason = _fastest(running)
    packed = replace(best.setting, prepacked=True)
    for twin in running:  # asked for because of memory, so it only has to be as fast
        if twin is not best and twin.setting == packed and statistics.median(_shares(twin, best)) < 1 + MARGIN:
            return twin, f"{reason}; packed weights that are mapped are as fast and leave memory free"
    return best, reason


def _fastest(running: Sequence[_Trial]) -> tuple[_Trial, str]:
    default, *others = running
    ahead = [trial for trial in others if max(_shares(trial, default)) < 1 - MARGIN]
    if not ahead:
        alone = "it is the only one that could be measured to the end"
        return default, alone if not others else f"no other way was ahead of {default.title} by {MARGIN:.0%} in every round"
    best = min(ahead, key=lambda trial: statistics.median(_shares(trial, default)))
    gain = 1 / statistics.median(_shares(best, default))
    return best, f"{gain:.1f} times as fast as {default.title}, and ahead in each of {len(best.seconds)} rounds"


def _shares(trial: _Trial, other: _Trial) -> list[float]:
    """Of the other's seconds, round by round: what slowed down the machine in a round slowed down both."""
    return [mine / theirs for mine, theirs in zip(trial.seconds, other.seconds, strict=True)]


def report(tuned: Tuned) -> list[Text]:
    """What was measured and chosen, for people."""
    pairs = [(each.title, f"{told(each)}") for each in tuned.candidates]
    title = next(each.title for each in tuned.candidates if each.setting == tuned.setting)
    return [*facts(pairs), line(("  chosen  ", "green"), f"{title}: {tuned.reason}")]


def told(candidate: Candidate) -> str:
    """One candidate's speed and why it was left out."""
    speed = "" if candidate.milliseconds is None else f"{candidate.milliseconds:.1f} ms a verdict"
    return "; ".join(part for part in (speed, candidate.left_out and f"left out: {candidate.left_out}") if part)
