"""The tables that synthetic rows are made from.

A table is a text file. A scene puts fillings into frames at `{x}`; the filling, the frame or the whole sentence decides the label.

    bank NAME           frames that scenes share, one a line
    scene NAME CODES    begins a scene; CODES (S1 or S2,S6) are those of its unsafe rows
    use / use+ BANK     takes a bank's frames as if they stood here with ~ / ~+
    ~  frame            the filling decides
    ~+ frame            safe with any filling: a question about, against or far from the deed
    ~- frame            unsafe with the fillings marked *
    ~! frame            as ~, but only for unsafe fillings
    +  filling          safe
    -  filling          unsafe; `-S2 filling` has another class
    *  filling          safe in ~+ frames, unsafe in ~- frames
    += / -= / -=S2      a whole message

A frame may also take the filling as `{y}`, spoken to you, or `{z}`, of a third person.
`[a|b|]` is one of its parts, `{name}` a word of the list `name` in words.txt (lines `name: a | b`, a bar between
spaces); both may be nested.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ENTRY = re.compile(r"(~[+!-]?|\*|[+-]=?)((?:S\d+)(?:,S\d+)*)?\s+(.+)")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
BAR = re.compile(r"(?<=\s)\|(?=\s|$)")
VOWEL = re.compile(r"\b([Aa]) (?=[aeioAEIO]|[uU](?!ni|s[eu]|ti|S\b))(?!one\b|once\b|[eE]u)")
START = re.compile(r"(?<=[a-z][.!?] )[a-z]")
ME = re.compile(r"\b(I'm|I am|I|me|my|mine|myself|we|our|us)\b", re.IGNORECASE)
SECOND = {"i'm": "you're", "i am": "you are", "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself",
          "we": "you", "our": "your", "us": "you"}
THIRD = {"i'm": "he's", "i am": "he is", "i": "he", "me": "him", "my": "his", "mine": "his", "myself": "himself",
         "we": "they", "our": "their", "us": "them"}
FITS = (("+", ("~",), True), ("-", ("~", "~!"), False), ("-", ("~+",), True), ("*", ("~+",), True), ("*", ("~-",), False))
"""Marker of the filling, markers of the frames that it goes into, and whether the outcome is safe."""

Words = dict[str, list[str]]


@dataclass(frozen=True)
class Line:
    text: str
    codes: tuple[str, ...]


@dataclass
class Scene:
    name: str
    codes: tuple[str, ...]
    lines: dict[str, list[Line]] = field(default_factory=dict)
    """The marker (~ ~+ ~- ~! + - * += -=) and its lines."""

    def add(self, marker: str, text: str, codes: str | None = None) -> None:
        own = tuple(codes.split(",")) if codes else self.codes
        self.lines.setdefault(marker, []).append(Line(text, own if marker in {"-", "-=", "~-"} else ()))

    def get(self, marker: str) -> list[Line]:
        return self.lines.get(marker, [])


@dataclass(frozen=True)
class Draft:
    """A message to be made: frame and filling, still with choices and slots; no codes means safe."""

    scene: str
    frame: str
    filling: str
    codes: tuple[str, ...]
    about: bool = False
    """The frame is what makes it safe."""


def words(path: Path) -> Words:
    """The word lists of a file."""
    lists: Words = {}
    for line in content(path):
        name, _, items = line.partition(":")
        lists[name.strip()] = [item.strip() for item in BAR.split(items)]
    return lists


def content(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def scenes(paths: Iterable[Path]) -> list[Scene]:
    """The scenes of some tables in order; raises ValueError that names the file and the line that is not of the format."""
    banks: dict[str, list[str]] = {}
    found: list[Scene] = []
    for path in paths:
        bank: list[str] | None = None
        for line in content(path):
            head, _, rest = line.partition(" ")
            match = ENTRY.fullmatch(line)
            if head == "bank":
                bank = banks.setdefault(rest.strip(), [])
            elif head == "scene":
                name, _, codes = rest.strip().partition(" ")
                bank = None
                found.append(Scene(name, tuple(codes.split(",")) if codes else ()))
            elif bank is not None:
                bank.append(line.strip())
            elif head in {"use", "use+"} and rest in banks and found:
                for frame in banks[rest]:
                    found[-1].add(head.replace("use", "~"), frame)
            elif match and found:
                found[-1].add(match[1], match[3].strip(), match[2])
            else:
                raise ValueError(f"{path.name}: not a line of a table: {line!r}")
    return found


def pairs(scene: Scene, each: int, rng: random.Random) -> Iterator[Draft]:
    """Every filling in at most `each` frames that leave its label and a third as many that decide it, then the whole messages."""
    for marker, frames, safe in FITS:
        choices = [line for frame in frames for line in scene.get(frame)]
        for filling in scene.get(marker):
            count = each if marker != "-" or "~" in frames else -(-each // 3)
            for frame in rng.sample(choices, min(count, len(choices))):
                codes = () if safe else filling.codes or frame.codes
                yield Draft(scene.name, frame.text, filling.text, codes, frames == ("~+",))
    for marker in ("+=", "-="):
        for line in scene.get(marker):
            variants = 1 + min(3, len(CHOICE.findall(line.text)) + len(SLOT.findall(line.text)))
            for _ in range(variants):
                yield Draft(scene.name, line.text, "", line.codes)


def render(draft: Draft, lists: Words, rng: random.Random) -> str:
    """The message of a draft; raises KeyError for a slot without a list."""
    filling = fill(draft.filling, lists, rng)
    frame = draft.frame.replace("{x}", filling).replace("{y}", spoken(filling, SECOND)).replace("{z}", spoken(filling, THIRD))
    text = fill(frame, lists, rng)
    return text[:1].upper() + text[1:] if text[-1:] in ".?!" and rng.random() < 0.8 else text


def spoken(text: str, person: dict[str, str]) -> str:
    """A filling that speaks of me, made to speak of you or him."""
    return ME.sub(lambda match: person[match[0].lower()], text)


def fill(text: str, lists: Words, rng: random.Random) -> str:
    """Choices and slots replaced, double spaces made single."""
    while True:
        choice = CHOICE.search(text)
        slot = SLOT.search(text)
        if choice:
            text = text[: choice.start()] + rng.choice(choice[1].split("|")) + text[choice.end():]
        elif slot:
            text = text[: slot.start()] + rng.choice(lists[slot[1]]) + text[slot.end():]
        else:
            return re.sub(r" {2,}", " ", text).replace("\\n", "\n").strip()


def english(text: str) -> str:
    """`a` made `an` before a vowel, sentences begun with a capital after a full stop."""
    return START.sub(lambda match: match[0].upper(), VOWEL.sub(r"\1n ", text))
