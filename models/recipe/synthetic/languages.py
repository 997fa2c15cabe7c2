"""Matched pairs in German, French, Spanish, Italian and Portuguese; the tables have the same form as the English scenes."""

from __future__ import annotations

import random
from pathlib import Path

from synthetic.rows import Row, distinct, row, user
from synthetic.tables import pairs, render, scenes, words

HERE = Path(__file__).parent
SOURCE = "edgeguard-languages"
CODES = ("de", "fr", "es", "it", "pt")


def languages(seed: int, each: int = 4) -> list[Row]:
    """Distinct user rows of the five languages; `kind` begins with the language's code."""
    rng = random.Random(seed)
    lists = words(HERE / "languages" / "words.txt")
    rows: list[Row] = []
    for code in CODES:
        for scene in scenes([HERE / "languages" / f"{code}.txt"]):
            for draft in pairs(scene, each, rng):
                text = render(draft, lists, rng)
                rows.append(row(SOURCE, f"{code}/{draft.scene}", [user(text)], draft.codes, "silver", draft.frame))
    rows = distinct(rows)
    rng.shuffle(rows)
    return rows
