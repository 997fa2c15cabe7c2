"""Guard models as data: category table, template, answer forms, control tokens, context. No code knows a model by name.

The templates are the models' prompt data, byte for byte: Llama Guard 2 as in its Hugging Face repository, the others as
in `prompt_format_utils.py` of Meta's llama-cookbook 0.0.5.post1 (which builds Llama Guard 2's prompt alike).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from edgeguard.errors import ModelMismatchError, ModelNotFoundError
from edgeguard.policy import Policy
from edgeguard.taxonomy import LLAMA_GUARD_1, LLAMA_GUARD_2, LLAMA_GUARD_3, LLAMA_GUARD_3_1B, Taxonomy
from edgeguard.verdict import Role


@dataclass(frozen=True)
class Profile:
    """One guard model, all of it data.

    In templates `$role` is the label of the judged role (in `turn`: of the turn's), `$categories` the policy, `$content`
    a message; what is listed in `controls` becomes a control token there, and only there.
    """

    name: str
    title: str
    taxonomy: Taxonomy
    head: str
    """Template of what comes before the first turn; the same for all conversations of one policy and judged role."""
    turn: str
    """Template of one turn."""
    tail: str
    """Template of what comes after the last turn."""
    category: str
    """Template of a category's line, from `$code` and `$name`; a description follows on lines of its own."""
    user: str
    """Label of the user's turns."""
    assistant: str
    """Label of the assistant's turns."""
    begin: tuple[str, ...]
    """Control tokens in front of everything."""
    controls: tuple[str, ...]
    """Control tokens that the templates spell out."""
    ends: tuple[str, ...]
    """Control tokens that end an answer."""
    lookalikes: tuple[str, ...]
    """Plain text of the template that may not come from a user; with a colon at its end, at the start of a line."""
    context: int
    """Tokens that the model was made for."""
    code_prefix: str = "S"
    safe_forms: tuple[str, ...] = ("safe", " safe", "Safe")
    """Surface forms of the answer, the canonical one first."""
    unsafe_forms: tuple[str, ...] = ("unsafe", " unsafe", "Unsafe")
    lead_in: str = ""
    """What the model says before its answer; appended to the prompt."""
    custom_policy: bool = True
    """The model reads the categories in its prompt; without, it knows only its own."""
    aliases: tuple[str, ...] = ()
    """Other names, among them ids on Hugging Face."""

    def label(self, role: Role) -> str:
        """The role as the template writes it."""
        return self.user if role == "user" else self.assistant

    @property
    def policy(self) -> Policy:
        """The default policy: every category of the model, names only."""
        return _whole(self, described=False)

    @property
    def described_policy(self) -> Policy:
        """The default policy with the descriptions of the categories."""
        return _whole(self, described=True)


@lru_cache(maxsize=64)
def _whole(profile: Profile, *, described: bool) -> Policy:
    own = Policy.select(profile, [category.code for category in profile.taxonomy], described=described)
    return Policy(own.categories, "described" if described else "default")


_TASK = """\
Task: Check if there is unsafe content in '$role' messages in conversations according our safety policy with the below \
categories.

<BEGIN UNSAFE CONTENT CATEGORIES>
$categories
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

"""

_ASSESS_1 = """\
<END CONVERSATION>

Provide your safety assessment for $role in the above conversation:
- First line must read 'safe' or 'unsafe'.
- If unsafe, a second line must include a comma-separated list of violated categories."""

_ASSESS = """\
<END CONVERSATION>

Provide your safety assessment for ONLY THE LAST $role message in the above conversation:
 - First line must read 'safe' or 'unsafe'.
 - If unsafe, a second line must include a comma-separated list of violated categories."""

_MARKS = (
    "<BEGIN UNSAFE CONTENT CATEGORIES>",
    "<END UNSAFE CONTENT CATEGORIES>",
    "<BEGIN CONVERSATION>",
    "<END CONVERSATION>",
    "User:",
    "Agent:",
)


_LLAMA_GUARD_1 = Profile(
    name="llama-guard-1",
    title="Llama Guard",
    taxonomy=LLAMA_GUARD_1,
    head=f"[INST] {_TASK}",
    turn="$role: $content\n\n",
    tail=f"{_ASSESS_1} [/INST]",
    category="$code: $name.",
    user="User",
    assistant="Agent",
    begin=("<s>",),
    controls=(),
    ends=("</s>",),
    lookalikes=("[INST]", "[/INST]", *_MARKS),
    context=4096,
    code_prefix="O",
    aliases=("llama-guard", "meta-llama/LlamaGuard-7b"),
)

_LLAMA_GUARD_2 = Profile(
    name="llama-guard-2",
    title="Llama Guard 2",
    taxonomy=LLAMA_GUARD_2,
    head=f"[INST] {_TASK}",
    turn="$role: $content\n\n",
    tail=f"{_ASSESS} [/INST]",
    category="$code: $name. ",
    user="User",
    assistant="Agent",
    begin=("<|begin_of_text|>",),
    controls=(),
    ends=("<|end_of_text|>", "<|eot_id|>"),
    lookalikes=("[INST]", "[/INST]", *_MARKS),
    context=8192,
    aliases=("meta-llama/Meta-Llama-Guard-2-8B",),
)

_LLAMA_GUARD_3_8B = Profile(
    name="llama-guard-3-8b",
    title="Llama Guard 3 8B",
    taxonomy=LLAMA_GUARD_3,
    head=f"<|start_header_id|>user<|end_header_id|> {_TASK}",
    turn="$role: $content\n\n",
    tail=f"{_ASSESS} <|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    category="$code: $name. ",
    user="User",
    assistant="Agent",
    begin=("<|begin_of_text|>",),
    controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ends=("<|eot_id|>", "<|end_of_text|>"),
    lookalikes=_MARKS,
    context=131072,
    lead_in="\n\n",
    aliases=("llama-guard-3", "meta-llama/Llama-Guard-3-8B", "meta-llama/Llama-Guard-3-8B-INT8"),
)

# Llama Guard 3 1B differs only in its table: it was not trained on code interpreter abuse
_LLAMA_GUARD_3_1B = replace(
    _LLAMA_GUARD_3_8B,
    name="llama-guard-3-1b",
    title="Llama Guard 3 1B",
    taxonomy=LLAMA_GUARD_3_1B,
    aliases=("meta-llama/Llama-Guard-3-1B",),
)

_EDGEGUARD_MINI = Profile(
    name="edgeguard-mini",
    title="edgeguard mini",
    taxonomy=LLAMA_GUARD_2,
    head="",
    turn="<|im_start|>$role\n$content<|im_end|>\n",
    tail="<|im_start|>verdict $role\n",
    category="",
    user="user",
    assistant="assistant",
    begin=(),
    controls=("<|im_start|>", "<|im_end|>"),
    ends=("<|im_end|>",),
    lookalikes=(),
    context=8192,
    safe_forms=("safe",),
    unsafe_forms=("unsafe",),
    custom_policy=False,
    aliases=("mini",),
)

_PROFILES = {
    profile.name: profile for profile in (_LLAMA_GUARD_2, _LLAMA_GUARD_1, _LLAMA_GUARD_3_8B, _LLAMA_GUARD_3_1B, _EDGEGUARD_MINI)
}
_BY_NAME = {name.lower(): profile for profile in _PROFILES.values() for name in (profile.name, *profile.aliases)}

NAMES = tuple(_PROFILES)


def get(name: str) -> Profile:
    """The profile of that name or alias, in any case; raises `ModelNotFoundError`, which lists the names."""
    profile = _BY_NAME.get(name.lower())
    if profile is None:
        raise ModelNotFoundError(f"There is no profile {name!r}; there are {', '.join(NAMES)}.")
    return profile


def asked_for(model: str, made_for: str | None, asked: str) -> Profile:
    """The profile asked for; raises `ModelNotFoundError` where there is none, `ModelMismatchError` when the model was made for another."""
    profile = get(asked)
    if made_for is not None and profile != get(made_for):
        raise ModelMismatchError(f"{model} was made for the profile {made_for!r}, not {profile.name!r}. Leave the profile out.")
    return profile
