"""Time to verdict by the length of the text, safe and unsafe; and the memory that the longest one takes above the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender
from edgeguard.bench.driver import Peak, Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.visits import TOKENS, judged

SPARE = 4
LONGEST = 8000


@dataclass(frozen=True)
class Length:
    """One length, and how often it is measured."""

    tokens: int
    runs: int
    answers: tuple[str, ...] = ("safe", "unsafe")
    best_only: bool = False
    """On the best path only, not on one artifact of each backend."""


def steps(carriers: Sequence[Contender], lengths: Sequence[Length], prompts: Prompts, guess: Guess, logs: Path, *,
          random: bool) -> list[Step]:
    """A step for each contender and length; the first contender is the best path."""
    made = []
    for length in lengths:
        for contender in carriers[:1] if length.best_only else carriers:
            size, key = prompts.size(length.tokens), contender.key
            cells = {
                answer: Cell(f"length/{key}/{length.tokens}/{answer}", "length", contender.name, "s", {"tokens": size, "answer": answer})
                for answer in length.answers
            }
            if length.tokens == LONGEST:
                cells["peak"] = Cell(f"memory/{key}/peak-{LONGEST}", "memory", contender.name, "B",
                                     {"when": "long", "what": "above the weights", "tokens": size})
            seconds = guess.start(contender) + sum(
                length.runs * guess.message(contender, prompts, length.tokens, unsafe=answer == "unsafe") for answer in length.answers)
            step = f"length/{key}/{length.tokens}"
            made.append(Step(step, tuple(cells.values()), seconds,
                             partial(_measure, contender, length, cells, prompts, logs / f"{step}.log", random=random)))
    return made


def _measure(contender: Contender, length: Length, cells: dict[str, Cell], prompts: Prompts, log: Path, *, random: bool) -> list[Cell]:
    result = []
    with Worker(contender.program, log) as worker:
        worker.load()
        warm = prompts.items("safe", TOKENS, 0, 1)  # every path once; its time is that of a cold call
        worker.judge(warm, prompts.answers, threshold=1.0)
        worker.judge(warm, prompts.answers, threshold=0.0)
        # behind the second message, since weights may be packed behind the first
        before, facts = worker.memory(), {"bytes": contender.bytes, **worker.facts}
        with worker.watched() as peak:
            for answer in length.answers:
                items = prompts.items(answer, length.tokens, 0, SPARE * length.runs)
                samples = judged(worker, contender, answer, items, prompts.answers, wanted=length.runs, random=random)
                if samples.seconds:
                    prompt = sum(len(item["ids"]) for item in items) / len(items)
                    result.append(cells[answer].with_samples(
                        samples.seconds, facts, prompt_tokens=prompt, pass_tokens=prompt - prompts.prefix, answers=samples.raws,
                        forced=sum(samples.forced)))
    if "peak" in cells:
        result.append(above_weights(cells["peak"], contender, facts, before, peak))
    return result


def above_weights(cell: Cell, contender: Contender, facts: dict[str, object], before: dict[str, int | None], peak: Peak) -> Cell:
    """Peak of the memory that is no mapped file, less the weights in it.

    The weights in memory are what was anonymous after two short messages, less the keys and values that a backend allocates at
    load for its whole context (`kv_at_load`); never more than the weights are on disk.
    """
    resident = peak.anonymous if peak.anonymous is not None else peak.resident
    loaded = before["anonymous"] if before["anonymous"] is not None else before["resident"] or 0
    cache = facts.get("kv_at_load", 0)
    weights = min(contender.bytes, max(0, loaded - (cache if isinstance(cache, int) else 0)))
    return cell.with_samples([max(0, resident - weights)], facts, anonymous=peak.anonymous, resident=peak.resident, weights=weights)
