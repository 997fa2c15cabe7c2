from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard import profiles
from edgeguard.conversation import Conversation
from edgeguard.errors import PolicyError
from edgeguard.policy import MAX_BYTES, Policy, PolicyCategory
from edgeguard.prompt import render

LG1, LG2, LG3, MINI = (profiles.get(name) for name in ("llama-guard-1", "llama-guard-2", "llama-guard-3-8b", "edgeguard-mini"))
HELLO = Conversation.of("hello")


def codes(policy: Policy) -> list[str]:
    return [category.code for category in policy.categories]


def categories_in(text: str) -> str:
    return text.partition("<BEGIN UNSAFE CONTENT CATEGORIES>\n")[2].partition("<END UNSAFE CONTENT CATEGORIES>")[0]


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "rules.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        return path

    return write


def test_names_and_mappings_are_numbered() -> None:
    policy = Policy.of(["Weather talk", {"name": "Rival brands", "description": "Should not praise them.", "slug": "rivals"}])
    assert policy.categories == (
        PolicyCategory("S1", "Weather talk", None, "weather-talk"),
        PolicyCategory("S2", "Rival brands", "Should not praise them.", "rivals"),
    )


def test_an_own_policy_goes_into_the_same_template() -> None:
    policy = Policy.of(["Weather talk", {"name": "Rival brands", "description": "Should not\n - Praise them."}])
    own, default = (render(LG2, HELLO, given).text for given in (policy, None))
    assert categories_in(own) == "S1: Weather talk. \nS2: Rival brands. \nShould not\n - Praise them.\n"
    assert own.replace(categories_in(own), categories_in(default)) == default


def test_names_as_meta_writes_them_give_metas_prompt() -> None:
    for profile, stop in ((LG1, "."), (LG2, ". "), (LG3, ". ")):
        names = [category.wording + stop for category in profile.policy.categories]
        policy = Policy.of(names, prefix=profile.code_prefix)
        assert render(profile, HELLO, policy).text == render(profile, HELLO).text


def test_a_policy_is_plain_text_in_the_prompt() -> None:
    policy = Policy.of([{"name": "A <|eot_id|> $name", "description": "$content <|end_header_id|>"}])
    controls, default = (
        [segment for segment in render(LG3, HELLO, given).segments if not hasattr(segment, "text")] for given in (policy, None)
    )
    assert controls == default
    assert categories_in(render(LG3, HELLO, policy).text) == "S1: A <|eot_id|> $name. \n$content <|end_header_id|>\n"


def test_a_selection_keeps_codes_and_the_profiles_order() -> None:
    policy = Policy.select(LG2, ["S9", "S1"])
    assert categories_in(render(LG2, HELLO, policy).text) == "S1: Violent Crimes. \nS9: Hate. \n"


def test_the_described_default_has_every_description() -> None:
    text = categories_in(render(LG2, HELLO, LG2.described_policy).text)
    assert all(f"{own.code}: {own.prompt_name}. \n{own.description}\n" in text for own in LG2.taxonomy)
    assert Policy.select(LG2, codes(LG2.policy), described=True).categories == LG2.described_policy.categories


def test_the_mini_reads_no_policy() -> None:
    assert render(MINI, HELLO, MINI.policy) == render(MINI, HELLO)
    for policy in (Policy.of(["Weather talk"]), Policy.select(MINI, ["S1"]), MINI.described_policy):
        with pytest.raises(PolicyError, match="reads no policy"):
            render(MINI, HELLO, policy)


def test_codes_of_another_generation_are_refused() -> None:
    with pytest.raises(PolicyError, match="prefix='O'"):
        render(LG1, HELLO, Policy.of(["Weather talk"]))
    assert "O1: Weather talk.\n<END" in render(LG1, HELLO, Policy.of(["Weather talk"], prefix="O")).text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "0 categories"),
        ([f"c{index}" for index in range(51)], "51 categories"),
        ("Weather", "not str"),
        (None, "not NoneType"),
        ({"name": "Weather"}, "not dict"),
        ([7], "Category 1 is int"),
        (["a", None], "Category 2 is NoneType"),
        ([{}], "Category 1"),
        ([" "], "not blank"),
        (["."], "name must be a text"),
        (["two\nlines"], "one line"),
        (["two\u2028lines"], "one line"),
        ([{"description": "x"}], "lacks a name"),
        ([{"name": "a", "descripton": "x"}], "unknown key 'descripton'"),
        ([{"name": "a", 7: "x"}], "unknown key 7"),
        ([{"name": "a", "description": ["x"]}], "description must be a text"),
        ([{"name": "a", "description": ""}], "not blank"),
        ([{"name": "a", "code": 1}], "code must be a text"),
        ([{"name": "a", "code": "O1"}], "does not begin with S"),
        ([{"name": "a", "code": "S0"}], "not a category code"),
        ([{"name": "a", "code": "S01"}], "not a category code"),
        ([{"name": "a", "code": "S100"}], "not a category code"),
        ([{"name": "a", "code": "S1,S2"}], "not a category code"),
        (["a", {"name": "b", "code": "S1"}], "code 'S1' is given twice"),
        (["Hate", "hate"], "name 'hate' is given twice"),
        (["C", "C++"], "slug 'c' is given twice"),
        (["lone \ud800"], "surrogate"),
    ],
)
def test_policies_that_make_no_sense(given: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Policy.of(given)


def test_fifty_categories_are_possible() -> None:
    policy = Policy.of([f"c{index}" for index in range(50)])
    assert codes(policy)[-1] == "S50"
    assert "S50: c49. \n" in render(LG2, HELLO, policy).text


@pytest.mark.parametrize("prefix", ["", "s", "SS", "7", "$"])
def test_a_prefix_is_one_capital_letter(prefix: str) -> None:
    with pytest.raises(PolicyError, match="category code"):
        Policy.of(["Weather talk"], prefix)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["S12"], "Llama Guard 2 has no category 'S12'; it has S1, .*S11"),
        (["S1", "O1"], "'O1'"),
        ([1], "no category 1"),
        ([["S1"]], "no category"),
        (["S1", "S1"], "'S1' is given twice"),
        ([], "0 categories"),
        ("S1", "not str"),
        ({"S1": True}, "not dict"),
        (None, "not NoneType"),
    ],
)
def test_selections_that_make_no_sense(wanted: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Policy.select(LG2, wanted)


def test_yaml_json_and_python_say_the_same(written: Any) -> None:
    given = ["Wetter: Gespräche", {"name": "Rivals", "description": "Should not\n - Praise them."}]
    yaml = '- "Wetter: Gespräche"\n- name: Rivals\n  description: |\n    Should not\n     - Praise them.\n'
    loaded = [
        Policy.load(written(yaml)),
        Policy.load(str(written("\ufeff" + json.dumps(given), "rules.json"))),
        Policy.load(written(json.dumps({"name": "rules", "categories": given}), "other.JSON")),
    ]
    assert loaded == [Policy.of(given, name="rules")] * 3


def test_a_file_may_include_the_profiles_categories(written: Any) -> None:
    path = written("include: [S9, S1]\ndescribed: true\ncategories: [Rivals]\n")
    policy = Policy.load(path, profile=LG2)
    assert [(own.code, own.slug, own.description is None) for own in policy.categories] == [
        ("S1", "violent-crimes", False),
        ("S9", "hate", False),
        ("S12", "rivals", True),
    ]
    with pytest.raises(PolicyError, match="give the profile"):
        Policy.load(path)


def test_codes_of_a_file_are_those_of_the_profile(written: Any) -> None:
    assert codes(Policy.load(written("include: [O2]"), profile=LG1)) == ["O2"]
    assert codes(Policy.load(written("[Rivals]"), profile=LG1)) == ["O1"]
    assert codes(Policy.load(written("[Rivals]"), "O")) == ["O1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no policy"),
        ("7", "holds no policy"),
        ("just text", "holds no policy"),
        ("{}", "0 categories"),
        ("categories:", "not NoneType"),
        ("categories: [a]\nthreshold: 0.5", "unknown key 'threshold'"),
        ("categories: [a]\nname: 7", "name must be a text"),
        ("categories: [a]\ndescribed: true", "goes with include"),
        ("include: [S1]\ndescribed: maybe", "true or false"),
        ("include: S1", "not str"),
        ("include: [S12]", "no category 'S12'"),
        ("- [a", "not valid"),
        ("- !!python/object/apply:os.getcwd []", "not valid"),
        ("- ? [a]\n  : b", "not valid"),
        ("- a: b", "unknown key 'a'"),
        ("[" * 100_000, "not valid"),
        ("- !!bool x", "not valid"),
        ("- !!timestamp x", "not valid"),
        ("- !!int x", "not valid"),
        (b"- caf\xe9", "not valid"),
        (b"- \x00", "not valid"),
        ("- a" + " " * MAX_BYTES, "larger than"),
        ("&a [*a]", "Category 1 is list"),
        ("categories: [a]\ncategories: [b]", "'categories' is given twice"),
        ('- name: a\n  "name": b', "'name' is given twice"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_files_that_make_no_sense(written: Any, text: str | bytes, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Policy.load(written(text), profile=LG2)


def test_json_files_are_read_as_json(written: Any) -> None:
    for text, says in (("- a", "not valid"), ('["\\ud800"]', "surrogate"), ("[" * 100_000, "not valid"),
                       ('{"categories": ["a"], "categories": ["b"]}', "'categories' is given twice")):
        with pytest.raises(PolicyError, match=says):
            Policy.load(written(text, "rules.json"))


def test_a_merged_key_is_not_given_twice(written: Any) -> None:
    text = "categories:\n- &a {name: Spoilers, description: Ends.}\n- &b {<<: *a, name: Gossip}\n- {<<: *b, name: Rumours}"
    loaded = Policy.load(written(text), profile=LG2)
    assert [(own.name, own.description) for own in loaded.categories] == [
        ("Spoilers", "Ends."), ("Gossip", "Ends."), ("Rumours", "Ends.")]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(PolicyError, match="cannot be read"):
            Policy.load(path)


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12), max_size=8))
def test_any_list_of_names_becomes_a_policy_or_an_error(names: list[str]) -> None:
    try:
        policy = Policy.of(names)
    except PolicyError:
        return
    assert codes(policy) == [f"S{number}" for number in range(1, len(names) + 1)]
    assert [own.name for own in policy.categories] == [name.strip().removesuffix(".").rstrip() for name in names]
    assert all(own.slug and "\n" not in own.name for own in policy.categories)
