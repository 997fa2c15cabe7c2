from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.conversation import Conversation, Message
from edgeguard.errors import ConversationError, InputError


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": f"turn {index}"} for index in range(count)]


def test_a_text_is_one_turn_of_the_user() -> None:
    assert Conversation.of("hello") == Conversation((Message("user", "hello"),), "user")


def test_a_text_can_be_the_assistants() -> None:
    assert Conversation.of("hello", role="agent") == Conversation((Message("assistant", "hello"),), "assistant")


@pytest.mark.parametrize(
    ("name", "role"),
    [("user", "user"), ("human", "user"), ("assistant", "assistant"), ("agent", "assistant"), ("AGENT", "assistant")],
)
def test_aliases_of_roles(name: str, role: str) -> None:
    assert Conversation.of([{"role": name, "content": "x"}]) == Conversation.of([{"role": role, "content": "x"}])
    assert Conversation.of("x", role=name).role == role


@given(st.integers(1, 50))
def test_parity_decides_who_is_judged(count: int) -> None:
    conversation = Conversation.of(turns(count))
    assert conversation.role == ("user" if count % 2 else "assistant")
    assert [message.content for message in conversation.messages] == [turn["content"] for turn in turns(count)]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("count", [2, 3])
def test_role_overrules_parity(count: int, role: str) -> None:
    assert Conversation.of(turns(count), role=role).role == role


def test_a_lone_assistant_message_is_judged_as_such() -> None:
    assert Conversation.of([{"role": "assistant", "content": "x"}]).role == "assistant"


def test_messages_may_be_records_and_in_a_tuple() -> None:
    assert Conversation.of((Message("user", "a"), Message("assistant", "b"))).role == "assistant"


def test_further_keys_of_a_message_are_refused() -> None:
    with pytest.raises(ConversationError, match="besides role and content"):
        Conversation.of([{"role": "user", "content": "x", "tool_calls": ["y"]}])


def test_content_is_kept_as_given() -> None:
    assert Conversation.of("  x \n").messages[0].content == "  x \n"


@pytest.mark.parametrize(
    ("given", "role", "says"),
    [
        ("", None, "blank"),
        (" \n\t\u3000", None, "blank"),
        (None, None, "NoneType"),
        (b"hello", None, "bytes"),
        (7, None, "int"),
        ({"role": "user", "content": "x"}, None, "list of messages"),
        ([], None, "no messages"),
        ((), None, "no messages"),
        ([None], None, "Message 1 is NoneType"),
        (["hello"], None, "Message 1 is str"),
        ([{"role": "user"}], None, "lacks content"),
        ([{}], None, "lacks content and role"),
        ([{"role": "user", "content": None}], None, "only text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], None, "only text"),
        ([{"role": "user", "content": "  "}], None, "Message 1 is empty or blank"),
        ([{"role": "system", "content": "x"}], None, "the role is none of"),
        ([{"role": None, "content": "x"}], None, "the role is none of"),
        ([{"role": ["user"], "content": "x"}], None, "the role is none of"),
        ([*turns(2), {"role": "assistant", "content": "x"}], None, "Message 3"),
        ([*turns(1), *turns(1)], None, "Message 2"),
        (turns(3)[1:], None, "first message"),
        ("x", "system", "the role is none of"),
        (turns(1), "assistant", "has none"),
        ([{"role": "agent", "content": "x"}], "user", "has none"),
        ("lone \ud800 surrogate", None, "surrogate at character 5"),
        ([*turns(1), {"role": "agent", "content": "\udfff"}], None, "Message 2 holds a lone surrogate"),
    ],
)
def test_what_cannot_be_judged(given: Any, role: str | None, says: str) -> None:
    with pytest.raises(ConversationError, match=says) as caught:
        Conversation.of(given, role)
    assert isinstance(caught.value, (InputError, ValueError))


@given(st.lists(st.tuples(st.sampled_from(["user", "human", "assistant", "agent", "system"]), st.text(max_size=5)), max_size=6))
def test_a_conversation_alternates_or_is_refused(given: list[tuple[str, str]]) -> None:
    try:
        conversation = Conversation.of([{"role": role, "content": content} for role, content in given])
    except ConversationError:
        return
    roles = [message.role for message in conversation.messages]
    assert len(roles) == len(given)
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or roles == ["assistant"]
    assert conversation.role == roles[-1]
    assert all(message.content.strip() for message in conversation.messages)


def test_what_stands_in_the_role_is_not_repeated() -> None:
    with pytest.raises(ConversationError) as error:  # content and role swapped: the text must not reach a log
        Conversation.of([{"role": "my secret", "content": "user"}])
    assert "secret" not in str(error.value)
