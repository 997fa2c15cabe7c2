"""Profiles against the prompts of the models' makers, byte for byte."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard import profiles, taxonomy
from edgeguard.conversation import Conversation
from edgeguard.errors import ModelNotFoundError
from edgeguard.policy import Policy
from edgeguard.profiles import Profile
from edgeguard.prompt import render

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_prompts.json").read_text("utf-8"))
META = json.loads((DATA / "meta_prompts.json").read_text("utf-8"))["cases"]
LLAMA_GUARDS = ("llama-guard-1", "llama-guard-2", "llama-guard-3-8b", "llama-guard-3-1b")


def rendered(case: dict[str, Any]) -> str:
    """What the builder would give: the prompt without the BOS that only Llama Guard 3's template spells out."""
    profile = profiles.get(case["profile"])
    policy = profile.described_policy if case["described"] else profile.policy
    if case["policy"]:
        policy = Policy.of(case["policy"], profile.code_prefix)
    text = render(profile, Conversation.of(case["messages"], case["role"]), policy).text
    return text if case["profile"].startswith("llama-guard-3") else text.removeprefix("".join(profile.begin))


def built(meta: Any, case: dict[str, Any]) -> str:
    """The same by Meta's builder, the module `llama_cookbook.inference.prompt_format_utils`; it gave the recorded prompts."""
    categories, prefix, template = {
        "llama-guard-1": (meta.LLAMA_GUARD_1_CATEGORY, "O", meta.PROMPT_TEMPLATE_1),
        "llama-guard-2": (meta.LLAMA_GUARD_2_CATEGORY, "S", meta.PROMPT_TEMPLATE_2),
        "llama-guard-3-8b": (meta.LLAMA_GUARD_3_CATEGORY, "S", meta.PROMPT_TEMPLATE_3),
        # the builder has no table for 1B; its card has the first 13 categories
        "llama-guard-3-1b": (meta.LLAMA_GUARD_3_CATEGORY[:13], "S", meta.PROMPT_TEMPLATE_3),
    }[case["profile"]]
    if case["policy"]:
        stop = ". " if prefix == "S" else "."
        categories = [meta.SafetyCategory(own["name"] + stop, own.get("description")) for own in case["policy"]]
    agents = {"user": meta.AgentType.USER, "assistant": meta.AgentType.AGENT}
    turns = [meta.ConversationTurn(message["content"], agents[message["role"]]) for message in case["messages"]]
    role = case["role"] or case["messages"][-1]["role"]
    return str(meta.build_custom_prompt(agents[role], turns, categories, prefix, template, case["described"]))


@pytest.mark.parametrize("golden", GOLDEN, ids=range(len(GOLDEN)))
def test_llama_guard_2_gives_the_golden_prompts(golden: dict[str, Any]) -> None:
    prompt = render(profiles.get("llama-guard-2"), Conversation.of(golden["messages"]))
    assert prompt.text == "<|begin_of_text|>" + golden["prompt"]


@pytest.mark.parametrize("case", META, ids=lambda case: case["id"])
def test_prompts_are_those_of_metas_builder(case: dict[str, Any]) -> None:
    assert rendered(case) == case["prompt"]


def test_the_recorded_prompts_cover_every_kind() -> None:
    kinds = {(case["profile"], case["described"], bool(case["policy"])) for case in META}
    assert kinds == {(name, described, own) for name in LLAMA_GUARDS for described in (False, True) for own in (False, True)}
    for name, described, _ in kinds:
        cases = [case for case in META if (case["profile"], case["described"]) == (name, described) and not case["policy"]]
        assert {len(case["messages"]) for case in cases} == {1, 2, 3}
        assert {case["messages"][-1]["role"] for case in cases} == {"user", "assistant"}
        assert {case["role"] for case in cases} == {None, "user"}


def test_the_recorded_prompts_are_still_the_builders() -> None:
    meta = pytest.importorskip("llama_cookbook.inference.prompt_format_utils")
    for case in META:
        assert built(meta, case) == case["prompt"], case["id"]


def test_names_only_is_the_builders_default() -> None:
    meta = pytest.importorskip("llama_cookbook.inference.prompt_format_utils")
    for case in META:
        if not case["described"] and not case["policy"] and case["role"] is None and case["profile"] != "llama-guard-3-1b":
            version = meta.LlamaGuardVersion[case["profile"].removesuffix("-8b").replace("-", "_").upper()]
            agents = {"user": meta.AgentType.USER, "assistant": meta.AgentType.AGENT}
            turns = [meta.ConversationTurn(message["content"], agents[message["role"]]) for message in case["messages"]]
            assert meta.build_default_prompt(turns[-1].agent_type, turns, version) == rendered(case)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(LLAMA_GUARDS),
    st.booleans(),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: f"${text}|"), min_size=1, max_size=4),
)
def test_any_text_gives_the_builders_prompt(name: str, described: bool, contents: list[str]) -> None:
    meta = pytest.importorskip("llama_cookbook.inference.prompt_format_utils")
    messages = [{"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)]
    case = {"profile": name, "described": described, "policy": None, "role": None, "messages": messages}
    assert rendered(case) == built(meta, case)


def test_the_minis_prompt_is_chatml_with_a_line_for_the_judged_role() -> None:
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "Hello!\n"}]
    prompt = render(profiles.get("edgeguard-mini"), Conversation.of(messages))
    assert prompt.text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>verdict assistant\n"
    )
    assert prompt.head == ()


@pytest.mark.parametrize(
    ("table", "prefix", "count"),
    [
        (taxonomy.LLAMA_GUARD_1, "O", 6),
        (taxonomy.LLAMA_GUARD_2, "S", 11),
        (taxonomy.LLAMA_GUARD_3, "S", 14),
        (taxonomy.LLAMA_GUARD_3_1B, "S", 13),
    ],
)
def test_codes_count_up_and_slugs_differ(table: taxonomy.Taxonomy, prefix: str, count: int) -> None:
    assert [category.code for category in table] == [f"{prefix}{number}" for number in range(1, count + 1)]
    assert len({category.slug for category in table}) == count


def test_slugs_are_stable_where_codes_are_not() -> None:
    codes = [{own.slug: own.code for own in table} for table in (taxonomy.LLAMA_GUARD_2, taxonomy.LLAMA_GUARD_3)]
    assert (codes[0]["hate"], codes[1]["hate"]) == ("S9", "S10")
    assert (codes[0]["specialized-advice"], codes[1]["defamation"]) == ("S5", "S5")
    assert codes[0].keys() <= codes[1].keys()


def test_reports_use_the_words_of_the_card() -> None:
    own = {category.code: category for category in profiles.get("llama-guard-2").policy.categories}
    assert (own["S3"].name, own["S3"].wording) == ("Sex-Related Crimes", "Sex Crimes")


@pytest.mark.parametrize(
    ("name", "is_"),
    [
        ("llama-guard-2", "llama-guard-2"),
        ("meta-llama/Meta-Llama-Guard-2-8B", "llama-guard-2"),
        ("META-LLAMA/meta-llama-guard-2-8b", "llama-guard-2"),
        ("llama-guard", "llama-guard-1"),
        ("meta-llama/LlamaGuard-7b", "llama-guard-1"),
        ("meta-llama/Llama-Guard-3-8B", "llama-guard-3-8b"),
        ("meta-llama/Llama-Guard-3-1B", "llama-guard-3-1b"),
        ("edgeguard-mini", "edgeguard-mini"),
    ],
)
def test_names_and_aliases(name: str, is_: str) -> None:
    assert profiles.get(name).name == is_


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'llama-guard-9'.*llama-guard-2.*edgeguard-mini"):
        profiles.get("llama-guard-9")


def test_no_two_profiles_share_a_name() -> None:
    names = [name.lower() for known in profiles.NAMES for name in (known, *profiles.get(known).aliases)]
    assert len(set(names)) == len(names)


def test_profiles_are_only_data() -> None:
    for name in profiles.NAMES:
        for field in dataclasses.fields(Profile):
            value = getattr(profiles.get(name), field.name)
            assert isinstance(value, (str, int, tuple)), field.name


@pytest.mark.parametrize("name", profiles.NAMES)
def test_answers_are_canonical_first_and_distinct(name: str) -> None:
    profile = profiles.get(name)
    assert (profile.safe_forms[0], profile.unsafe_forms[0]) == ("safe", "unsafe")
    assert not set(profile.safe_forms) & set(profile.unsafe_forms)
    assert profile.lead_in == ("\n\n" if name.startswith("llama-guard-3") else "")
