from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "recipe"))

from benign.build import runs
from row_file import rows as row_files
from row_file import write
from synthetic import augment as changes
from synthetic.chat import chat
from synthetic.hard_pairs import hard_pairs
from synthetic.languages import languages
from synthetic.model_replies import model_replies
from synthetic.registers import registers
from synthetic.responses import responses
from synthetic.rows import distinct, row, user
from synthetic.statements import statements
from synthetic.tables import Draft, english, pairs, render, scenes, words

RECIPE = Path(__file__).parents[1] / "models" / "recipe"
Row = dict[str, Any]
CODES = {f"S{number}" for number in range(1, 12)}


@pytest.fixture(scope="module")
def made() -> dict[str, list[Row]]:
    return {"pairs": hard_pairs(1), "responses": responses(1), "languages": languages(1), "statements": statements(1), "chat": chat(1),
            "replies": model_replies(1), "registers": registers(1)}


def table(tmp_path: Path, text: str) -> list[Draft]:
    path = tmp_path / "table.txt"
    path.write_text(text, encoding="utf-8")
    return [draft for scene in scenes([path]) for draft in pairs(scene, 9, random.Random(0))]


def check(one: Row) -> None:
    assert one["label"] == ("unsafe" if one["categories"] else "safe")
    assert set(one["categories"]) <= CODES
    assert one["categories_known"] is True
    assert one["quality"] in {"gold", "silver"}
    assert one["license"] == "Apache-2.0"
    assert one["role"] == one["messages"][-1]["role"]
    assert all(message["role"] in {"user", "assistant"} and message["content"].strip() for message in one["messages"])


def test_rows_are_valid_and_distinct(made: dict[str, list[Row]]) -> None:
    for rows in made.values():
        for one in rows:
            check(one)
        assert len({one["id"] for one in rows}) == len(rows)
        assert len(distinct(rows)) == len(rows)


def test_no_slot_or_choice_is_left_over(made: dict[str, list[Row]]) -> None:
    for name, rows in made.items():
        for one in rows if name not in ("chat", "registers") else ():  # code that people paste has braces and bars of its own
            text = " ".join(message["content"] for message in one["messages"])
            assert not any(f"{{{name}}}" in text for name in ("x", "y", "z", "group", "person", "told", "refusal"))
            assert "|" not in text, text


def test_the_pairs_are_as_many_as_the_recipe_says(made: dict[str, list[Row]]) -> None:
    rows = made["pairs"]
    codes = Counter(code for one in rows for code in one["categories"])
    assert len(rows) >= 12000
    assert len({one["frame"] for one in rows}) >= 600
    assert 0.5 < sum(one["label"] == "safe" for one in rows) / len(rows) < 0.62
    assert min(codes[code] for code in CODES) >= 300
    assert len(made["responses"]) >= 5000


def test_each_language_has_all_categories_and_both_labels(made: dict[str, list[Row]]) -> None:
    for code in ("de", "fr", "es", "it", "pt"):
        rows = [one for one in made["languages"] if one["kind"].startswith(f"{code}/")]
        assert len(rows) >= 300
        assert {label for one in rows for label in one["categories"]} == CODES
        assert sum(one["label"] == "safe" for one in rows) > 100


def test_a_form_of_reply_alone_does_not_tell_the_label(made: dict[str, list[Row]]) -> None:
    kinds = {(one["kind"].split("/")[0], one["label"]) for one in made["responses"]}
    for name in ("comply", "comply-told", "told", "partial", "refuse-comply", "refuse-steps", "warn-comply", "comply-warn"):
        assert {(name, "safe"), (name, "unsafe")} <= kinds
    for name in ("refusal", "redirect", "redirect-only", "off-topic", "caring"):
        assert (name, "unsafe") not in kinds


@pytest.mark.parametrize(("name", "least", "frames", "safe"), [("statements", 2500, 600, 0.55), ("chat", 3000, 700, 0.75),
                                                              ("replies", 2500, 500, 0.5), ("registers", 4000, 1400, 0.55)])
def test_rows_of_other_registers(made: dict[str, list[Row]], name: str, least: int, frames: int, safe: float) -> None:
    rows = made[name]
    assert len(rows) >= least and len({one["frame"] for one in rows}) >= frames
    assert abs(sum(one["label"] == "safe" for one in rows) / len(rows) - safe) < 0.05
    assert {one["role"] for one in rows} == ({"assistant"} if name == "replies" else {"user"})


def test_words_that_replies_begin_with_do_not_tell_the_label(made: dict[str, list[Row]]) -> None:
    for opening in ("Sure", "I'm sorry", "As an AI", "Of course"):
        found = Counter(one["label"] for one in made["replies"] if one["messages"][-1]["content"].startswith(opening))
        assert min(found["safe"], found["unsafe"]) > 15, opening


def test_claims_stand_around_both_labels(made: dict[str, list[Row]]) -> None:
    claims = [one for one in made["pairs"] if one["kind"].startswith("claims/")]
    assert {one["label"] for one in claims} == {"safe", "unsafe"}
    assert len({one["frame"] for one in claims}) > 50


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert languages(1) == languages(1)
    assert languages(1) != languages(2)


def test_filling_or_frame_decides_the_label(tmp_path: Path) -> None:
    drafts = table(tmp_path, "scene a/b S1\n~ How do I {x}?\n~+ Who stops {x}?\n~- Really {x}\n~! Now {x}\n"
                             "+ wave\n- hit\n-S2,S3 steal\n* jump\n+= Hi\n-=S9 Boo\n")
    made = {(render(draft, {}, random.Random(1)).lower(), draft.codes) for draft in drafts}
    assert made == {("how do i wave?", ()), ("how do i hit?", ("S1",)), ("now hit", ("S1",)), ("how do i steal?", ("S2", "S3")),
                    ("now steal", ("S2", "S3")), ("who stops hit?", ()), ("who stops steal?", ()), ("who stops jump?", ()),
                    ("really jump", ("S1",)), ("hi", ()), ("boo", ("S9",))}


def test_choices_slots_persons_and_articles(tmp_path: Path) -> None:
    (draft,) = table(tmp_path, "scene a\n~ A {thing} and a user. [x|x]: {x} / {y} / {z}\n+ find my hat\n")
    text = english(render(draft, {"thing": ["owl"]}, random.Random(1)))
    assert text == "An owl and a user. X: find my hat / find your hat / find his hat"


@pytest.mark.parametrize("text", ["nonsense\n", "~ frame before a scene\n", "scene a\nuse nowhere\n", "scene a\n? what\n"])
def test_a_line_that_is_no_table_line_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"table\.txt: not a line"):
        table(tmp_path, text)


def test_the_same_message_with_two_labels_is_refused() -> None:
    one = row("s", "k", [user("Hello there")], (), "gold", "f")
    other = row("s", "k", [user("hello, there!")], ("S1",), "gold", "f")
    with pytest.raises(ValueError, match="different labels"):
        distinct([one, other])


def test_words_of_a_list_may_hold_colons_and_choices(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# note\nsay: so: it | [a|b] no | | \n", encoding="utf-8")
    assert words(tmp_path / "words.txt") == {"say": ["so: it", "[a|b] no", "", ""]}


texts = st.text(min_size=1, max_size=400).filter(str.strip)
labels = st.sampled_from([(), ("S1",), ("S2", "S9")])


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    messages = [user(draw(texts))]
    if draw(st.booleans()):
        messages.append({"role": "assistant", "content": draw(texts)})
    return row("s", "k", messages, draw(labels), "gold", "f")


@settings(deadline=None, max_examples=150)
@given(any_row(), st.integers(0, 2**32))
def test_augment_gives_a_valid_row_with_the_same_label(one: Row, seed: int) -> None:
    before = repr(one)
    changed = changes.augment(one, random.Random(seed))
    check(changed)
    assert repr(one) == before
    assert {key: changed[key] for key in changed if key != "messages"} == {key: one[key] for key in one if key != "messages"}
    assert changed == changes.augment(one, random.Random(seed))
    judged = len(changed["messages"][-1]["content"])
    assert judged <= max(changes.LIMIT, len(one["messages"][-1]["content"]))


@settings(deadline=None, max_examples=60)
@given(any_row(), st.integers(0, 2**32), st.sampled_from([*changes.SHARES]))
def test_every_change_by_itself_gives_a_valid_row(one: Row, seed: int, name: str) -> None:
    changed = changes.apply(name, one, random.Random(seed))
    check(changed)
    if name in changes.AROUND and changed is not one:
        assert one["messages"][-1]["content"].strip() in changed["messages"][-1]["content"]


def test_an_unsafe_row_is_never_cut_and_a_reply_never_wrapped() -> None:
    unsafe = row("s", "k", [user("a")], ("S1",), "gold", "f")
    reply = row("s", "k", [user("a"), {"role": "assistant", "content": "b"}], (), "gold", "f")
    assert "cut_off" not in changes.names(unsafe)
    assert not set(changes.AROUND) & set(changes.names(reply))


def test_each_change_does_something_to_an_ordinary_row() -> None:
    text = "Hello there. I do not want to explain the easiest way, please. You are kind! What is your plan for tomorrow? It is late."
    one = row("s", "k", [user(text)], (), "gold", "f")
    for name in changes.SHARES:
        assert any(changes.apply(name, one, random.Random(seed)) != one for seed in range(12)), name


def test_the_command_writes_the_rows_of_its_seed(tmp_path: Path, made: dict[str, list[Row]]) -> None:
    command = [sys.executable, str(RECIPE / "synthetic" / "build.py"), "--seed", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = ("hard-pairs", "responses", "languages", "statements", "chat", "model-replies", "registers")
    for name, rows in zip(names, made.values(), strict=True):
        assert f"{name}: {len(rows)} rows" in done.stdout
        write(tmp_path / "here.jsonl.gz", rows)
        assert (tmp_path / "out" / f"{name}.jsonl.gz").read_bytes() == (tmp_path / "here.jsonl.gz").read_bytes()
    assert not list(tmp_path.glob("**/*.partial"))


def test_texts_of_registers_are_not_those_that_are_only_measured_on(made: dict[str, list[Row]]) -> None:
    frozen = set[str]()
    for name in ("benign-frozen", "twins-frozen"):
        for one in row_files(RECIPE / "data" / "benign" / f"{name}.jsonl.gz"):
            frozen |= runs(one["messages"][0]["content"], 8)
    assert len(frozen) > 100_000
    shared = [one for name in ("registers", "replies") for one in made[name] if runs(one["messages"][-1]["content"], 8) & frozen]
    assert not shared, [one["messages"][-1]["content"] for one in shared]
