"""The tokens that every prompt of one role begins with, found by rendering and encoding; evaluated once, then kept."""

from __future__ import annotations

from edgeguard.conversation import Conversation
from edgeguard.policy import Policy
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.tokenizer import Tokenizer, shared_prefix
from edgeguard.verdict import Role

_ASKED, _SAID = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "What?"}
# an assistant's turn may stand alone or follow the user's: what only one of the two begins with is no prefix
_SAMPLES: dict[Role, list[Conversation]] = {
    "user": [Conversation.of("What?"), Conversation.of("7"), Conversation.of([_ASKED, _SAID, _ASKED])],
    "assistant": [Conversation.of("What?", "assistant"), Conversation.of("7", "assistant"), Conversation.of([_ASKED, _SAID])],
}


def role_prefixes(profile: Profile, tokenizer: Tokenizer, policy: Policy | None = None) -> dict[Role, tuple[int, ...]]:
    """Prefix ids for each judged role under a policy, by default the profile's own."""
    return {
        role: tuple(shared_prefix(tokenizer, [render(profile, one, policy) for one in samples])) for role, samples in _SAMPLES.items()
    }
