"""Messages a second when several share a forward pass, in packs of a few sizes, in turn on one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.contenders import Contender
from edgeguard.bench.driver import Worker
from edgeguard.bench.estimate import Guess
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.visits import FORCED, TOKENS

SINGLES = 4  # messages one by one in a turn, whose median is less shaky than one


def steps(carriers: Sequence[Contender], packs: Sequence[int], turns: int, prompts: Prompts, guess: Guess, logs: Path, *,
          random: bool) -> list[Step]:
    """A step for each contender."""
    made = []
    for contender in carriers:
        cells = {
            pack: Cell(f"packed/{contender.key}/{pack}", "packed", contender.name, "s", {"tokens": TOKENS, "answer": "safe", "pack": pack})
            for pack in packs
        }
        planned = _turns(packs, turns)
        seconds = guess.start(contender) + sum(map(sum, planned)) * guess.message(contender, prompts, TOKENS)
        step = f"packed/{contender.key}"
        made.append(Step(step, tuple(cells.values()), seconds,
                         partial(_measure, contender, planned, cells, prompts, logs / f"{step}.log", random=random)))
    return made


def _turns(packs: Sequence[int], number: int) -> list[list[int]]:
    """Sizes of the packs of each turn; the largest, which takes longest and varies least, is in the first one only."""
    return [[*[1] * SINGLES, *packs[1: None if turn == 0 else -1]] for turn in range(number)]


def _measure(contender: Contender, planned: Sequence[Sequence[int]], cells: dict[int, Cell], prompts: Prompts, log: Path, *,
             random: bool) -> list[Cell]:
    items = prompts.items("safe", TOKENS, 0, sum(map(sum, planned)) + 1)
    taken: dict[int, list[float]] = {pack: [] for pack in cells}
    threshold = FORCED["safe"] if random else None
    with Worker(contender.program, log) as worker:
        worker.load()
        worker.judge([items.pop()], prompts.answers, threshold=threshold)
        prompt = len(items[0]["ids"])
        for pack in chain.from_iterable(planned):
            block, items = items[:pack], items[pack:]
            reply = worker.judge(block, prompts.answers, threshold=threshold)
            taken[pack].append(reply["seconds"] / pack)
        facts = {"bytes": contender.bytes, **worker.facts}
    return [
        cells[pack].with_samples(seconds, facts, prompt_tokens=prompt, pass_tokens=prompt - prompts.prefix,
                                 messages_per_second=1 / sorted(seconds)[len(seconds) // 2])
        for pack, seconds in taken.items()
    ]
