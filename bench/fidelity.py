"""How near the verdicts of artifacts and peers come to those of the most exact artifact, over labelled rows; no speed counts without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeguard.bench.accuracy import differences
from edgeguard.bench.artifacts import Measured
from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender, Setting, guard, precision_order
from edgeguard.bench.driver import Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.rows import Data
from edgeguard.errors import InferenceError
from edgeguard.store import write_text

BATCH = 16
TOKENS = 60  # of a usual row, for the guess


@dataclass(frozen=True)
class Said:
    """A verdict as it lies in a file."""

    verdict: str
    score: float | None
    codes: tuple[str, ...]


def steps(model: Measured, peers: Sequence[Contender], data: Data | None, setting: Setting, prompts: Prompts, guess: Guess, work: Path,
          logs: Path) -> list[Step]:
    """A step for each artifact and peer; the verdicts of the most exact artifact are kept in `work` and the others held against them."""
    order = precision_order(list(model.found))
    truth = guard(model, order[0], "L2", setting)
    rows = [] if data is None else data.rows
    roles = len({row.conversation.role for row in rows})

    def seconds(each: Contender) -> float:
        tokens = TOKENS + (0 if each.keeps else prompts.prefix)
        return roles * guess.start(each) + len(rows) * guess.evaluate(each, tokens)

    made: list[Step] = []
    for contender in [*(guard(model, label, "L2", setting) for label in order[1:]), *peers]:
        step = f"fidelity/{contender.key}"
        params = {"artifact": contender.key, "precision": contender.precision, "against": order[0]}
        cell = Cell(step, "fidelity", contender.name, "share", params)
        told = 0.0 if contender.missing else seconds(contender)
        told += 0.0 if made else seconds(truth)
        made.append(Step(step, (cell,), told, partial(_compare, truth, contender, cell, data, prompts, work, logs)))
    return made


def _compare(truth: Contender, contender: Contender, cell: Cell, data: Data | None, prompts: Prompts, work: Path, logs: Path) -> list[Cell]:
    if contender.missing:
        raise InferenceError(contender.missing)
    if data is None:
        raise InferenceError("there are no labelled rows; name a file with --rows")
    kept = work / f"verdicts-{truth.key}-{data.sha256[:12]}-{len(data.rows)}.json"
    if not kept.exists():
        said, _ = _judge(truth, data, prompts, logs)
        write_text(kept, json.dumps([vars(each) for each in said]) + "\n")
    wanted = [Said(each["verdict"], each["score"], tuple(each["codes"])) for each in json.loads(kept.read_text(encoding="utf-8"))]
    found, facts = _judge(contender, data, prompts, logs)
    numbers = differences(list(zip(wanted, found, strict=True)))
    facts = {**facts, "data": data.name, "data_sha256": data.sha256, "rows": len(data.rows), "of": data.total}
    return [cell.with_samples([numbers["agreement"]], facts, **numbers)]


def _judge(contender: Contender, data: Data, prompts: Prompts, logs: Path) -> tuple[list[Said], dict[str, Any]]:
    """In the order of the rows; judged by role, each in a process of its own, as peers keep one prefix, and from the longest on, packed."""
    found: dict[int, Said] = {}
    facts: dict[str, Any] = {}
    for role in sorted({row.conversation.role for row in data.rows}):
        order = sorted((index for index, row in enumerate(data.rows) if row.conversation.role == role),
                       key=lambda index: data.rows[index].size, reverse=True)
        with Worker(contender.program, logs / f"fidelity/{contender.key}-{role}.log") as worker:
            worker.load()
            for start in range(0, len(order), BATCH):
                chosen = order[start: start + BATCH]
                items = [prompts.judged(data.rows[index].conversation) for index in chosen]
                reply = worker.judge(items, prompts.answers, role=role)
                found |= {index: _said(raw, score) for index, raw, score in zip(chosen, reply["raw"], reply["scores"], strict=True)}
            facts = {"bytes": contender.bytes, **worker.facts}
    return [found[index] for index in range(len(data.rows))], facts


def _said(raw: str, score: float | None) -> Said:
    verdict, _, codes = raw.strip().partition("\n")
    return Said(verdict, score, tuple(code for code in codes.split(",") if code))
