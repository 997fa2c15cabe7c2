"""Conversation and profile to a prompt: control tokens and plain text kept apart until they are encoded.

Only a profile's own templates give control tokens. What users and policies say is plain text whatever it spells; what
in it looks like the template is found, reported, and defused where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from string import Template

from edgeguard.conversation import Conversation
from edgeguard.errors import PolicyError
from edgeguard.policy import Policy
from edgeguard.profiles import Profile


@dataclass(frozen=True)
class Control:
    """One control token, by its name."""

    token: str


@dataclass(frozen=True)
class Text:
    """Plain text; never becomes a control token."""

    text: str


Segment = Control | Text


@dataclass(frozen=True)
class Prompt:
    """What a model reads: `head` (the same for one profile, policy and judged role), `body` (the turns), `tail`."""

    head: tuple[Segment, ...]
    body: tuple[Segment, ...]
    tail: tuple[Segment, ...]
    warnings: tuple[str, ...] = ()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All of it, neighbouring texts merged: the unit that is encoded."""
        return _merge((*self.head, *self.body, *self.tail))

    @cached_property
    def text(self) -> str:
        """Exactly what the model reads, control tokens spelled out."""
        return "".join(segment.token if isinstance(segment, Control) else segment.text for segment in self.segments)


def render(profile: Profile, conversation: Conversation, policy: Policy | None = None, *, neutralise: bool = False) -> Prompt:
    """The prompt that has the conversation judged by `policy`, by default the profile's own.

    Contents are stripped. Parts of them that look like the template give a warning each, and with `neutralise` are
    put into round brackets, `[/INST]` as `(/INST)`. Raises `PolicyError` if the model does not read such a policy.
    """
    judged = profile.label(conversation.role)
    categories = _categories(profile, profile.policy if policy is None else policy)
    outcome = "was put into round brackets" if neutralise else "is read by the model as it stands"
    body: list[Segment] = []
    warnings: list[str] = []
    for index, message in enumerate(conversation.messages, 1):
        content = message.content.strip()
        found, defused = find_lookalikes(profile, content)
        body += _fill(profile, profile.turn, role=profile.label(message.role), content=defused if neutralise else content)
        where = f"Message {index} ({message.role})"
        warnings += [f"{where} holds {what}, which looks like the prompt's template; it {outcome}." for what in found]
    return Prompt(
        head=(*map(Control, profile.begin), *_fill(profile, profile.head, role=judged, categories=categories)),
        body=_merge(body),
        tail=_fill(profile, profile.tail, role=judged),
        warnings=tuple(warnings),
    )


def _categories(profile: Profile, policy: Policy) -> str:
    """The policy as the lines of the prompt."""
    if not profile.custom_policy and policy != profile.policy:
        raise PolicyError(f"{profile.title} knows its own categories only and reads no policy; use a Llama Guard model for that.")
    lines = []
    for category in policy.categories:
        if not category.code.startswith(profile.code_prefix):
            raise PolicyError(
                f"{profile.title} answers with codes {profile.code_prefix}1, {profile.code_prefix}2, ...; "
                f"the policy has {category.code}. Make the policy with prefix={profile.code_prefix!r}."
            )
        lines.append(Template(profile.category).substitute(code=category.code, name=category.wording))
        lines += [category.description] if category.description else []
    return "\n".join(lines)


def _fill(profile: Profile, template: str, **values: str) -> tuple[Segment, ...]:
    """The template with its control tokens cut out before any value is put in."""
    cut = re.split(f"({'|'.join(map(re.escape, profile.controls))})", template) if profile.controls else [template]
    return tuple(Control(part) if part in profile.controls else Text(Template(part).substitute(values)) for part in cut if part)


def _merge(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if isinstance(segment, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + segment.text)
        else:
            merged.append(segment)
    return tuple(merged)


# a line ends at any of these, and may be indented by blanks and by what has no width
_AT_LINE_START = r"(?:\A|(?<=[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]))[ \t\xa0\u1680\u2000-\u200f\u202f\u205f\u2060\u3000\ufeff]*"
_COLON = r"[ \t]{0,8}:"


@dataclass(frozen=True)
class _Lookalikes:
    """One pattern for all look-alikes of a profile; the number of the group that matched tells which."""

    pattern: re.Pattern[str]
    names: tuple[str, ...]


@lru_cache(maxsize=64)
def _lookalikes(profile: Profile) -> _Lookalikes:
    tokens = dict.fromkeys((*profile.begin, *profile.controls, *profile.ends))
    marks = [known for known in profile.lookalikes if not known.endswith(":")]
    turns = [known for known in profile.lookalikes if known.endswith(":")]
    brackets = [f"({_spaced(known)})" for known in (*tokens, *marks)]
    names = [f'"{known}"' for known in (*tokens, *marks)]
    if any(token.startswith("<|") for token in tokens):
        # the vocabulary has more of them than the profile needs
        brackets.append(r"(<\|\w{1,64}\|>)")
        names.append('"<|...|>"')
    # most characters open no bracket: one look ahead passes them by
    pattern = rf"(?=[<\[])(?:{'|'.join(brackets)})"
    if turns:
        pattern += f"|{_AT_LINE_START}(?:{'|'.join(f'({_spaced(known[:-1])}{_COLON})' for known in turns)})"
        names += [f'"{known}" at the start of a line' for known in turns]
    return _Lookalikes(re.compile(pattern, re.IGNORECASE), tuple(names))


def _spaced(known: str) -> str:
    """A pattern for the words of a look-alike, with any blanks between them."""
    return re.escape(known).replace(r"\ ", r"\s{1,8}")


def find_lookalikes(profile: Profile, content: str) -> tuple[list[str], str]:
    """What of the template the content holds, each once, and the content with every such part in round brackets.

    `[/INST]` becomes `(/INST)`, a line's `Agent:` becomes `(Agent):`. Takes time linear in the length of the content.
    Without a find the content comes back as it was.
    """
    known = _lookalikes(profile)
    found: dict[str, None] = {}

    def defuse(match: re.Match[str]) -> str:
        found.setdefault(known.names[(match.lastindex or 1) - 1])
        part = match[0]
        return re.sub(r"\w+", r"(\g<0>)", part, count=1) if part.endswith(":") else f"({part[1:-1]})"

    defused = known.pattern.sub(defuse, content)
    return list(found), defused
