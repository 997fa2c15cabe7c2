"""Ordinary ONNX exports of a Llama model (optimum's text-generation-with-past): they load too, slower than a guard graph.

One sequence at a time, nothing shared between the entries of a call, and logits of the whole vocabulary at every token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from edgeguard.architecture import Shape
from edgeguard.backends.base import FloatArray, IntArray, Node, Run
from edgeguard.backends.onnx_session import Session
from edgeguard.backends.packing import MAX_SCORE_BYTES, Entry, lineage
from edgeguard.errors import ContextLengthError, ModelFileError

MAX_TOKENS = 64
"""Of one pass: their logits over a vocabulary of 128,256 take 33 MB."""
PLAIN = ("input_ids", "attention_mask", "position_ids")
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class ExportGraph:
    """The strategy for a graph with `input_ids` and `past_key_values.N.key`; raises `ModelFileError` for any other."""

    def __init__(self, session: Session, shape: Shape, head_ids: IntArray) -> None:
        self._session, self._shape, self._head_ids = session, shape, head_ids
        self._past = [f"past_key_values.{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value")]
        unknown = [name for name in session.types if name not in PLAIN and not PAST.fullmatch(name)]
        missing = [name for name in ("input_ids", *self._past) if name not in session.types]
        if unknown or missing:
            raise ModelFileError(f"The graph is no export with past keys: it lacks {missing[:3]} and has {unknown[:3]}.")
        self._dtype = FLOATS.get(session.types[self._past[0]])
        if self._dtype is None:
            raise ModelFileError(f"The graph keeps keys as {session.types[self._past[0]]}; float and float16 are known.")
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past)]

    def extend(self, entries: Sequence[Entry], run: Run) -> list[Node]:
        """One node for each entry, evaluated one after the other."""
        return [self._evaluate(parent, np.asarray(ids, np.int64), run) for parent, ids in entries]

    def _evaluate(self, parent: Node | None, ids: IntArray, run: Run) -> Node:
        if not len(ids):
            raise ValueError("A node needs at least one token.")
        start = parent.length if parent else 0
        length = start + len(ids)
        if length > self._shape.context:
            raise ContextLengthError(length, self._shape.context)
        past, logits = self._joined(parent), np.empty(0, np.float32)
        step = max(1, min(MAX_TOKENS, MAX_SCORE_BYTES // (4 * self._shape.heads * length)))
        for at in range(start, length, step):
            logits, past = self._pass(ids[at - start : at - start + step], at, past, run)
        own = [np.ascontiguousarray(each[0, :, start:], np.float32) for each in past]
        return Node(length, logits, parent, own)

    def _joined(self, parent: Node | None) -> list[FloatArray]:
        """Keys and values of a whole line (1, kv_heads, P, head_dim), each layer's keys, then its values."""
        empty = np.empty((self._shape.kv_heads, 0, self._shape.head_dim), np.float32)
        states: list[list[FloatArray]] = [node.state for node in lineage(parent)]  # type: ignore[misc]
        parts = zip(*states, strict=True) if states else [(empty,) for _ in self._past]
        return [np.concatenate(each, 1)[None].astype(self._dtype, copy=False) for each in parts]

    def _pass(self, ids: IntArray, start: int, past: list[FloatArray], run: Run) -> tuple[FloatArray, list[FloatArray]]:
        stop = start + len(ids)
        plain = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop, dtype=np.int64)[None],
        }
        feeds = {name: values for name, values in plain.items() if name in self._session.types}
        logits, *present = self._session.run(self._outputs, {**feeds, **dict(zip(self._past, past, strict=True))}, run)
        if logits.shape[-1] != self._shape.vocab:
            raise ModelFileError(f"The graph gives {logits.shape[-1]} logits; the model's vocabulary is {self._shape.vocab}.")
        return logits[0, -1, self._head_ids].astype(np.float32), present
