"""The answers that a guard model can give, as an automaton over token ids found by asking the tokenizer.

An answer is one of the safe forms, or one of the unsafe forms, a line break, and codes set apart by commas, each at
most once, until an end token. Nothing is assumed of the vocabulary but what is checked in `Answers.build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product, takewhile
from typing import NamedTuple

from edgeguard.errors import ModelMismatchError
from edgeguard.profiles import Profile
from edgeguard.tokenizer import Tokenizer

Ids = tuple[int, ...]
ANCHOR = "\n"
"""What forms are encoded behind: some tokenizers put a space in front of a text that begins one, never after a line break."""


class State(NamedTuple):
    """A place in the list of codes."""

    listed: tuple[int, ...] = ()
    """Places in `Answers.codes` of the codes that are closed by a separator or by the end."""
    partial: Ids = ()
    """Ids of the code at hand so far, its separator included; empty at the start of the list and behind its end."""

    @property
    def ended(self) -> bool:
        """The list is complete."""
        return bool(self.listed) and not self.partial


@dataclass(frozen=True)
class Answers:
    """The automaton of one profile, its codes and one vocabulary."""

    lead_in: Ids
    """What the model says first whatever it answers; to be appended to the prompt."""
    safe: tuple[Ids, ...]
    """Surface forms of the safe answer, the canonical one first; no two forms of either answer share their first id."""
    unsafe: tuple[Ids, ...]
    line: Ids
    """The line break behind an unsafe form."""
    codes: tuple[str, ...]
    first: tuple[Ids, ...]
    """Each code as the first of the list."""
    following: tuple[Ids, ...]
    """Each code behind another one, with the comma before it."""
    ends: Ids
    """Any of them ends the list."""
    ids: Ids = field(init=False)
    """Every id that an answer can hold, ascending: the rows that a model's head must have."""

    def __post_init__(self) -> None:
        sequences = (*self.safe, *self.unsafe, self.line, *self.first, *self.following, self.ends)
        object.__setattr__(self, "ids", tuple(sorted({id_ for sequence in sequences for id_ in sequence})))

    @classmethod
    def build(cls, profile: Profile, codes: Sequence[str], tokenizer: Tokenizer) -> Answers:
        """Ask `tokenizer` how the answers of `profile` with these `codes` are spelled.

        Raises `ModelMismatchError` if a safe and an unsafe form begin alike, or if the ids of a code depend on the form,
        or on the codes, that stand before it.
        """
        forms = {form: _behind(tokenizer, ANCHOR, form) for form in (*profile.safe_forms, *profile.unsafe_forms)}
        common = _common(list(forms.values()))
        safe, unsafe = (_by_first(forms, given, common) for given in (profile.safe_forms, profile.unsafe_forms))
        _check_apart(profile, safe, unsafe)
        listing = _Listing.ask(tokenizer, profile.unsafe_forms, tuple(codes))
        lead_in = tokenizer.encode_text(profile.lead_in) if profile.lead_in else []
        return cls(
            lead_in=(*lead_in, *next(iter(forms.values()))[:common]), safe=tuple(safe.values()), unsafe=tuple(unsafe.values()),
            line=listing.line, codes=tuple(codes), first=listing.first, following=listing.following,
            ends=tuple(tokenizer.control(token) for token in profile.ends),
        )

    def steps(self, state: State) -> Mapping[int, State]:
        """Every id that may follow, and where it leads; empty behind the end."""
        spelled = self.following if state.listed else self.first
        steps: dict[int, State] = {}
        size = len(state.partial)
        for code in self.possible(state):
            if len(spelled[code]) > size:
                id_ = spelled[code][size]
                steps[id_] = State(state.listed, (*state.partial, id_))
                continue
            listed = (*state.listed, code)
            steps |= dict.fromkeys(self.ends, State(listed))
            steps |= {ids[0]: State(listed, ids[:1]) for other, ids in enumerate(self.following) if other not in listed}
        return steps

    def settle(self, state: State) -> State:
        """Go on while there is no choice; which of several end tokens comes is none."""
        while not state.ended:
            reached = set(self.steps(state).values())
            if len(reached) > 1:
                break
            (state,) = reached
        return state

    def path(self, state: State) -> Ids:
        """Ids from the start of the list to `state`, without the end token."""
        spelled = [self.following[code] if place else self.first[code] for place, code in enumerate(state.listed)]
        return (*chain.from_iterable(spelled), *state.partial)

    def possible(self, state: State) -> list[int]:
        """Unlisted codes that the code at hand can still become; all unlisted ones at the start of the list."""
        if state.ended:
            return []
        spelled = self.following if state.listed else self.first
        size = len(state.partial)
        return [code for code, ids in enumerate(spelled) if code not in state.listed and ids[:size] == state.partial]


@dataclass(frozen=True)
class _Listing:
    """How line break and codes are spelled."""

    line: Ids
    first: tuple[Ids, ...]
    following: tuple[Ids, ...]

    @classmethod
    def ask(cls, tokenizer: Tokenizer, forms: Sequence[str], codes: tuple[str, ...]) -> _Listing:
        """Ask for single codes and pairs, then hold longer lists and every form against them."""
        if not codes or len(set(codes)) != len(codes):
            raise ModelMismatchError("A guard model needs at least one category, and no code twice.")
        begin = f"{ANCHOR}{forms[0]}"
        line = _behind(tokenizer, begin, "\n")
        first = tuple(_behind(tokenizer, f"{begin}\n", code) for code in codes)
        # any other code stands before it, here the one at the next place; with a single code none follows
        following = tuple(
            _behind(tokenizer, f"{begin}\n{codes[(place + 1) % len(codes)]}", f",{code}") for place, code in enumerate(codes)
        ) if len(codes) > 1 else ((),)
        listing = cls(line, first, following)
        listing._check(tokenizer, forms, codes)
        return listing

    def _check(self, tokenizer: Tokenizer, forms: Sequence[str], codes: tuple[str, ...]) -> None:
        """Hold every code behind every form, pairs, triples and the whole list against what their parts are spelled with."""
        places = range(len(codes))
        pairs = [(a, b) for a in places for b in places if a != b]
        triples = [(a, b, c) for a, b in pairs if (c := (a + b + 1) % len(codes)) not in (a, b)]
        lists = [*((code,) for code in places), tuple(places), tuple(reversed(places))]
        for form, order in (*product(forms[:1], (*pairs, *triples)), *product(forms, lists)):
            text = f"{form}\n{','.join(codes[code] for code in order)}"
            rest = [self.following[code] for code in order[1:]]
            parts = [_behind(tokenizer, ANCHOR, form), self.line, self.first[order[0]], *rest]
            if _behind(tokenizer, ANCHOR, text) != tuple(chain.from_iterable(parts)):
                raise ModelMismatchError(
                    f"The tokenizer spells {text!r} otherwise than its parts: the ids of a code depend on what stands before it. "
                    "Such an answer cannot be read token by token; use other codes or the model's own tokenizer."
                )
        _check_prefixes(codes, self)


def _check_prefixes(codes: tuple[str, ...], listing: _Listing) -> None:
    """A complete code may begin a longer one (`S1`, `S10`) only if what follows tells which is meant."""
    separators = {ids[0] for ids in listing.following if ids}
    for spelled in (listing.first, listing.following):
        for code, ids in zip(codes, spelled, strict=True):
            for other in spelled:
                if ids and len(other) > len(ids) and other[: len(ids)] == ids and other[len(ids)] in separators:
                    raise ModelMismatchError(f"After {code!r} the same token goes on with the code and begins the next one.")
        if len(set(spelled)) != len(codes):
            raise ModelMismatchError("Two codes are spelled with the same tokens.")


def _check_apart(profile: Profile, safe: Mapping[str, Ids], unsafe: Mapping[str, Ids]) -> None:
    """The first id of every form says which answer it is."""
    for form, ids in safe.items():
        for other, others in unsafe.items():
            if not ids or not others or ids[0] == others[0]:
                raise ModelMismatchError(
                    f"{profile.title}: the tokenizer begins {form!r} and {other!r} with the same token, so the first token of an "
                    "answer does not tell safe from unsafe. Use the model's own tokenizer, or leave one form out of the profile."
                )


def _common(sequences: Sequence[Ids]) -> int:
    """Number of ids that all begin with."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def _by_first(forms: Mapping[str, Ids], given: Sequence[str], common: int) -> dict[str, Ids]:
    """Forms of one answer without their common beginning; of those that begin alike only the first is kept."""
    kept: dict[Ids, str] = {}
    for form in given:
        kept.setdefault(forms[form][common:][:1], form)
    return {form: forms[form][common:] for form in kept.values()}


def _behind(tokenizer: Tokenizer, before: str, text: str) -> Ids:
    """Ids of `text` where it stands behind `before`; raises `ModelMismatchError` if they melt together or decode otherwise."""
    head, whole = tokenizer.encode_text(before), tokenizer.encode_text(before + text)
    ids = tuple(whole[len(head):])
    if whole[: len(head)] != head or not ids or tokenizer.decode(whole) != tokenizer.decode(head) + text:
        raise ModelMismatchError(
            f"The tokenizer does not keep {text!r} apart from {before!r} before it; it does not fit the answers of this model."
        )
    return ids
