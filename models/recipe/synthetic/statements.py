"""Statements and prose that ask for nothing: diaries, threats, adverts, stories and posts, with and without harm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from synthetic.rows import Row, distinct, row, user
from synthetic.tables import Words, english, pairs, render, scenes, words

HERE = Path(__file__).parent / "statements"
SOURCE = "edgeguard-statements"


def drafted(each: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    """A row for each draft of the tables."""
    for scene in scenes(sorted(path for path in HERE.glob("*.txt") if path.name != "words.txt")):
        for draft in pairs(scene, each, rng):
            text = render(draft, lists, rng)
            text = text if text.islower() else english(text)
            yield row(SOURCE, draft.scene, [user(text)], draft.codes, "silver" if draft.filling else "gold", draft.frame)


def statements(seed: int, each: int = 5) -> list[Row]:
    """Distinct user rows, every filling in at most `each` of its frames."""
    rng = random.Random(seed)
    rows = distinct(drafted(each, words(HERE / "words.txt"), rng))
    rng.shuffle(rows)
    return rows
