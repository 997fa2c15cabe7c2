"""What a conversion asks its source, put together from the tokenizer and the fixed conversations, before any weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeguard.answers import Answers
from edgeguard.convert import gate_texts, notices, probe, room
from edgeguard.convert.prefixes import Entry, entry_of
from edgeguard.convert.source import Source, check_vocabulary
from edgeguard.prefix import role_prefixes
from edgeguard.profiles import Profile
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.verdict import Role

BARE = 4  # prompts that are also tried without BOS


@dataclass(frozen=True, eq=False)
class Questions:
    """What the source is asked, known before its weights are read."""

    answers: Answers
    prefixes: Mapping[Role, tuple[int, ...]]
    entries: Sequence[Entry]
    bare: Sequence[Entry]
    """The first of them once more, without the tokens that begin a prompt."""
    needed: Sequence[int]
    """Token ids that a head must hold."""
    tokenizer: str
    """SHA-256 of tokenizer.json."""
    contents: room.Contents

    @property
    def tokens(self) -> int:
        """How many the walk evaluates."""
        return sum(map(len, self.prefixes.values())) + sum(len(entry.ids) for entry in [*self.entries, *self.bare])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(self.prefixes.get(entry.prefix, ()) if entry.prefix else ()) + len(entry.ids) for entry in self.entries)


def questions_of(source: Source, kind: str, profile: Profile) -> Questions:
    """Tokenizer, answers and prompts, for an artifact of a kind."""
    shape = source.weights.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        source.write_tokenizer(path)
        tokenizer, size = JsonTokenizer.load(path), path.stat().st_size
        vocabulary = room.vocabulary_bytes(path, shape.vocab) if kind == "gguf" else 0
    check_vocabulary(source.weights, tokenizer.vocab_size)
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
    prefixes = role_prefixes(profile, tokenizer)
    entries = [entry_of(one, profile, tokenizer, answers, prefixes) for one in gate_texts.conversations()]
    begin = len(profile.begin)
    whole = [Entry(None, (*prefixes.get(entry.prefix, ()), *entry.ids)) if entry.prefix else entry for entry in entries[:BARE]]
    bare = [Entry(None, entry.ids[begin:]) for entry in whole] if begin else []
    needed = probe.needed_rows(profile, tokenizer, answers)
    rows = min(shape.vocab, len(needed) + probe.SENTINELS)
    contents = room.Contents(rows, tuple(map(len, prefixes.values())), size, vocabulary, notices.bytes_of(source.folder))
    return Questions(answers, prefixes, entries, bare, needed, tokenizer.sha256, contents)
