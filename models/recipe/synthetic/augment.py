"""Changes of a row that leave its label as it is: how it is typed, what stands around it, how long it is.

`augment(row, rng)` gives a changed copy. Wrappers, quotes and chatter go around safe and unsafe messages alike, so that they
are no evidence; text that is cut off is only ever that of a safe row. Nothing grows beyond `LIMIT` characters, so that what
decides the label stays within the tokens that training keeps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from synthetic.tables import Words, words

Row = dict[str, Any]
Change = Callable[[str, random.Random], str]

LIMIT = 700
DENSE, DENSE_LIMIT = {"casing", "leet", "spacing"}, 250
"""Changes that need more tokens a character, and the length of what they are made on."""
KEYS = {"a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "k": "jl", "l": "k",
        "m": "n", "n": "bm", "o": "ip", "p": "o", "r": "et", "s": "ad", "t": "ry", "u": "yi", "v": "cb", "w": "qe", "y": "tu"}
LEET = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"})
SWAPS = re.compile(r"\w+(?:'\w+)?")


@cache
def lists() -> Words:
    return words(Path(__file__).parent / "changes.txt")


def typos(text: str, rng: random.Random) -> str:
    """One slip in about twelve words: letters swapped, doubled, dropped or hit beside; short words stay."""
    def slip(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < 5 or rng.random() > 1 / 8:
            return word
        at = rng.randrange(1, len(word) - 1)
        beside = rng.choice(KEYS.get(word[at].lower(), word[at]))
        return rng.choice((word[:at] + word[at + 1] + word[at] + word[at + 2:], word[:at] + word[at] + word[at:],
                           word[:at] + word[at + 1:], word[:at] + beside + word[at + 1:]))

    return re.sub(r"[^\W\d_]+", slip, text)


def casing(text: str, rng: random.Random) -> str:
    return rng.choice((str.lower, str.lower, str.upper, str.title, str.swapcase))(text)


def unpunctuated(text: str, rng: random.Random) -> str:
    kept = re.sub(rng.choice((r"[.?!]+\s*$", r"[.,?!;:]", r"['\u2019]", r"[,;:]")), "", text)
    return kept if kept.strip() else text


def shouting(text: str, rng: random.Random) -> str:
    return text.rstrip(".?! ") + rng.choice(("!!", "??", "?!", "...", "!!!1", " ?", " !", "????"))


def leet(text: str, rng: random.Random) -> str:
    """Digits for letters in some of the words."""
    share = rng.choice((0.2, 0.4, 1.0))
    return re.sub(r"[A-Za-z]+", lambda match: match[0].translate(LEET) if rng.random() < share else match[0], text)


def spacing(text: str, rng: random.Random) -> str:
    """Double, missing or exotic spaces, or one word spelled out."""
    parts = text.split(" ")
    at = rng.randrange(len(parts))
    how = rng.randrange(4)
    if how == 0:
        parts[at] = " ".join(parts[at]) if len(parts[at]) < 12 else parts[at]
    if how == 1 and at + 1 < len(parts):
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return rng.choice(("  ", "\n", " \u200b", "\t")).join(parts) if how == 2 else " ".join(parts)


def exchange(name: str, share: float) -> Change:
    """Exchanges words for those beside them in the list `name`, each with probability `share`."""
    def change(text: str, rng: random.Random) -> str:
        for item in lists()[name]:
            left, _, right = item.partition("/")
            if rng.random() < share:
                text = re.sub(rf"\b{re.escape(left)}\b", right, text)
        return text

    return change


def chatter(text: str, rng: random.Random) -> str:
    """A greeting, an excuse or thanks before or behind."""
    before, after = rng.choice(((1, 0), (0, 1), (1, 1)))
    parts = [placed("{before}", "", rng)] * before + [text] + [placed("{after}", "", rng)] * after
    return rng.choice((" ", " ", "\n")).join(parts)


def quoted(text: str, rng: random.Random) -> str:
    return placed("{quote}", text, rng)


def wrapped(text: str, rng: random.Random) -> str:
    """A jailbreak around any message."""
    return placed("{wrap}", text, rng)


def buried(text: str, rng: random.Random) -> str:
    """Harmless paragraphs around a message."""
    parts = [text]
    for paragraph in rng.sample(lists()["paragraph"], rng.randint(1, 3)):
        if len(paragraph) + sum(map(len, parts)) < LIMIT - 8:
            parts.insert(rng.randint(0, len(parts)), paragraph)
    return rng.choice(("\n\n", "\n", " ")).join(parts)


def cut_off(text: str, _: random.Random) -> str:
    """The first half of four or more sentences; only for safe rows."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(sentences[: (len(sentences) + 1) // 2]) if len(sentences) >= 4 else text


def placed(form: str, text: str, rng: random.Random) -> str:
    """A form with its slots filled from the lists, `{x}` last, so that nothing in the text is taken for a slot."""
    while True:
        slot = re.search(r"\{(?!x\})(\w+)\}", form)
        if slot is None:
            return form.replace("\\n", "\n").replace("{x}", text)
        form = form[: slot.start()] + rng.choice(lists()[slot[1]]) + form[slot.end():]


TYPING: dict[str, Change] = {
    "typos": typos, "casing": casing, "unpunctuated": unpunctuated, "shouting": shouting, "leet": leet, "spacing": spacing,
    "synonyms": exchange("synonyms", 0.5), "contractions": exchange("contractions", 1.0), "chat": exchange("chat", 0.6),
}
AROUND: dict[str, Change] = {"chatter": chatter, "quoted": quoted, "wrapped": wrapped, "buried": buried}
SHARES = {"typos": 5, "casing": 5, "unpunctuated": 5, "shouting": 2, "leet": 1, "spacing": 2, "synonyms": 4, "contractions": 4,
          "chat": 3, "chatter": 5, "quoted": 3, "wrapped": 4, "buried": 4, "cut_off": 2, "small_talk": 4}


def changed(row: Row, change: Change, rng: random.Random) -> Row:
    """A copy whose judged message is changed; the row itself where nothing or too much would come out."""
    *earlier, last = row["messages"]
    text = change(last["content"], rng).strip()
    fits = text and (len(text) <= LIMIT or len(text) <= len(last["content"]))
    return {**row, "messages": [*earlier, {**last, "content": text}]} if fits else row


def small_talk(row: Row, rng: random.Random) -> Row:
    """Harmless turns before the conversation."""
    turns = []
    for exchanged in rng.sample(lists()["talk"], rng.randint(1, 2)):
        question, _, answer = exchanged.partition(" => ")
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**row, "messages": [*turns, *row["messages"]]} if row["messages"][0]["role"] == "user" else row


def apply(name: str, row: Row, rng: random.Random) -> Row:
    """One change by its name."""
    if name == "small_talk":
        return small_talk(row, rng)
    if name in DENSE and len(row["messages"][-1]["content"]) > DENSE_LIMIT:
        return row
    return changed(row, cut_off if name == "cut_off" else (TYPING | AROUND)[name], rng)


def names(row: Row) -> list[str]:
    """The changes that leave the label of a row as it is; replies keep their frame, since nobody wraps what a model says."""
    around = [*AROUND] if row["role"] == "user" else []
    return [*TYPING, *around, "small_talk", *(["cut_off"] if row["label"] == "safe" else [])]


def augment(row: Row, rng: random.Random) -> Row:
    """A copy of the row with one or two changes, the typing last; the same generator state gives the same copy."""
    fit = names(row)
    chosen = set(rng.choices(fit, [SHARES[name] for name in fit], k=rng.choice((1, 1, 2))))
    for name in sorted(chosen, key=lambda name: (name in TYPING, name)):
        row = apply(name, row, rng)
    return row
