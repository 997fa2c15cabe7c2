"""Texts written here: frames with slots, filled in a fixed order from a seed.

A grammar is a YAML file: `take` is how many different texts a frame gives, `slots` maps a name to its fillings, and a frame is
[register, codes, text]. `{name}` in a text or a filling is replaced by one of that slot's fillings. The word `typos` among the codes
roughens the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_SLOT = re.compile(r"\{(\w+)\}")
_TRIES = 12


def filled(text: str, slots: dict[str, list[str]], generator: random.Random) -> str:
    """The text with every slot filled, inner slots too; a slot used twice in one text keeps its filling."""
    choice: dict[str, str] = {}

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in choice:
            choice[name] = _SLOT.sub(fill, generator.choice(slots[name]))
        return choice[name]
    return _SLOT.sub(fill, text)


def roughened(text: str, generator: random.Random) -> str:
    """Lower case, dropped apostrophes, and a swapped or lost letter in some long words."""
    def slip(word: str) -> str:
        if len(word) < 6 or not word.isalpha() or generator.random() > 0.12:
            return word
        at = generator.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2:] if generator.random() < 0.6 else word[:at] + word[at + 1:]
    return " ".join(slip(word) for word in text.lower().replace("'", "").split(" "))


def written(path: Path, seed: int) -> Iterator[tuple[str, str, str, list[str]]]:
    """Register, text, origin and codes of every text of a grammar."""
    grammar: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    seen: set[str] = set()
    for number, (register, marks, frame) in enumerate(grammar["frames"]):
        generator = random.Random(f"{seed}:{path.name}:{number}")
        codes = [mark for mark in marks.split() if mark != "typos"]
        texts = (filled(frame.strip(), grammar["slots"], generator) for _ in range(_TRIES))
        new = [text for text in dict.fromkeys(texts) if text not in seen][:grammar["take"]]
        seen.update(new)
        for text in new:
            yield register, roughened(text, generator) if "typos" in marks else text, f"grammar:{path.name}#{number}", codes
