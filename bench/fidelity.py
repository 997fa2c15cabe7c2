"""How near each artifact's verdicts come to those of the most exact one, over labelled rows; speed without it is worth nothing."""

from __future__ import annotations

import json
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
from edgeguard.bench.rows import Data, Row
from edgeguard.errors import InferenceError
from edgeguard.store import write_text

BATCH = 16
TOKENS = 60  # of a usual row, for the guess


@dataclass(frozen=True)
class Said:
    """A verdict as it lies in a file."""

    verdict: str
    score: float
    codes: tuple[str, ...]


def steps(model: Measured, data: Data | None, setting: Setting, guess: Guess, work: Path, logs: Path) -> list[Step]:
    """A step for each artifact, the most exact one first: its verdicts are kept in `work` and the others held against them."""
    order = precision_order(list(model.found))
    truth = guard(model, order[0], "L2", setting)
    made: list[Step] = []
    for label in order[1:]:
        contender = guard(model, label, "L2", setting)
        params = {"artifact": label, "precision": contender.precision, "against": order[0]}
        cell = Cell(f"fidelity/{label}", "fidelity", contender.name, "share", params)
        rows = 0 if data is None else len(data.rows)
        seconds = guess.start(contender) + rows * guess.evaluate(contender, TOKENS)
        if not made:
            seconds += guess.start(truth) + rows * guess.evaluate(truth, TOKENS)
        step = f"fidelity/{label}"
        made.append(Step(step, (cell,), seconds, partial(_compare, truth, contender, cell, data, work, logs)))
    return made


def _compare(truth: Contender, contender: Contender, cell: Cell, data: Data | None, work: Path, logs: Path) -> list[Cell]:
    if data is None:
        raise InferenceError("there are no labelled rows; name a file with --rows")
    kept = work / f"verdicts-{truth.key}-{data.sha256[:12]}-{len(data.rows)}.json"
    if not kept.exists():
        said, _ = _judge(truth, data, logs)
        write_text(kept, json.dumps([vars(each) for each in said]) + "\n")
    wanted = [Said(each["verdict"], each["score"], tuple(each["codes"])) for each in json.loads(kept.read_text(encoding="utf-8"))]
    found, facts = _judge(contender, data, logs)
    numbers = differences(list(zip(wanted, found, strict=True)))
    facts = {**facts, "data": data.name, "data_sha256": data.sha256, "rows": len(data.rows), "of": data.total}
    return [cell.with_samples([numbers["agreement"]], facts, **numbers)]


def _judge(contender: Contender, data: Data, logs: Path) -> tuple[list[Said], dict[str, Any]]:
    """In the order of the rows; judged by role and from the longest on, packed."""
    found: dict[int, Said] = {}
    with Worker(contender.program, logs / f"fidelity/{contender.key}.log") as worker:
        worker.load()
        for role in ("user", "assistant"):
            order = sorted((index for index, row in enumerate(data.rows) if row.conversation.role == role),
                           key=lambda index: data.rows[index].size, reverse=True)
            for start in range(0, len(order), BATCH):
                chosen = order[start: start + BATCH]
                reply = worker.judge([_item(data.rows[index]) for index in chosen], {}, role=role)
                found |= {index: _said(raw, score) for index, raw, score in zip(chosen, reply["raw"], reply["scores"], strict=True)}
        facts = {"bytes": contender.bytes, **worker.facts}
    return [found[index] for index in range(len(data.rows))], facts


def _item(row: Row) -> dict[str, Any]:
    return {"message": [{"role": message.role, "content": message.content} for message in row.conversation.messages]}


def _said(raw: str, score: float) -> Said:
    verdict, _, codes = raw.partition("\n")
    return Said(verdict, score, tuple(code for code in codes.split(",") if code))
