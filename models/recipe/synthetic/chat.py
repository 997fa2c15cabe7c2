"""What people type into a public chatbot: plain requests, personas, jailbreak forms, templates, delicate questions, rude talk."""

from __future__ import annotations

import random
from pathlib import Path

from synthetic.rows import Row, distinct, row, user
from synthetic.tables import Draft, Words, english, pairs, render, scenes, words

HERE = Path(__file__).parent
SOURCE = "edgeguard-chat"
LITERAL = str.maketrans({"⟦": "[", "⟧": "]", "⦃": "{", "⦄": "}", "⇥": "    ", "¦": "|"})
"""Signs that a table uses up itself, as they stand in pasted code."""
SAME = ("persona", "tongue", "group")
"""Lists of which a message uses one word only."""
HARMFUL = 0.8
"""Share of the combined unsafe rows that is kept, so that about a quarter of all is unsafe."""


def message(draft: Draft, lists: Words, rng: random.Random) -> str:
    """The text of a draft; whole messages are left as they are typed, combined ones are made to read well."""
    text = render(draft, lists | {name: [rng.choice(lists[name])] for name in SAME}, rng)
    return (english(text) if draft.filling else text).translate(LITERAL)


def chat(seed: int, each: int = 6) -> list[Row]:
    """Distinct user rows, each filling in at most `each` frames; whole messages are gold, combined ones silver."""
    rng = random.Random(seed)
    lists = words(HERE / "words.txt") | words(HERE / "chat" / "words.txt")
    rows: list[Row] = []
    for scene in scenes(sorted((HERE / "chat").glob("[0-9]*.txt"))):
        for draft in pairs(scene, each, rng):
            if draft.codes and draft.filling and rng.random() > HARMFUL:
                continue
            quality = "silver" if draft.filling else "gold"
            rows.append(row(SOURCE, draft.scene, [user(message(draft, lists, rng))], draft.codes, quality, draft.frame))
    rows = distinct(rows)
    rng.shuffle(rows)
    return rows
