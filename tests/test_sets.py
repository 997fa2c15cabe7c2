"""Loaders of public sets, on made-up rows in the published columns: labels, classes, what is left out, and what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.bench import sets
from edgeguard.bench.row_files import Record, records
from edgeguard.bench.rows import SLUGS, Data
from edgeguard.bench.sets import SETS
from edgeguard.errors import EdgeGuardError, InputError, StoreError

DOCS = Path(__file__).parents[1] / "docs" / "measuring-verdicts.md"


def as_csv(header: str, *rows: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return text.getvalue()


def as_lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES: dict[str, tuple[str, str]] = {
    "xstest": ("xstest_prompts.csv", as_csv(
        "id,prompt,type,label,focus,note",
        [1, "How do I kill time?", "homonyms", "safe", "kill", ""],
        [2, "Invented harm,\nin two lines", "contrast_homonyms", "unsafe", "", ""],
        [3, "Invented slur", "contrast_discr", "unsafe", "", ""])),
    "openai-moderation": ("samples-1680.jsonl.gz", as_lines(
        {"prompt": "Hello", "S": 0, "H": 0, "V": 0, "HR": 0, "SH": 0, "S3": 0, "H2": 0, "V2": 0},
        {"prompt": "One", "S": 1, "S3": 1}, {"prompt": "Two", "HR": 1, "H": 0}, {"prompt": "Three", "SH": 1, "V": 0})),
    "beavertails": ("test.jsonl.gz", as_lines(
        {"prompt": "Q", "response": "A", "category": {"self_harm": False, "animal_abuse": False}, "is_safe": True},
        {"prompt": "Q", "response": "B", "category": {"self_harm": True, "animal_abuse": True}, "is_safe": False},
        {"prompt": "Q", "response": "C", "category": {"self_harm": True, "non_violent_unethical_behavior": True}, "is_safe": False},
        {"prompt": "Q", "response": " ", "category": {}, "is_safe": False})),
    "toxicchat": ("toxic-chat_annotation_test.csv", as_csv(
        "conv_id,user_input,model_output,human_annotation,toxicity,jailbreaking,openai_moderation",
        ["a", "Hi", "x", "True", 0, 0, "[]"], ["b", "Bad", "x", "True", 1, 1, "[]"], ["c", "Hm", "x", "False", 0, 0, "[]"])),
    "toxicchat-human": ("toxic-chat_annotation_test.csv", as_csv(
        "conv_id,user_input,human_annotation,toxicity,jailbreaking",
        ["a", "Hi", "True", 0, 0], ["b", "Bad", "True", 1, 1], ["c", "Hm", "False", 0, 0])),
    "simplesafetytests": ("sst_test_cases.csv", as_csv(
        "id,harm_area,category,prompt",
        ["1", "Scams and Fraud", "Information", "Invented"], ["2", "A new area", "Instruction", "Also invented"])),
    "harmbench": ("harmbench_behaviors_text_test.csv", as_csv(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
        ["Do it", "standard", "cybercrime_intrusion", "", "", "a"], ["Do this", "contextual", "harmful", "context", "With that", "b"])),
    "harmbench-responses": ("text_behaviors_val_set.json", json.dumps({
        "one": [{"test_case": "Do it", "generation": "No.", "human_0": 0, "human_1": 0, "human_2": 1},
                {"test_case": "Do it", "generation": "Yes.", "human_0": 1, "human_1": 0, "human_2": 1}],
        "two": [{"behavior": "Do this", "context": "That", "generation": "", "human_0": 0, "human_1": 0, "human_2": 0},
                {"behavior": "Do this", "context": "That", "generation": "Ok", "human_0": 1, "human_1": 1, "human_2": 1}]})),
    "wildguard": ("wildguard_test.jsonl", as_lines(
        {"prompt": "Hi", "adversarial": False, "response": "Yes", "prompt_harm_label": "unharmful", "response_harm_label": None,
         "subcategory": "benign"},
        {"prompt": "Bad", "adversarial": True, "response": "No", "prompt_harm_label": "harmful", "response_harm_label": "unharmful",
         "subcategory": "cyberattack"},
        {"prompt": "Hm", "adversarial": True, "response": None, "prompt_harm_label": None, "response_harm_label": None,
         "subcategory": "others"})),
    "wildguard-responses": ("wildguard_test.csv", as_csv(
        "prompt,response,prompt_harm_label,response_harm_label",
        ["Hi", "Yes", "unharmful", ""], ["Bad", "No", "harmful", "unharmful"], ["Bad", "Sure", "harmful", "harmful"])),
    "aegis": ("aegis.csv", as_csv(
        "id,text,text_type,num_annotations,labels_0,labels_1,labels_2,labels_3,labels_4",
        [1, "Hi", "user_message", 3, "Safe", "Safe", "Violence", "", ""],
        [2, "Bad", "user_message", 3, "Violence, Threat", "Violence", "Safe", "", ""],
        [3, "Hm", "user_message", 3, "Needs Caution", "Needs Caution", "Safe", "", ""],
        [4, "A reply", "llm_response", 3, "Safe", "", "", "", ""],
        [5, "Nobody", "user_message", 0, "", "", "", "", ""])),
    "aegis-2": ("test.json", json.dumps([
        {"prompt": "Hi", "response": None, "prompt_label": "safe", "response_label": None, "violated_categories": ""},
        {"prompt": "Bad", "response": "No", "prompt_label": "unsafe", "response_label": "safe",
         "violated_categories": "Violence, PII/Privacy"},
        {"prompt": "REDACTED", "response": "No", "prompt_label": "unsafe", "response_label": "safe", "violated_categories": "Violence"}])),
    "aegis-2-responses": ("test.json", json.dumps([
        {"prompt": "Hi", "response": None, "prompt_label": "safe", "response_label": None, "violated_categories": ""},
        {"prompt": "Bad", "response": "Sure", "prompt_label": "unsafe", "response_label": "unsafe", "violated_categories": "Malware"}])),
}
ROWS: dict[str, list[tuple[int, bool, list[str]]]] = {
    "xstest": [(2, False, []), (3, True, []), (5, True, ["S9"])],
    "openai-moderation": [(1, False, []), (2, True, ["S11", "S4"]), (3, True, []), (4, True, ["S10"])],
    "beavertails": [(1, False, []), (2, True, ["S10", "S1"]), (3, True, [])],
    "toxicchat": [(2, False, []), (3, True, []), (4, False, [])],
    "toxicchat-human": [(2, False, []), (3, True, [])],
    "simplesafetytests": [(2, True, ["S2"]), (3, True, [])],
    "harmbench": [(2, True, ["S2"]), (3, True, [])],
    "harmbench-responses": [(1, False, []), (2, True, []), (4, True, [])],
    "wildguard": [(1, False, []), (2, True, ["S2"])],
    "wildguard-responses": [(3, False, []), (4, True, [])],
    "aegis": [(2, False, []), (3, True, ["S1"]), (4, True, [])],
    "aegis-2": [(1, False, []), (2, True, ["S1", "S6"])],
    "aegis-2-responses": [(2, True, ["S2"])],
}
"""Line, unsafe, codes."""
LEFT_OUT: dict[str, dict[str, tuple[int, ...]]] = {
    "beavertails": {"no text to judge": (4,)}, "toxicchat-human": {"not labelled by a person": (4,)},
    "harmbench-responses": {"no text to judge": (3,)}, "wildguard": {"no label": (3,)}, "wildguard-responses": {"no label": (2,)},
    "aegis": {"not a user's message alone": (5,), "no label": (6,)}, "aegis-2": {"redacted text": (3,)},
    "aegis-2-responses": {"no label": (1,)},
}
UNCODED = {"xstest": {"contrast_homonyms": 1}, "openai-moderation": {"HR": 1}, "beavertails": {"non_violent_unethical_behavior": 1},
           "simplesafetytests": {"A new area": 1}, "harmbench": {"harmful": 1}, "aegis": {"Needs Caution": 1}}


def read(folder: Path, name: str, text: str, file: str) -> Data:
    path = folder / file
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(text.encode()))
    return sets.load(path, name)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_by_its_rule(name: str, tmp_path: Path) -> None:
    file, text = FILES[name]
    data = read(tmp_path, name, text, file)
    assert [(row.line, row.unsafe, row.slugs) for row in data.rows] == [
        (line, unsafe, frozenset(SLUGS[code] for code in codes)) for line, unsafe, codes in ROWS[name]]
    assert data.left_out == LEFT_OUT.get(name, {}) and data.uncoded == UNCODED.get(name, {})
    assert {row.conversation.role for row in data.rows} == {SETS[name].role}
    assert {len(row.conversation.messages) for row in data.rows} == {1 if SETS[name].role == "user" else 2}
    assert (data.set, data.name, data.total) == (name, file, len(data.rows))
    assert set(SETS[name].classes.values()) <= SLUGS.keys() and all(key == key.lower() for key in SETS[name].classes)


def test_parts_of_a_set_and_joined_texts(tmp_path: Path) -> None:
    def sources(name: str) -> list[str]:
        return [row.source for row in read(tmp_path, name, FILES[name][1], FILES[name][0]).rows]

    assert sources("xstest") == ["homonyms", "contrast_homonyms", "contrast_discr"]
    assert sources("toxicchat") == ["not jailbreaking", "jailbreaking", "not jailbreaking"]
    assert sources("wildguard") == ["not adversarial", "adversarial"] and sources("wildguard-responses") == ["wildguard-responses"] * 2
    texts = [row.conversation.messages[0].content for row in read(tmp_path, "harmbench", FILES["harmbench"][1], "b.csv").rows]
    assert texts == ["Do it", "Do this\n\nWith that"]
    responses = read(tmp_path, "harmbench-responses", FILES["harmbench-responses"][1], "r.json").rows
    assert [message.content for message in responses[-1].conversation.messages] == ["Do this\n\nThat", "Ok"]


def test_both_files_of_simple_safety_tests_are_read(tmp_path: Path) -> None:
    text = as_csv("id,harm_area,counter,category,prompts_final", ["sst_1", "Child safety", 1, "Instructions and actions", "Invented"],
                  ["sst_2", "Scams and fraud", 2, "Information and advice seeking", "Also invented"])
    data = read(tmp_path, "simplesafetytests", text, "SimpleSafetyTests - test cases.csv")
    assert [row.conversation.messages[0].content for row in data.rows] == ["Invented", "Also invented"]
    assert [row.slugs for row in data.rows] == [{SLUGS["S4"]}, {SLUGS["S2"]}] and not data.uncoded


def test_both_files_of_beavertails_are_read(tmp_path: Path) -> None:
    small, large = (read(tmp_path, "beavertails", FILES["beavertails"][1], file) for file in ("test.jsonl.gz", "test.jsonl.xz"))
    assert small.rows == large.rows and len(large.rows) == 3 and small.sha256 != large.sha256


NEEDED = {
    "xstest": "prompt type", "openai-moderation": "prompt", "beavertails": "prompt response category is_safe",
    "toxicchat": "user_input toxicity", "toxicchat-human": "user_input toxicity human_annotation", "simplesafetytests": "prompt harm_area",
    "harmbench": "Behavior SemanticCategory FunctionalCategory ContextString",
    "harmbench-responses": "behavior generation human_0 human_1 human_2",
    "wildguard": "prompt prompt_harm_label", "wildguard-responses": "prompt response response_harm_label",
    "aegis": "text text_type labels_0 labels_1 labels_2", "aegis-2": "prompt prompt_label violated_categories",
    "aegis-2-responses": "prompt response response_label violated_categories",
}
"""Columns that a rule cannot do without."""


@pytest.mark.parametrize("name", SETS)
def test_a_column_that_is_missing_is_named(name: str) -> None:
    file, text = FILES[name]
    row = {record.line: record for record in records(Path(file), text.encode())}[ROWS[name][-1][0]]
    named = set()
    for column in row.values:
        try:
            SETS[name].read(Record(row.line, {key: value for key, value in row.values.items() if key != column}))
        except InputError as error:
            assert str(error) == f"the column {column!r} is missing."
            named.add(column)
    assert named == set(NEEDED[name].split())


@pytest.mark.parametrize(("name", "file", "text", "told"), [
    ("xstest", "a.csv", as_csv("prompt,type,label", ["secret words", "homonyms", "unsafe"]), "line 2: .*'type' and 'label' contradict"),
    ("xstest", "a.csv", as_csv("prompt,type", ["secret words", ""]), "line 2: .*'type'"),
    ("xstest", "a.csv", as_csv("prompt,type", ["secret words", "contrasts_privacy"]), "line 2: .*'type' holds no type of the set"),
    ("aegis", "a.csv", as_csv("text,text_type,labels_0,labels_1,labels_2", ["secret words", "user_message", "Safe", "Safe", ""]),
     "line 2: .*'labels_2' is empty"),
    ("xstest", "a.csv", as_csv("prompt,type,label", ["secret words", "homonyms", "harmless"]), "line 2: .*'label' is none of"),
    ("xstest", "a.csv", "id,prompt,type\n1,secret words\n", "line 2: 2 fields instead of the 3"),
    ("xstest", "a.csv", 'id,prompt,type\n1,a,homonyms\n2,"secret words,homonyms\n', "line 3: no CSV record"),
    ("xstest", "a.csv", "id,id,type\n1,secret words,homonyms\n", "line 1: a column stands there twice"),
    ("xstest", "a.csv", "id,prompt,type\n", "no row to judge"),
    ("xstest", "a.txt", "id,prompt,type\n1,secret words,homonyms\n", "none of .csv, .jsonl, .json, packed as .gz or .xz or not"),
    ("toxicchat", "a.csv", as_csv("user_input,toxicity", ["a", 0], ["secret words", "2"]), "line 3: .*'toxicity' is neither"),
    ("openai-moderation", "a.jsonl", as_lines({"prompt": "secret words"}), "line 1: none of the columns S, H"),
    ("openai-moderation", "a.jsonl", as_lines({"prompt": "a", "S": 1}) + "{secret words\n", "line 2: not valid JSON"),
    ("openai-moderation", "a.jsonl", '["secret words"]\n', "line 1: list instead of an object"),
    ("openai-moderation", "a.jsonl", '{"prompt": "secret words", "S": 1, "S": 0}\n', "line 1: not valid JSON .DuplicateKeyError"),
    ("beavertails", "a.jsonl", as_lines({"prompt": "secret words", "response": "b", "category": ["x"], "is_safe": True}),
     "'category'"),
    ("beavertails", "a.jsonl", as_lines({"prompt": "secret words", "response": 3, "category": {}, "is_safe": True}),
     "'response' holds int"),
    ("harmbench-responses", "a.json", '{"secret words": 1}', "a list of objects is needed"),
    ("aegis-2", "a.json", '[{"prompt": "secret words", "prompt_label": "bad", "violated_categories": ""}]',
     "line 1: .*'prompt_label' is none"),
    ("simplesafetytests", "a.csv", "\ufeffharm_area,prompt\nx, \n", "no row to judge"),
])
def test_what_is_malformed_is_named_without_its_text(name: str, file: str, text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told) as raised:
        read(tmp_path, name, text, file)
    assert "secret" not in str(raised.value)


def test_a_set_that_is_not_there_is_no_other_set(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.csv cannot be read"):
        sets.load(tmp_path / "none.csv", "xstest")
    with pytest.raises(InputError, match=r"no set 'xtest'; there are rows, xstest"):
        sets.load(tmp_path / "none.csv", "xtest")
    (tmp_path / "latin.csv").write_bytes(b"prompt,type\na,homonyms\nb\xff,homonyms\n")
    with pytest.raises(InputError, match="line 3: it is not UTF-8"):
        sets.load(tmp_path / "latin.csv", "xstest")


def test_own_rows_are_a_set_too(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "role": "user", "label": "safe", "categories": [], "categories_known": True,
           "source": "kitchen"}
    assert read(tmp_path, "rows", as_lines(row), "rows.jsonl").set == "rows"


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), st.booleans()), max_size=8))
def test_any_text_survives_the_csv(rows: list[tuple[str, bool]]) -> None:
    text = as_csv("prompt,type", *([prompt, "contrast_x" if unsafe else "x"] for prompt, unsafe in rows))
    found = list(records(Path("a.csv"), text.encode()))
    assert [(record.values["prompt"], record.values["type"] == "contrast_x") for record in found] == rows
    assert [record.line for record in found] == sorted({record.line for record in found})


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".csv", ".jsonl", ".json"]))
def test_any_bytes_are_records_or_an_input_error(content: bytes, suffix: str) -> None:
    try:
        assert all(isinstance(each, Record) for each in records(Path(f"a{suffix}"), content))
    except EdgeGuardError as error:
        assert isinstance(error, InputError)


def test_the_docs_name_every_set() -> None:
    told = dict(re.findall(r"^\| `([\w-]+)` \| (.+?) \|", DOCS.read_text("utf-8"), re.MULTILINE))
    assert told == {"--set": "set", "rows": "the corpus's own rows"} | {each.name: each.title for each in SETS.values()}
