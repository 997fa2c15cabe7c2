"""Replies to safe and unsafe requests: refusals, help, redirects, compliance, and mixtures of them. The reply is judged.

The same forms of compliance ("Sure! Step 1 ...") answer safe and unsafe requests, so that the form alone is no evidence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from synthetic.rows import Row, assistant, distinct, row, user
from synthetic.tables import SECOND, Draft, Words, english, fill, pairs, render, scenes, spoken, words

HERE = Path(__file__).parent
SOURCE = "edgeguard-responses"

FORMS = {
    # kind: share, the reply, whether it says what was asked for
    "refusal": (10, "{refusal}", False),
    "redirect": (5, "{cannot} {redirect}", False),
    "redirect-only": (4, "{redirect} {instead}", False),
    "off-topic": (2, "{offtopic}", False),
    "comply": (6, "{open} {steps}", True),
    "comply-told": (4, "{open} {told}", True),
    "comply-intro": (6, "{open} {intro} {told}", True),
    "told": (4, "{told} {close}", True),
    "told-intro": (3, "{intro} {told} {close}", True),
    "partial": (4, "{half} you can {y}. {told}", True),
    "refuse-comply": (3, "{refusal} {but} {told}", True),
    "refuse-intro": (4, "{refusal} {but} {intro} {told}", True),
    "refuse-steps": (3, "{refusal} {but} {steps}", True),
    "warn-comply": (3, "{warn} {open} {told}", True),
    "warn-intro": (3, "{warn} {intro} {told}", True),
    "comply-warn": (4, "{intro} {told} {warn}", True),
}
NOUNS = {"question/nouns", "context/history-news", "groups/hate", "writing/threats", "writing/frauds", "writing/hate", "writing/rest"}
"""Scenes whose fillings are not deeds."""
CARING = "{caring} {line} [{redirect}|]"
TURNED = ("{offtopic} {harm}", "{open} {harm}", "{harm}", "{harm} {close}", "{warn} {harm}")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def told(codes: tuple[str, ...], lists: Words, rng: random.Random) -> str:
    """What a reply says that does what was asked."""
    return rng.choice(lists.get(f"harm{codes[0]}", lists["anyhow"]) if codes else lists["safe"])


def reply(draft: Draft, deed: str, rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """Kind, form and codes of a reply to a request."""
    if draft.codes == ("S10",) and rng.random() < 0.3:
        return "caring", CARING, ()
    if draft.about and "{z}" in draft.frame and rng.random() < 0.7:
        return "inform", "{inform} [{inform}|]", ()
    names = [name for name, (_, form, asked) in FORMS.items()
             if (deed or not any(slot in form for slot in ("{y}", "{steps}", "{intro}"))) and not (draft.about and asked)]
    # a refusal of a harmless request is rare, and safe
    name = rng.choices(names, [FORMS[name][0] * (0.25 if not draft.codes and not FORMS[name][2] else 1) for name in names])[0]
    _, form, asked = FORMS[name]
    return name, form, draft.codes if asked else ()


def answered(each: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Requests of the English scenes with a reply, `each` replies where the request is unsafe."""
    for scene in scenes(sorted((HERE / "scenes").glob("*.txt"))):
        for draft in pairs(scene, 3, rng):
            filling = fill(draft.filling, lists, rng)
            request = english(render(replace(draft, filling=filling), lists, rng))
            deed = "" if scene.name in NOUNS else filling
            for _ in range(each if draft.codes else 1):
                name, form, codes = reply(draft, deed, rng)
                text = form.replace("{told}", told(codes, lists, rng))
                said = fill(text, {**lists, "y": [spoken(deed, SECOND) or "do that"]}, rng)
                yield row(SOURCE, f"{name}/{draft.scene}", [user(request), assistant(english(capital(said)))], codes, "silver", form)


def turned(share: float, requests: list[str], lists: Words, rng: random.Random) -> Iterator[Row]:
    """Harmful replies to harmless requests."""
    for request in rng.sample(requests, int(share * len(requests))):
        code = rng.choice([name.removeprefix("harm") for name in lists if name.startswith("harm")])
        form = rng.choice(TURNED)
        said = fill(form.replace("{harm}", rng.choice(lists[f"harm{code}"])), lists, rng)
        yield row(SOURCE, f"turned/{code}", [user(request), assistant(english(capital(said)))], (code,), "silver", form)


def written(lists: Words, rng: random.Random) -> Iterator[Row]:
    """Questions with answers that are written whole, and fiction."""
    for scene in scenes([HERE / "replies" / name for name in ("answers.txt", "answers2.txt", "fiction.txt")]):
        for marker in ("+", "-"):
            for line in scene.get(marker):
                question, _, answer = line.text.partition(" => ")
                yield row(SOURCE, f"written/{scene.name}", [user(question), assistant(answer)], line.codes, "gold", line.text)
        for draft in pairs(scene, 6, rng):
            question, _, answer = draft.frame.partition(" => ")
            if draft.filling and answer:
                texts = [english(render(replace(draft, frame=frame), lists, rng)) for frame in (question, answer)]
                yield row(SOURCE, f"written/{scene.name}", [user(texts[0]), assistant(texts[1])], draft.codes, "silver", draft.frame)


def responses(seed: int, each: int = 2) -> list[Row]:
    """Distinct assistant rows."""
    rng = random.Random(seed)
    lists = words(HERE / "words.txt") | words(HERE / "replies" / "words.txt")
    rows = list(answered(each, lists, rng))
    asked = sorted({one["messages"][0]["content"] for one in rows if one["kind"].startswith(("comply", "told")) and one["label"] == "safe"})
    rows = distinct([*rows, *turned(0.5, asked, lists, rng), *written(lists, rng)])
    rng.shuffle(rows)
    return rows
