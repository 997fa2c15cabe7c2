"""One walk through the source in full precision: the default prefixes, and the logits that every comparison is held against.

The layers are those of the reference backend; their weights are streamed, so that never more than one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeguard.answers import Answers
from edgeguard.backends.base import FloatArray
from edgeguard.backends.reference import Cache, ReferenceBackend
from edgeguard.conversation import Conversation
from edgeguard.errors import ConversionError
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.store.files import Progress
from edgeguard.tokenizer import Tokenizer
from edgeguard.verdict import Role
from edgeguard.weights import DTYPES, Weights, widen

BLOCK = 8192  # rows of the head multiplied at a time: 128 MB at 4096 wide


@dataclass(frozen=True)
class Entry:
    """A prompt as the walk reads it: what follows one of the prefixes, or (`prefix` None) a whole prompt."""

    prefix: Role | None
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Walked:
    """What the source itself says, in float32."""

    keys_values: Mapping[Role, tuple[FloatArray, FloatArray]]
    """Of each prefix: keys after RoPE and values, both (layers, kv_heads, tokens, head_dim)."""
    logits: FloatArray
    """Of the token that follows each entry: (entries, vocab)."""


def entry_of(conversation: Conversation, profile: Profile, tokenizer: Tokenizer, answers: Answers,
             prefixes: Mapping[Role, tuple[int, ...]]) -> Entry:
    """A conversation as an entry; the answer's lead-in is appended, so that the next token is the verdict's first."""
    ids = (*tokenizer.encode(render(profile, conversation).segments), *answers.lead_in)
    prefix = prefixes.get(conversation.role)
    if prefix and ids[: len(prefix)] == prefix:
        return Entry(conversation.role, ids[len(prefix) :])
    return Entry(None, ids)


def walk(weights: Weights, prefixes: Mapping[Role, tuple[int, ...]], entries: Sequence[Entry],
         progress: Progress | None = None) -> Walked:
    """Evaluate prefixes and entries layer by layer; raises `ConversionError` when the source gives no finite logits."""
    return _Walker(weights).walk(prefixes, entries, progress)


def save_prefix(path: Path, keys: FloatArray, values: FloatArray) -> None:
    """Write a prefix file: `keys` and `values`, float32 (layers, kv_heads, tokens, head_dim)."""
    with path.open("wb") as stream:
        np.savez(stream, keys=keys, values=values)


def reader(weights: Weights, name: str) -> Callable[[slice | NDArray[np.int64]], FloatArray]:
    """Gives rows of a tensor in float32; the others are not even read where the source holds plain numbers."""
    values, dtype = weights.raw(name)
    if dtype in DTYPES:
        return lambda index: widen(values[index], dtype)
    table = weights.tensor(name)
    return lambda index: table[index]


class _Walker(ReferenceBackend):
    """The reference's layers, with their weights dropped after each layer."""

    def walk(self, prefixes: Mapping[Role, tuple[int, ...]], entries: Sequence[Entry], progress: Progress | None) -> Walked:
        roles = list(prefixes)
        embed = reader(self.weights, "model.embed_tokens.weight")
        roots = [embed(np.asarray(prefixes[role])) for role in roles]
        leaves = [embed(np.asarray(entry.ids)) for entry in entries]
        caches: dict[Role, Cache] = {role: [] for role in roles}
        for layer in range(self.shape.layers):
            for place, role in enumerate(roles):
                roots[place] = self._layer(layer, roots[place], np.arange(len(roots[place])), ([], []), caches[role])
            for place, entry in enumerate(entries):
                key_value = [] if entry.prefix is None else [caches[entry.prefix][layer]]
                past = [key for key, _ in key_value], [value for _, value in key_value]
                start = len(prefixes[entry.prefix]) if entry.prefix else 0
                positions = np.arange(start, start + len(entry.ids))
                leaves[place] = self._layer(layer, leaves[place], positions, past, [])
            self._kept.clear()
            if progress:
                progress("reference", layer + 1, self.shape.layers)
        kept = {role: (np.stack([k for k, _ in cache]), np.stack([v for _, v in cache])) for role, cache in caches.items()}
        logits = self._head(np.concatenate([x[-1:] for x in leaves]))
        if not np.isfinite(logits).all() or not all(np.isfinite(k).all() and np.isfinite(v).all() for k, v in kept.values()):
            raise ConversionError("The source model gives numbers that are not finite; its weights are damaged.")
        return Walked(kept, logits)

    def _head(self, last: FloatArray) -> FloatArray:
        """(entries, hidden) to (entries, vocab), in blocks of the vocabulary."""
        table = reader(self.weights, "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight")
        normed = self._norm(last, "model.norm.weight")
        return np.concatenate([normed @ table(slice(start, start + BLOCK)).T for start in range(0, self.shape.vocab, BLOCK)], 1)
