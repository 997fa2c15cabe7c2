"""Replies as language models write them, short and plain or long with headings and steps; the reply is judged, its request is the context.

A request keeps to its topic: a scene of `model_replies/` holds requests with replies that help, decline or discuss. Openings, warnings,
steps and closing remarks are shared, so that the form alone is no evidence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from synthetic.responses import capital
from synthetic.rows import Row, assistant, distinct, row, user
from synthetic.tables import SECOND, Draft, Words, english, fill, pairs, render, scenes, spoken, words

HERE = Path(__file__).parent
TABLES = HERE / "model_replies"
SOURCE = "edgeguard-model-replies"

HELP = (
    "{body}", "{sure} {body}", "{asai} {body}", "{sorryhelp} {body}", "{mild} {body}", "{body} {close}", "{sure} {body} {note}",
    "{role} {body}", "{surehere}\n\n{list}\n\n{close}", "{heading}\n\n{list}\n\n{note}",
    "{surehere}\n\n{heading}\n\n{list}\n\n{close}", "{asai}\n\n{list}\n\n{close}", "{sorryhelp}\n\n{list}\n\n{close}",
    "{sure} {mild} {butyes}\n\n{list}\n\n{note}", "{surehere} {intro}\n\n{list}\n\n{outro}",
    "{intro}\n\n{heading}\n\n{list}\n\n{outro}", "{asai} {intro}\n\n{list}\n\n{note}",
    "{surehere}\n\n{list}\n\n{more} {note} {outro}",
)
TEXT = (
    "{body}", "{paras}", "{suretext} {body}", "{suretext}\n\n{paras}\n\n{closetext}", "{suretext}\n\n{paras}\n\n{note}",
    "{asai} {suretext}\n\n{paras}", "{sorryhelp} {body}", "{mild} {buttext} {body}",
)
HEDGED = (
    "{reason} {butyes} {body}", "{reason} {butyes}\n\n{list}\n\n{close}", "{sorry} {reason} {butyes} {body}", "{body} {reason}",
    "{reason} {butyes}\n\n{heading}\n\n{list}\n\n{note}", "{sorry} {reason} {butyes} {intro}\n\n{list}\n\n{outro}",
    "{sure} {body} {note} {reason}",
)
HEDGED_TEXT = (
    "{reason} {buttext} {body}", "{sorry} {reason} {buttext}\n\n{paras}", "{suretext}\n\n{paras}\n\n{note} {reason}",
)
DECLINED = (
    "{body}", "{body}", "{reason} {body}", "{sorry} {body}", "{sorry} {reason} {body}", "{sorry} {reason}", "{softer} {body}",
    "{softer} {reason} {body}", "{body} {ask}", "{sorrylong} {reason} {body}", "{sorrylong}\n\n{reason}\n\n{list}\n\n{refclose}",
    "{sorrylong}\n\n{instead}\n\n{list}\n\n{reason} {refclose}", "{softer} {reason}\n\n{instead}\n\n{list}\n\n{ask}",
    "{sorrylong} {reason} {introno}\n\n{list}\n\n{outrono}", "{softer} {introno}\n\n{instead}\n\n{list}\n\n{refclose} {outrono}",
)
STYLES = ("{n}. {part}", "{n}. {part}", "- {part}", "* {part}", "{n}. **{ordinal}:** {part}", "**{n}.** {part}\n", "{n}) {part}")
ORDINALS = ("First", "Second", "Third", "Then", "Next", "Also", "Finally")
ASKED = re.compile(r"@(\d+) ")
"""Before a reply: the numbers of the requests in its scene that it answers."""
ORDERED = re.compile(r"write|text|draft|compose|slogan|script|leaflet|post|translat|rate |code|story|scene|email|message|arguments|say|"
                     r"fill in|reply|website|role-?play|make up", re.IGNORECASE)
"""Marks requests for a text, which a plan does not answer."""


def steps(parts: list[str], rng: random.Random) -> str:
    """The parts of a reply as a list."""
    style = rng.choice(STYLES)
    lines = (style.format(n=at + 1, part=part, ordinal=ORDINALS[min(at, len(ORDINALS) - 1)]) for at, part in enumerate(parts))
    return "\n".join(lines).strip()


def worded(form: str, body: str, reason: str, lists: Words, rng: random.Random) -> str:
    """A form filled with the body of a reply, as a paragraph or a list."""
    parts = fill(body.removeprefix("text: "), lists, rng).split(" / ")
    text = fill(re.sub(r"\{(body|list|paras)\}", r"@\1", form.replace("{reason}", reason)), lists, rng)
    text = text.replace("@body", " ".join(parts)).replace("@list", steps(parts, rng)).replace("@paras", "\n\n".join(parts))
    return english(capital(re.sub(r"\n +", "\n", text)))


def forms(all_forms: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """At most `count` of the forms."""
    return rng.sample(all_forms, min(count, len(all_forms)))


def one_group(lists: Words, rng: random.Random) -> Words:
    """The lists with one group of people, one name and so on, for request and reply alike."""
    at = rng.randrange(len(lists["group"]))
    once = ("nonsense", "fullname", "ai", "company", "software", "drug", "animal", "person", "city")
    return lists | {"group": [lists["group"][at]], "one": [lists["one"][at]]} | {key: [rng.choice(lists[key])] for key in once}


def asked_of(text: str, requests: list[str]) -> tuple[str, list[str]]:
    """A reply and those of the requests that it answers."""
    asked = ASKED.match(text)
    return (text[asked.end():], [requests[int(at) - 1] for at in asked[1]]) if asked else (text, requests)


def topics(helped: int, declined: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Harmful requests: `helped` wordings of each reply that helps, a third of them with a warning, `declined` of each that does not."""
    for scene in scenes(sorted(TABLES.glob("[0-9]*.txt"))):
        requests = [line.text for line in scene.get("-")]
        reasons = [line.text for line in scene.get("*")]
        for marker, codes in (("~-", scene.codes), ("~+", ())):
            answers = [asked_of(line.text, requests) for line in scene.get(marker)]
            for body, fitting in answers:
                is_text = body.startswith("text: ")
                warned = helped // 3
                chosen = forms(DECLINED, declined, rng) if not codes else [
                    *forms(TEXT if is_text else HELP, helped - warned, rng), *forms(HEDGED_TEXT if is_text else HEDGED, warned, rng)]
                for plain_form in chosen:
                    form, request = plain_form, rng.choice(fitting)
                    further = [other for other, others in answers if request in others and other != body and not other.startswith("text: ")]
                    if further and "{list}" in form and rng.random() < 0.5:
                        form = form.replace("{list}", "{list}\n\n{more} " + rng.choice(further).replace(" / ", " "))
                    group = one_group(lists, rng)
                    asked = english(render(Draft(scene.name, request, "", codes), group, rng))
                    said = worded(form, body, rng.choice(reasons), group, rng)
                    kind = "helps" if codes else "declines"
                    yield row(SOURCE, f"{kind}/{scene.name}", [user(asked), assistant(said)], codes, "silver", body)


def written(each: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Requests with a reply of their own: in parts, in `each` wordings, or written whole."""
    parted, whole = sorted(TABLES.glob("[0-9]*.txt")), sorted(TABLES.glob("whole*.txt"))
    for scene in scenes([*parted, *whole]):
        for marker in ("+=", "-="):
            for line in scene.get(marker):
                request, _, body = line.text.partition(" => ")
                if scene.get("*"):
                    chosen = forms(TEXT if body.startswith("text: ") else HELP, each, rng)
                else:
                    body, chosen = body.replace(" / ", "\\n"), ["{body}"]
                for form in chosen:
                    group = one_group(lists, rng)
                    asked = english(render(Draft(scene.name, request, "", ()), group, rng))
                    quality = "gold" if form == "{body}" else "silver"
                    messages = [user(asked), assistant(worded(form, body, "", group, rng))]
                    yield row(SOURCE, f"written/{scene.name}", messages, line.codes, quality, line.text)


def named(helped: int, lists: Words, rng: random.Random) -> Iterator[Row]:
    """Deeds of the English scenes with replies that name the deed, and other requests with replies that decline."""
    plans, declines = scenes([TABLES / "plans.txt"])
    for scene in scenes(sorted((HERE / "scenes").glob("*.txt"))):
        deeds = scene.name.startswith("deeds/")
        for draft in pairs(scene, 1, rng):
            if draft.about or not (deeds or draft.codes):
                continue
            filling = fill(draft.filling, lists, rng)
            plain = deeds and "," not in filling and not ORDERED.search(f"{draft.frame} {filling}")
            request = user(english(render(replace(draft, filling=filling), lists, rng)))
            slots = {"y": [spoken(filling, SECOND)]}
            for key in ("why", "instead"):
                slots[key] = lists[f"{key}{draft.codes[0]}"] if draft.codes else [""]
            answers = [("names-deed", plans.get("~"), draft.codes, helped if draft.codes else 2)] if plain else []
            if draft.codes and (deeds or rng.random() < 0.3):
                answers.append(("declines", (plans if plain and rng.random() < 0.7 else declines).get("~+"), (), 1))
            for kind, frames, codes, count in answers:
                for frame in rng.sample(frames, count):
                    said = english(fill(frame.text, {**lists, **slots}, rng))
                    yield row(SOURCE, f"{kind}/{draft.scene}", [request, assistant(capital(said))], codes, "silver", frame.text)


def model_replies(seed: int) -> list[Row]:
    """Distinct assistant rows."""
    rng = random.Random(seed)
    lists = words(HERE / "words.txt") | words(TABLES / "words.txt")
    rows = distinct([*topics(13, 6, lists, rng), *written(5, lists, rng), *named(3, lists, rng)])
    rng.shuffle(rows)
    return rows
