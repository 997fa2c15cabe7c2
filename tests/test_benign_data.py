"""The benign texts and the unsafe twins: what the files must hold, that the halves share nothing, and the parts that build them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

RECIPE = Path(__file__).parents[1] / "models" / "recipe"
HERE, DATA = RECIPE / "benign", RECIPE / "data" / "benign"
HALVES = ("train", "frozen")
CODES = {f"S{number}" for number in range(1, 12)}
FREE = {"CC0-1.0", "CC-BY-2.5", "CC-BY-4.0", "MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "curl", "Unlicense", "PD",
        "PD-US", "MASC"}


def module(name: str) -> ModuleType:
    """A module of the recipe, loaded under a name of its own: `build` is also a package."""
    sys.path.insert(0, str(HERE))
    try:
        spec = importlib.util.spec_from_file_location(f"benign_{name}", HERE / f"{name}.py")
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    finally:
        sys.path.remove(str(HERE))


build, filters, grammar, readers = (module(name) for name in ("build", "filters", "grammar", "readers"))


def load(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


BENIGN = {half: load(f"benign-{half}") for half in HALVES}
TWINS = {half: load(f"twins-{half}") for half in HALVES}


def text(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def runs(rows: list[dict[str, Any]], size: int) -> set[str]:
    return set().union(*(build.runs(text(row), size) for row in rows))


# the files

@pytest.mark.parametrize("half", HALVES)
def test_every_row_is_whole(half: str) -> None:
    rows = BENIGN[half] + TWINS[half]
    assert len({row["id"] for row in rows}) == len(rows) == len({text(row) for row in rows})
    for row in rows:
        assert [message["role"] for message in row["messages"]] == [row["role"]] == ["user"]
        assert row["categories_known"] and row["quality"] in {"gold", "silver"} and row["register"] and row["origin"]
        assert row["license"].split(" ")[0] in FREE
        assert (row["label"] == "unsafe") == bool(row["categories"]) and set(row["categories"]) <= CODES
    assert {row["label"] for row in BENIGN[half]} == {"safe"} and {row["label"] for row in TWINS[half]} == {"unsafe"}


@pytest.mark.parametrize("half", HALVES)
def test_the_benign_half_is_large_and_mixed(half: str) -> None:
    rows = BENIGN[half]
    lengths = [len(text(row)) for row in rows]
    registers = Counter(row["register"] for row in rows)
    assert len(rows) >= 2000
    assert max(lengths) <= 3000 and sum(length <= 1200 for length in lengths) >= 0.9 * len(rows)
    assert {"email", "code", "logs", "recipe", "novel", "medical", "news", "chat", "shell", "technical", "legal", "history", "commits",
            "security", "forum", "bug", "essay", "encyclopedia", "museum", "health"} <= set(registers)
    foreign = {name: count for name, count in registers.items() if name.startswith("non-english-")}
    assert set(foreign) == {f"non-english-{language}" for language in ("de", "fr", "es", "it", "pt")}
    assert sum(foreign.values()) >= 200
    assert sum(bool(filters.SCARY.search(text(row))) for row in rows) >= 0.25 * len(rows)
    assert max(registers.values()) <= 0.15 * len(rows)


@pytest.mark.parametrize("half", HALVES)
def test_no_address_number_or_dropped_word_is_left(half: str) -> None:
    for row in BENIGN[half]:
        assert filters.masked(text(row)) == text(row), row["id"]
        if not row["origin"].startswith("grammar:"):
            assert not filters._DROP.search(text(row)), row["id"]


def test_no_source_file_is_in_both_halves() -> None:
    files = [{row["origin"] for row in BENIGN[half]} for half in HALVES]
    names = [{row["source"] for row in BENIGN[half]} for half in HALVES]
    assert not files[0] & files[1] and not names[0] & names[1]
    shared = {row["origin"].split("@")[0] for row in BENIGN["train"]} & {row["origin"].split("@")[0] for row in BENIGN["frozen"]}
    assert all(name.startswith("COST-ELTeC/") for name in shared), "only the novel collections serve both halves, by other books"


def test_the_benign_halves_share_no_run_of_13_words() -> None:
    assert not runs(BENIGN["train"], 13) & runs(BENIGN["frozen"], 13)


@pytest.mark.parametrize("half", HALVES)
def test_the_twins_cover_every_class_and_register(half: str) -> None:
    rows = TWINS[half]
    words = [len(text(row).split()) for row in rows]
    assert len(rows) >= 400 and len({row["origin"] for row in rows}) >= 150
    assert Counter(code for row in rows for code in row["categories"]).keys() == CODES
    assert min(Counter(code for row in rows for code in row["categories"]).values()) >= 10
    assert {"email", "chat", "code", "novel", "logs", "ticket", "social", "forum", "letter"} <= {row["register"] for row in rows}
    assert min(words) >= 5 and max(words) <= 150


@pytest.mark.parametrize("sets", [TWINS, {half: [row for row in BENIGN[half] if row["origin"].startswith("grammar:")] for half in HALVES}])
def test_texts_written_here_share_no_run_of_8_words(sets: dict[str, list[dict[str, Any]]]) -> None:
    assert not runs(sets["train"], 8) & runs(sets["frozen"], 8)


@pytest.mark.parametrize("half", HALVES)
def test_the_twins_are_what_the_grammar_gives(half: str) -> None:
    made = [build.row(f"twins_{half}", "Apache-2.0", *rest) for rest in grammar.written(HERE / f"twins-{half}.yaml", build.SEED)]
    assert made == TWINS[half]


def test_every_source_of_the_data_is_listed_with_its_licence() -> None:
    listed = {source["name"]: source for source in yaml.safe_load((HERE / "sources.yaml").read_text(encoding="utf-8"))}
    for half in HALVES:
        for row in BENIGN[half]:
            if not row["origin"].startswith("grammar:"):
                source = listed[row["source"]]
                assert (source["half"], source["license"], source["register"]) == (half, row["license"], row["register"])
                assert row["origin"].startswith(f"{source['repository']}@{source['commit'][:12]}:")


def test_the_data_is_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 6_000_000


# the parts that build them

def test_masks() -> None:
    assert filters.masked("Write to jane.doe@example.org or call (555) 010-1234.") == "Write to [EMAIL] or call [PHONE]."
    assert filters.masked("+49 30 1234567 and 1-800-273-8255") == "[PHONE] and [PHONE]"
    assert filters.masked("pid 1234 at 10.0.0.12:8080, 2024-03-02 11:22:33") == "pid 1234 at 10.0.0.12:8080, 2024-03-02 11:22:33"


@pytest.mark.parametrize(("sample", "kind", "passes"), [
    ("He drew his sword and killed the dragon before dawn.", "ebook", True),
    ("They raped the village and burned it to the ground.", "ebook", False),
    ("too short to keep", "ebook", False),
    ("1 2 3 4 5 6 7 8 9 10 11 12 words", "ebook", False),
    ("10:01 [17] WARN 12 of 30 jobs died", "lines", True),
])
def test_filter(sample: str, kind: str, passes: bool) -> None:
    assert filters.passes(sample, kind) is passes


def test_language() -> None:
    assert filters.in_language("Der Hund ist nicht auf der Straße, und das ist auch gut.", "de")
    assert not filters.in_language("The last effect is from the third render of the list.", "it")


def test_readers() -> None:
    read = {kind: list(readers.READERS[kind](sample)) for kind, sample in {
        "ebook": "<body><h2>I</h2><p>One &amp; <i>two</i>.</p><p>Three.</p></body>",
        "conllu": "# newpar\n# text = A b.\n1\tA\n# text = C.\n# newpar\n# text = D.\n",
        "chat": "=== mode\n[12:01] <ann> hello\n[12:02] <bob> hi\n",
        "gutenberg": "Header\n*** START OF THE EBOOK X ***\nOne\n\nTwo\n*** END OF THE EBOOK X ***\nLicence\n",
        "markdown": "---\ntitle: x\n---\nOne\n\nTwo\n",
        "code": "# Copyright me\n\ndef f():\n    pass\n",
        "museum": '{"Title": "Sword", "Description": "A <b>blade</b>."}',
    }.items()}
    assert read == {
        "ebook": [["One & two.", "Three."]], "conllu": [["A b. C.", "D."]], "chat": [["<ann> hello", "<bob> hi"]],
        "gutenberg": [["One", "Two"]], "markdown": [["One", "Two"]], "code": [["def f():\n    pass"]],
        "museum": [["Sword\nA blade."]],
    }


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab .!\n", min_size=1, max_size=400).filter(str.strip), max_size=20), st.integers())
def test_excerpts_stay_in_bounds(blocks: list[str], seed: int) -> None:
    for excerpt in build.excerpts(blocks, "ebook", random.Random(seed)):
        assert 40 <= len(excerpt) <= 3000


def test_a_grammar_fills_slots_and_roughens(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    frame = '[chat, S1 S2 typos, "Don\'t, {who}! {who}"]'
    path.write_text(f'take: 2\nslots: {{who: ["{{a}} Fox", "{{a}} Owl"], a: [Red]}}\nframes:\n  - {frame}\n', encoding="utf-8")
    rows = list(grammar.written(path, 1))
    assert {row[1] for row in rows} == {"dont, red fox! red fox", "dont, red owl! red owl"}
    assert all(row[0] == "chat" and row[3] == ["S1", "S2"] and row[2] == "grammar:g.yaml#0" for row in rows)


def test_a_source_is_read_from_git_at_its_commit(tmp_path: Path) -> None:
    work, bare = tmp_path / "work", tmp_path / "sources" / "me+texts" / "repo"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(work)]
    work.mkdir()
    body = "The soldier was killed in the battle, so the story goes. " * 3
    (work / "a.md").write_text(f"{body}\n\nMail me at who@example.org if you have a better version of this tale.\n", encoding="utf-8")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (work / "a.md").write_text("changed later, and this must not be read by the builder at all\n", encoding="utf-8")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "two"], check=True)
    bare.parent.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(bare)], check=True)
    source = {"name": "t", "repository": "me/texts", "commit": commit, "kind": "markdown", "register": "novel", "rows": 5,
              "paths": ["*.md"]}
    found = build.chosen(source, tmp_path / "sources")
    assert found and all(origin == f"me/texts@{commit[:12]}:a.md" and "changed" not in words for origin, words in found)
    assert any("[EMAIL]" in words for _, words in found)
    assert re.sub(r"\s+", " ", found[0][1]).startswith("The soldier was killed")
