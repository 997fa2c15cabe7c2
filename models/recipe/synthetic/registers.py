"""Texts as they lie on a laptop, harmless and harmful ones side by side: e-mails, chats, notes, code comments, diaries, stories."""

from __future__ import annotations

import random
from pathlib import Path

from benign.grammar import written

from synthetic.rows import Row, distinct, row, user

HERE = Path(__file__).parent / "registers"
SOURCE = "edgeguard-registers"


def registers(seed: int) -> list[Row]:
    """Distinct user rows, a few of each frame of the grammars (benign/grammar.py)."""
    rows = distinct(row(SOURCE, f"{path.stem}/{register}", [user(text)], codes, "gold", origin)
                    for path in sorted(HERE.glob("*.yaml")) for register, text, origin, codes in written(path, seed))
    random.Random(seed).shuffle(rows)
    return rows
