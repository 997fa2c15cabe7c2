"""The backend contract: token ids in, answer logits out, for sequences that share a prefix.

A backend knows nothing of text, categories or verdicts. A sequence is a node in a tree; children share the keys and
values of their ancestors. The result for a node does not depend on what else is in its pass nor on how the pass was cut
(within the tolerance of its precision).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import CancelledError, DeadlineError, InputError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

PACKED = 1.1
"""Bytes of memory that ONNX Runtime's packed weights take for each byte of the artifact."""


@dataclass(frozen=True, eq=False)
class Node:
    """A sequence kept by a backend: the root's prefix and every extension up to here. Identity is what counts."""

    length: int
    """Tokens from the root's first to this node's last."""
    logits: FloatArray
    """Logits (len(head_ids),) that follow the last token, in the order of `BackendInfo.head_ids`; none for a prefix of the artifact."""
    parent: Node | None = None
    state: object = None
    """Whatever the backend keeps for it."""


@dataclass(frozen=True)
class BackendInfo:
    """What was really granted and is really running."""

    name: str
    """`onnx`, `llama`, `reference` or `scripted`."""
    runtime: str
    """Name and version of the runtime, as `onnxruntime 1.31.0`."""
    device: str
    """`cpu`, `cuda`, `metal`, ..., as granted."""
    precision: str
    threads: int
    context: int
    """Most tokens of one sequence."""
    head_ids: IntArray = field(repr=False)
    """Token ids (rows,) whose logits a node carries, ascending."""
    kernel: str = ""
    """How quantised products are computed, where the backend chooses: `avx512-vnni`, `unsigned`, ..."""
    fallbacks: tuple[str, ...] = ()
    """What was taken instead of something better, and why, in words."""
    pass_tokens: int | None = None
    """So many new tokens are worth one pass; with more, each takes longer. None where there is no such number."""


@dataclass
class Run:
    """Cancel token and deadline of one call; give one `Run` to each call and `cancel()` it from any thread."""

    deadline: float | None = None
    """`time.monotonic()` at which the call has to stop, or None."""
    _event: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def within(cls, seconds: float | None) -> Run:
        """A run that ends `seconds` from now, or never; raises `InputError` for what is no time."""
        if seconds is None:
            return cls()
        try:
            number = math.nan if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) else float(seconds)
        except OverflowError:  # not repeated in the message: it has hundreds of digits
            raise InputError("timeout is too large; leave it out to wait for ever.") from None
        if not number >= 0:  # NaN too
            raise InputError(f"timeout is {seconds!r}; a number of seconds, not below 0, is needed.")
        return cls(time.monotonic() + number)

    def cancel(self) -> None:
        """Stop the call as soon as the runtime allows; older nodes stay valid."""
        self._event.set()

    @property
    def stopped(self) -> bool:
        """Cancelled or out of time; cheap enough for a runtime's abort callback."""
        return self._event.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def check(self) -> None:
        """Raises `CancelledError` or `DeadlineError` if the call has to stop."""
        if self._event.is_set():
            raise CancelledError("The call was cancelled; no verdict was reached.")
        if self.stopped:
            raise DeadlineError("The call ran out of time; no verdict was reached.")


class Backend(Protocol):
    """Five calls; not thread-safe: the guard holds one lock around them."""

    @property
    def info(self) -> BackendInfo:
        """What was granted."""
        ...

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """Evaluate a prefix once, or restore it from the artifact, and keep it until `close`."""
        ...

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """One node for each entry, all evaluated in one forward pass, in order.

        Entries of one parent that begin alike share those tokens' work. Split into several passes only where one would
        be too large. Raises `ContextLengthError`, `InferenceError`, `CancelledError`, `DeadlineError`; after any of
        them the nodes given stay valid.
        """
        ...

    def close(self, node: Node) -> None:
        """Forget a node; its ancestors and other nodes stay. Closing twice is allowed."""
        ...

    def shutdown(self) -> None:
        """Free everything; no further call is allowed."""
        ...
