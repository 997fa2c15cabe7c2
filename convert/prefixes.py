"""One walk through the source in full precision: the default prefixes, and the logits that every comparison is held against.

The layers are those of the reference backend, for all prompts together; weights are read piece by piece and none is kept.
The walk's state can be saved every few layers, so that a killed one is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.answers import Answers
from edgeguard.backends.base import FloatArray
from edgeguard.backends.reference import Cache, ReferenceBackend
from edgeguard.conversation import Conversation
from edgeguard.convert.pieces import pieces
from edgeguard.errors import ConversionError
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.store.files import Progress
from edgeguard.tokenizer import Tokenizer
from edgeguard.verdict import Role
from edgeguard.weights import Weights, expected

EVERY = 2
"""Layers between two saved states; a state at 8B is some 100 MB, a layer takes 10 seconds."""
OBSERVED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""Linear layers whose inputs an observer sees; q, k and v have the same one, gate and up too."""
Observer: TypeAlias = Callable[[str, FloatArray], FloatArray]
"""Gets the name of a linear layer (`model.layers.3.mlp.down_proj`) and its input (tokens, width); what it gives is kept.

The tokens are those behind a prefix, of all entries: what an artifact evaluates itself. (Of all entries where none has a prefix.)
"""


@dataclass(frozen=True)
class Entry:
    """A prompt as the walk reads it: what follows one of the prefixes, or (`prefix` None) a whole prompt."""

    prefix: Role | None
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Walked:
    """What the source itself says, in float32."""

    keys_values: Mapping[Role, tuple[FloatArray, FloatArray]]
    """Of each prefix: keys after RoPE and values, both (layers, tokens, kv_heads, head_dim)."""
    logits: FloatArray
    """Of the token that follows each entry: (entries, vocab)."""
    observed: Mapping[str, FloatArray] = field(default_factory=dict)
    """What the observer gave, by the names of the linear layers."""


def entry_of(conversation: Conversation, profile: Profile, tokenizer: Tokenizer, answers: Answers,
             prefixes: Mapping[Role, tuple[int, ...]]) -> Entry:
    """A conversation as an entry; the answer's lead-in is appended, so that the next token is the verdict's first."""
    ids = (*tokenizer.encode(render(profile, conversation).segments), *answers.lead_in)
    prefix = prefixes.get(conversation.role)
    if prefix and ids[: len(prefix)] == prefix:
        return Entry(conversation.role, ids[len(prefix) :])
    return Entry(None, ids)


def walk(weights: Weights, prefixes: Mapping[Role, tuple[int, ...]], entries: Sequence[Entry], progress: Progress | None = None, *,
         observer: Observer | None = None, state: Path | None = None, identity: str = "") -> Walked:
    """Evaluate prefixes and entries layer by layer; raises `ConversionError` when the source gives no finite logits.

    `state` is a file that the walk saves itself to every few layers, and is taken up from when it is of the same `identity`
    (source and settings), prefixes and entries; a damaged one counts as none.
    """
    return _Walker(weights, prefixes, entries, observer).walk(progress, state, identity)


def save_prefix(path: Path, keys: FloatArray, values: FloatArray) -> None:
    """Write a prefix file: `keys` and `values`, float32 (layers, tokens, kv_heads, head_dim)."""
    with path.open("wb") as stream:
        np.savez(stream, keys=keys, values=values)


@dataclass(frozen=True)
class _Part:
    """The rows of one prefix or entry among those of all."""

    rows: slice
    parent: Role | None
    """The prefix that it follows."""


class _Walker(ReferenceBackend):
    """The reference's layers over the tokens of all prefixes and entries together; each attends to its own past only.

    Rows are in the order: prefixes, entries without one, entries behind one.
    """

    def __init__(self, weights: Weights, prefixes: Mapping[Role, tuple[int, ...]], entries: Sequence[Entry],
                 observer: Observer | None) -> None:
        super().__init__(weights)
        self.observer = observer
        self.sizes = expected(weights.shape)
        self.asked = (dict(prefixes), tuple(entries))
        order = sorted(range(len(entries)), key=lambda place: entries[place].prefix is not None)
        parts, positions, start = [], [], 0
        for ids, parent in [*((ids, None) for ids in prefixes.values()), *((entries[i].ids, entries[i].prefix) for i in order)]:
            before = len(prefixes[parent]) if parent else 0
            parts.append(_Part(slice(start, start + len(ids)), parent))
            positions.append(np.arange(before, before + len(ids)))
            start += len(ids)
        self.roots = dict(zip(prefixes, parts, strict=False))
        self.leaves = [part for _, part in sorted(zip(order, parts[len(prefixes) :], strict=True), key=lambda pair: pair[0])]
        self.parts, self.positions = parts, np.concatenate(positions)
        self.ids = np.concatenate([*map(np.asarray, prefixes.values()), *(np.asarray(entries[place].ids) for place in order)])
        behind = [part for part in self.leaves if part.parent] or self.leaves
        self.seen = slice(min(part.rows.start for part in behind), start)
        self.trunk = slice(0, sum(map(len, prefixes.values())))
        self.kept: list[tuple[FloatArray, FloatArray]] = []
        self.observed: dict[str, FloatArray] = {}

    def walk(self, progress: Progress | None, state: Path | None, identity: str) -> Walked:
        layers, mark = self.shape.layers, self._mark(identity)
        x = self._taken_up(state, mark) if state else None
        if x is None:
            x = self.weights.rows("model.embed_tokens.weight", self.ids)
        for layer in range(len(self.kept), layers):
            if progress:
                progress("reference", layer, layers)
            x = self._layer(layer, x, self.positions, ([], []), [])
            if state and (len(self.kept) % EVERY == 0 or len(self.kept) == layers):
                self._save(state, mark, x)
        if progress:
            progress("reference", layers, layers)
        logits = self._head(x[[part.rows.stop - 1 for part in self.leaves]])
        keys, values = (np.stack(each) for each in zip(*self.kept, strict=True))
        if not all(np.isfinite(each).all() for each in (logits, keys, values)):
            raise ConversionError("The source model gives numbers that are not finite; its weights are damaged.")
        return Walked({role: (keys[:, part.rows], values[:, part.rows]) for role, part in self.roots.items()}, logits, self.observed)

    def _tensor(self, name: str) -> FloatArray:
        return self.weights.tensor(name)

    def _linear(self, value: FloatArray, name: str) -> FloatArray:
        if self.observer and name.endswith(OBSERVED):
            self.observed[name] = self.observer(name, value[self.seen])
        rows, width = self.sizes[f"{name}.weight"]
        out = np.empty((len(value), rows), np.float32)
        for part in pieces(rows, width):
            np.matmul(value, self.weights.rows(f"{name}.weight", part).T, out=out[:, part])
        return out

    def _remembering(self, q: FloatArray, k: FloatArray, v: FloatArray,
                     past: tuple[list[FloatArray], list[FloatArray]], cache: Cache) -> FloatArray:  # noqa: ARG002  parts have their own
        self.kept.append((k[:, self.trunk].transpose(1, 0, 2).copy(), v[:, self.trunk].transpose(1, 0, 2).copy()))
        out = []
        for part in self.parts:
            before = [self.roots[part.parent].rows] if part.parent else []
            keys, values = (np.concatenate([each[:, rows] for rows in [*before, part.rows]], 1) for each in (k, v))
            out.append(self._attend(q[:, part.rows], keys, values))
        return np.concatenate(out)

    def _head(self, last: FloatArray) -> FloatArray:
        """(entries, hidden) to (entries, vocab)."""
        table = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        normed = self._norm(last, "model.norm.weight")
        return np.concatenate([normed @ self.weights.rows(table, part).T for part in pieces(*self.sizes[table])], 1)

    def _mark(self, identity: str) -> str:
        """Of everything that the state depends on."""
        prefixes, entries = self.asked
        asked = [identity, self.shape.to_dict(), list(prefixes.items()), [[entry.prefix, entry.ids] for entry in entries]]
        return hashlib.sha256(json.dumps([*asked, self.observer is not None]).encode()).hexdigest()

    def _save(self, path: Path, mark: str, x: FloatArray) -> None:
        keys, values = (np.stack(each) for each in zip(*self.kept, strict=True))
        arrays: dict[str, Any] = {"mark": np.array(mark), "x": x, "keys": keys, "values": values}
        arrays |= {f"observed {name}": value for name, value in self.observed.items()}
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)

    def _taken_up(self, path: Path, mark: str) -> FloatArray | None:
        """The rows behind the last layer of a saved state, whose keys, values and observations are taken over too."""
        # the archive holds a checksum of every array
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error), np.load(path, allow_pickle=False) as saved:
            arrays: dict[str, NDArray[Any]] = dict(saved)
            if str(arrays.pop("mark")) == mark:
                x, keys, values = (arrays.pop(name) for name in ("x", "keys", "values"))
                self.kept = list(zip(keys, values, strict=True))
                self.observed = {name.removeprefix("observed "): value for name, value in arrays.items()}
                return x
        return None
