"""Matched pairs: one frame, and a filling that turns it safe or unsafe; or one filling, and frames that do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from synthetic.rows import Row, assistant, distinct, row, user
from synthetic.tables import Words, content, english, fill, pairs, render, scenes, words

HERE = Path(__file__).parent
SOURCE = "edgeguard-hard-pairs"
GOES_ON = {"figurative", "deeds", "sexual", "weapons", "property", "privacy", "temper", "writing"}
"""Scenes with requests that one can go on with."""


def plain_pairs(each: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    for scene in scenes(sorted((HERE / "scenes").glob("*.txt"))):
        for draft in pairs(scene, each, rng):
            quality = "silver" if draft.filling else "gold"
            one = row(SOURCE, draft.scene, [user(english(render(draft, lists, rng)))], draft.codes, quality, draft.frame)
            yield one | {"about": draft.about}


def claims(rows: list[Row], share: float, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Some rows with a plea, a claim or a false system message around them, which must not move the verdict."""
    frames = content(HERE / "claims.txt")
    for one in rng.sample(rows, int(share * len(rows))):
        frame = rng.choice(frames)
        before, _, after = frame.partition("{x}")
        text = f"{fill(before, lists, rng)}{gap(before)}{one['messages'][0]['content']}{gap(after)}{fill(after, lists, rng)}"
        yield row(SOURCE, f"claims/{one['kind']}", [user(text)], one["categories"], one["quality"], frame)


def follow_ups(rows: list[Row], share: float, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Some rows with a reply and a turn that goes on with the request, which keeps its label, or turns to something harmless."""
    requests = [one for one in rows if "/" in one["kind"] and one["kind"].split("/")[0] in GOES_ON and not one["about"]]
    for one in rng.sample(requests, int(share * len(rows))):
        name = rng.choices(("goes-on", "turns-away"), (3, 1))[0]
        answer, last = (english(fill(rng.choice(lists[key]), lists, rng)) for key in ("answer", name))
        codes = one["categories"] if name == "goes-on" else ()
        messages = [*one["messages"], assistant(answer), user(last)]
        yield row(SOURCE, f"{name}/{one['kind']}", messages, codes, "silver", f"{name}: {last}")


def gap(part: str) -> str:
    """What stands between a message and the claim beside it: a new line where the frame has one, else a space."""
    return "\n" if "\\n" in part else " " if part.strip() else ""


def hard_pairs(seed: int, each: int = 9, share: float = 0.08) -> list[Row]:
    """Distinct user rows, `share` of them once more with a claim around them, and as many in a conversation that goes on."""
    rng = random.Random(seed)
    lists = words(HERE / "words.txt") | words(HERE / "turns.txt")
    rows = distinct(plain_pairs(each, lists, rng))
    rows = distinct([*rows, *claims(rows, share, lists, rng), *follow_ups(rows, share, lists, rng)])
    rng.shuffle(rows)
    return [{key: one[key] for key in one if key != "about"} for one in rows]
