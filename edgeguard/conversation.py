"""Messages and whose turn is judged; no template, no tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edgeguard.errors import ConversationError
from edgeguard.verdict import Role

ROLES: dict[str, Role] = {"user": "user", "human": "user", "assistant": "assistant", "agent": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate, and the role whose last turn is judged."""

    messages: tuple[Message, ...]
    role: Role

    @classmethod
    def of(cls, given: str | Sequence[Mapping[str, Any] | Message], role: str | None = None) -> Conversation:
        """From a text (one turn of `role`, the user's by default) or from messages.

        Without `role` the last message is judged: the user's when their count is odd, the assistant's when it is even.
        Raises `ConversationError` for blank or non-text content, unknown roles, turns that do not alternate, a first
        turn that is not the user's (a single assistant message is allowed), or a `role` that has no turn.
        """
        asked = None if role is None else _role(role, "role")
        items: object = [{"role": asked or "user", "content": given}] if isinstance(given, str) else given
        if not isinstance(items, (list, tuple)):
            raise ConversationError(f"A text or a list of messages is needed, not {type(given).__name__}.")
        if not items:
            raise ConversationError("The conversation has no messages.")
        messages = tuple(_message(item, f"Message {index}") for index, item in enumerate(items, 1))
        _check_order(messages)
        judged = asked or messages[-1].role
        if judged not in {message.role for message in messages}:
            raise ConversationError(f"The {judged}'s turn was to be judged, but the conversation has none.")
        return cls(messages, judged)


def _visible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")


def _role(name: object, where: str) -> Role:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:  # what was given is not repeated: it may be the text, in the wrong field
        raise ConversationError(f"{where}: the role is none of {', '.join(ROLES)}.")
    return role


def _message(item: object, where: str) -> Message:
    if isinstance(item, Message):
        role, content = item.role, item.content
    elif isinstance(item, Mapping):
        if missing := {"role", "content"} - item.keys():
            raise ConversationError(f"{where} lacks {' and '.join(sorted(missing))}.")
        if len(item) > 2:
            raise ConversationError(f"{where} has fields besides role and content; what they hold would not be judged. Leave them out.")
        role, content = item["role"], item["content"]
    else:
        raise ConversationError(f"{where} is {type(item).__name__}; a mapping with role and content is needed.")
    if not isinstance(content, str):
        raise ConversationError(f"{where}: the content is {type(content).__name__}, only text can be judged.")
    if not any(map(_visible, content)):
        raise ConversationError(f"{where} is empty or blank; there is nothing to judge.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(f"{where} holds a lone surrogate at character {error.start}; it is not valid text.") from None
    return Message(_role(role, where), content)


def _check_order(messages: tuple[Message, ...]) -> None:
    if messages[0].role != "user" and len(messages) > 1:
        raise ConversationError("The first message must be the user's.")
    for index, (before, after) in enumerate(pairwise(messages), 2):
        if before.role == after.role:
            raise ConversationError(f"Message {index} is the {after.role}'s again; user and assistant must alternate.")
