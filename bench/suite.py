"""A whole run: which steps it has, in which order, how long they will take; measured one by one, each kept as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeguard import __version__, machine
from edgeguard.bench import ceilings, contenders, fidelity, lengths, packed, starts, visits
from edgeguard.bench.artifacts import Measured
from edgeguard.bench.cells import Cell, Step, Store
from edgeguard.bench.contenders import Contender, Setting, guard
from edgeguard.bench.estimate import Guess
from edgeguard.bench.lengths import Length
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.rows import Data
from edgeguard.bench.visits import Stream


@dataclass(frozen=True)
class Suite:
    """How much is measured; the numbers of a profile."""

    name: str
    rounds: int
    """Visits to each contender."""
    steady: int
    """Messages of each kind in a visit, behind the cold one."""
    answers: tuple[str, ...]
    """Kinds of messages in a visit."""
    lengths: tuple[Length, ...]
    packs: tuple[int, ...]
    """Messages that share a pass, from 1 on."""
    turns: int
    """Of the packs."""
    packed: int
    """Artifacts whose packs are measured; the best path is the first."""
    starts: int
    """Process starts in each way."""
    rows: int
    """Labelled rows that verdicts are compared on."""


SUITES = {
    suite.name: suite for suite in (
        Suite("short", rounds=3, steady=8, answers=("safe", "unsafe"), packs=(1, 4, 16, 64), turns=3, packed=2, starts=3, rows=300,
              lengths=(Length(23, 20), Length(128, 10), Length(512, 5), Length(2048, 3), Length(8000, 1))),
        Suite("full", rounds=3, steady=8, answers=("safe",), packs=(1, 4, 16, 64), turns=2, packed=2, starts=2, rows=300,
              lengths=(Length(23, 10, best_only=True), Length(128, 3, best_only=True), Length(512, 3, best_only=True),
                       Length(2048, 3, best_only=True), Length(8000, 1, answers=("safe",)))),
    )
}
CARRIERS = ("onnx", "gguf")
"""Kinds of artifacts of which one each is measured at length; the first is the best path on a CPU, until a run says otherwise."""


@dataclass(frozen=True)
class Peers:
    """What others bring in."""

    contenders: Sequence[Contender] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    """Python of the environment that has a runtime, for its ceiling."""


NOBODY = Peers()


@dataclass(frozen=True)
class Plan:
    """The steps of a run."""

    steps: tuple[Step, ...]
    guess: Guess

    @property
    def cells(self) -> list[Cell]:
        """Each once, without samples."""
        return list({cell.id: cell for step in self.steps for cell in step.cells}.values())

    def only(self, pattern: str | None) -> Plan:
        """The steps that have to do with what the pattern names."""
        return Plan(tuple(step for step in self.steps if step.wanted(pattern)), self.guess)


def plan(suite: Suite, model: Measured, setting: Setting, prompts: Prompts, guess: Guess, folder: Path, *,
         peers: Peers = NOBODY, data: Data | None = None) -> Plan:
    """All steps: ceilings first, then the visits round by round, then what takes one contender at a time, the shortest first."""
    logs = folder / "logs"
    random = model.random
    labels = [label for kind in CARRIERS if (label := model.label(kind))]
    carriers = [guard(model, label, "L2", setting) for label in labels]
    everyone = [*contenders.ladder(model, setting), *peers.contenders]
    rows = len(prompts.items("safe", visits.TOKENS, 0, 1)[0]["ids"]) - prompts.prefix
    interleaved = [
        *ceilings.steps(model.shape, rows, setting.threads, peers.pythons, logs),
        *visits.steps(everyone, suite.rounds, Stream(suite.answers, suite.steady, random), prompts, guess, logs),
    ]
    alone = [
        *lengths.steps(carriers, suite.lengths, prompts, guess, logs, random=random),
        *packed.steps(carriers[: suite.packed], suite.packs, suite.turns, prompts, guess, logs, random=random),
        *starts.steps(starts.pairs(labels, model, setting, folder), suite.starts, prompts, guess, logs),
        *([] if random else fidelity.steps(model, peers.contenders, data, setting, prompts, guess, folder, logs)),
    ]
    return Plan((*interleaved, *sorted(alone, key=lambda step: step.seconds)), guess)


def identity(suite: Suite, model: Measured, setting: Setting) -> dict[str, Any]:
    """What must be alike for a run to go on in the folder of an earlier run."""
    cpu = machine.cpu()
    return {
        "suite": suite.name, "edgeguard": __version__, "cpu": f"{cpu.arch} {cpu.model}", "threads": setting.threads,
        "device": setting.device, "seed": setting.seed, "model": model.name,
        "artifacts": {each["label"]: each["digest"] for each in model.to_dict()["artifacts"]},
    }


Told = Callable[[Step, int, int, float, float], object]
"""A step that is done, its number, how many there are, the seconds it took, and the seconds that are left."""


def measure(plan: Plan, store: Store, told: Told = lambda *_: None) -> None:
    """Every step that is not done yet; a finished one is written before the next one begins."""
    waiting = [step for step in plan.steps if not store.done(step)]
    for place, step in enumerate(waiting, 1):
        began = time.perf_counter()
        cells = step.run()
        taken = time.perf_counter() - began
        store.write(step, cells, taken)
        if any(cell.measured for cell in cells):
            plan.guess.learn(step.seconds, taken)
        told(step, place, len(waiting), taken, left(plan, waiting[place:]))


def left(plan: Plan, steps: Sequence[Step]) -> float:
    """Seconds that the steps will take, by all that is known by now."""
    return sum(step.seconds for step in steps) * plan.guess.correction
