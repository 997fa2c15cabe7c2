"""Visits: a fresh process loads, judges one message cold, then a stream of distinct ones, tells its memory, and ends.

Every contender is visited once in each round, in an order that moves on by one from round to round, so that contenders are
interleaved and no two models are in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender
from edgeguard.bench.driver import Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Item, Prompts, accepted
from edgeguard.errors import InferenceError

TOKENS = 23  # of text: a usual message
PEER_TOKENS = {True: 2, False: 16}
"""Most tokens that a peer may generate: on random weights as many as a `safe` answer costs, else what an answer can have."""
SPARE = 2
"""Messages that are at hand for each sample: a model may judge some otherwise than hoped for."""
FORCED = {"safe": 1.0, "unsafe": 0.0}
"""Thresholds that make any message walk an answer's path; a score of exactly 1 is never met."""


@dataclass(frozen=True)
class Stream:
    """What a visit asks for."""

    answers: tuple[str, ...]
    """Kinds of messages, `safe` first."""
    steady: int
    """Messages of each kind behind the cold one."""
    random: bool
    """The model's weights are made up, so its verdicts are."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one kind of message, and what was answered."""

    seconds: list[float]
    raws: list[str]
    forced: list[bool]
    """Whether an answer was walked because it was asked for, not by the model's own verdict."""


def blanks(contender: Contender, stream: Stream) -> dict[str, Cell]:
    """The cells of a visit by their role, without samples."""
    id_, group, name = contender.id, contender.group, contender.name
    params = {"level": contender.level, "backend": contender.backend, "tokens": TOKENS, "pack": 1}
    made = {"first": Cell(f"{id_}/{TOKENS}/first", group, name, "s", {**params, "start": "cold", "answer": stream.answers[0]})}
    for answer in stream.answers:
        made[answer] = Cell(f"{id_}/{TOKENS}/{answer}", group, name, "s", {**params, "start": "steady", "answer": answer})
    where, level = id_.replace("/", "-"), {"level": contender.level}
    made["load"] = Cell(f"cold/{where}/load", "cold", name, "s", {"what": "load", **level})
    for when in ("load", "steady"):
        made[f"memory at {when}"] = Cell(f"memory/{where}/{when}", "memory", name, "B", {"when": when, "what": "anonymous", **level})
    return made


def steps(contenders: Sequence[Contender], rounds: int, stream: Stream, prompts: Prompts, guess: Guess, logs: Path) -> list[Step]:
    """All visits of a run; what cannot run at all is tried once, so that its reason is told."""
    made = []
    for turn in range(rounds):
        first = turn % max(1, len(contenders))
        for contender in (*contenders[first:], *contenders[:first]):
            if contender.missing and turn:
                continue
            cells = blanks(contender, stream)
            seconds = 0.0 if contender.missing else guess.visit(contender, prompts, stream.steady * len(stream.answers))
            made.append(Step(f"{contender.id}/round-{turn}", tuple(cells.values()), seconds,
                             partial(_visit, contender, turn, stream, cells, prompts, logs)))
    return made


def _visit(contender: Contender, turn: int, stream: Stream, cells: dict[str, Cell], prompts: Prompts, logs: Path) -> list[Cell]:
    if contender.missing:
        raise InferenceError(contender.missing)
    each = SPARE * stream.steady + 1
    given = {answer: prompts.items(answer, TOKENS, turn * each, each) for answer in stream.answers}
    most = PEER_TOKENS[stream.random]
    with Worker(contender.program, logs / f"{contender.id}-{turn}.log") as worker:
        loaded = worker.load()
        at_load = worker.memory()
        fresh = _facts(worker, contender)
        threshold = FORCED["safe"] if stream.random else None
        cold = worker.judge(given[stream.answers[0]][:1], prompts.answers, max_tokens=most, threshold=threshold)
        found = {
            answer: judged(worker, contender, answer, items[1:], prompts.answers, wanted=stream.steady, random=stream.random)
            for answer, items in given.items()
        }
        at_end, facts = worker.memory(), _facts(worker, contender)
    tokens = _tokens(given[stream.answers[0]], contender)
    result = [
        cells["load"].with_samples([loaded["load_s"]], fresh),
        cells["first"].with_samples([cold["seconds"]], fresh, prompt_tokens=tokens["prompt_tokens"]),
        _memory(cells["memory at load"], at_load, fresh),
        _memory(cells["memory at steady"], at_end, facts),
    ]
    for answer, samples in found.items():
        if samples.seconds:
            result.append(cells[answer].with_samples(samples.seconds, facts, **tokens, answers=samples.raws, forced=sum(samples.forced)))
    return result


def _facts(worker: Worker, contender: Contender) -> dict[str, Any]:
    """As they are now: what edgeguard multiplies by changes when weights are packed."""
    return {**worker.facts, "bytes": worker.facts.get("bytes") or contender.bytes, **contender.facts}


def judged(worker: Worker, contender: Contender, answer: str, items: Sequence[Item], answers: dict[str, list[int]], *,
           wanted: int, random: bool) -> Samples:
    """One message after the other until there are so many samples; what the model judges otherwise than the cell says is none.

    When half of the messages did not suffice, edgeguard is made to walk the answer's path by its threshold. A peer on random
    weights says nothing that could be read: its cost is that of a safe answer, and all of its samples count.
    """
    fits = accepted(answer)
    unread = random and not contender.edgeguard and answer == "safe"
    samples = Samples([], [], [])
    for place, item in enumerate(items):
        if len(samples.seconds) == wanted:
            break
        force = contender.edgeguard and (random or 2 * place >= len(items))
        reply = worker.judge([item], answers, max_tokens=PEER_TOKENS[random], threshold=FORCED[answer] if force else None)
        if unread or fits(reply["raw"][0]):
            samples.seconds.append(reply["seconds"])
            samples.raws.append(reply["raw"][0])
            samples.forced.append(force)
    return samples


def _tokens(items: Sequence[Item], contender: Contender) -> dict[str, Any]:
    prompt = sum(len(item["ids"]) for item in items) / len(items)
    kept = items[0]["prefix"] if contender.keeps else 0
    return {"prompt_tokens": prompt, "pass_tokens": prompt - kept}


def _memory(cell: Cell, memory: dict[str, int | None], facts: dict[str, Any]) -> Cell:
    anonymous = memory["anonymous"] if memory["anonymous"] is not None else memory["resident"]
    return cell.with_samples([anonymous or 0], facts, **memory)
