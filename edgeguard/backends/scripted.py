"""A backend without a model: logits come from a function. For tests of edgeguard and of the applications that embed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from edgeguard.answers import Answers, Ids, State
from edgeguard.backends.base import BackendInfo, Node, Run
from edgeguard.errors import ContextLengthError, InputError
from edgeguard.tokenizer import Tokenizer

CERTAIN = 12.0
"""Logit of the token that a scripted answer goes on with; all others have 0."""


class ScriptedBackend:
    """Honours the whole contract of `Backend`: a node that is closed or another backend's is an error, passes are counted."""

    def __init__(self, logits: Callable[[Ids], Any], head_ids: Sequence[int], *, context: int = 8192) -> None:
        """`logits(ids)` gives the row (len(head_ids),) behind a whole sequence, prefix included; `head_ids` ascend."""
        self._logits = logits
        self._info = BackendInfo("scripted", "script", "cpu", "fp32", 1, context, np.asarray(head_ids, dtype=np.int64))
        self._open: set[Node] = set()
        self._running = True
        self.passes = 0
        """Calls of `open` and `extend` so far."""

    @classmethod
    def answering(cls, answer: Callable[[str], str], answers: Answers, tokenizer: Tokenizer, *,
                  context: int = 8192) -> ScriptedBackend:
        """A model that is sure of itself: `answer` gets the text of the prompt and returns `safe` or `unsafe\\nS1,S10`.

            ScriptedBackend.answering(lambda prompt: "unsafe\\nS1" if "bomb" in prompt else "safe", answers, tokenizer)

        What it returns is checked: anything else than such an answer raises `InputError`.
        """
        return cls(_Script(answer, answers, tokenizer), answers.ids, context=context)

    @property
    def info(self) -> BackendInfo:
        """What was granted: nothing but the script."""
        return self._info

    @property
    def open_nodes(self) -> int:
        """Nodes that were made and not closed."""
        return len(self._open)

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """A root; an empty prefix is allowed."""
        self._check(run)
        return self._pass([(None, tuple(prefix_ids))])[0]

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """One node for each entry; all or none."""
        self._check(run)
        for node, ids in entries:
            if node not in self._open:
                raise ValueError("This node was closed, or it belongs to another backend.")
            if not ids:
                raise ValueError("An entry has no tokens to go on with.")
        return self._pass([(node, tuple(ids)) for node, ids in entries])

    def close(self, node: Node) -> None:
        """Forget a node; closing twice is allowed."""
        self._open.discard(node)

    def shutdown(self) -> None:
        """Forget all; no further call is allowed."""
        self._open.clear()
        self._running = False

    def _check(self, run: Run) -> None:
        if not self._running:
            raise ValueError("This backend was shut down.")
        run.check()

    def _pass(self, entries: Sequence[tuple[Node | None, Ids]]) -> list[Node]:
        made = []
        for parent, ids in entries:
            whole = (*_ids(parent), *ids)
            if len(whole) > self._info.context:
                raise ContextLengthError(len(whole), self._info.context)
            row = np.asarray(self._logits(whole), dtype=np.float32)
            if row.shape != self._info.head_ids.shape:
                raise ValueError(f"The script gave logits of shape {row.shape}, the head has {len(self._info.head_ids)} rows.")
            made.append(Node(len(whole), row, parent, whole))
        self.passes += 1
        self._open.update(made)
        return made


def _ids(node: Node | None) -> Ids:
    """All ids of a sequence, from its root's first."""
    return () if node is None else cast(Ids, node.state)


class _Script:
    """Logits of a model that gives one canonical answer to each prompt."""

    def __init__(self, answer: Callable[[str], str], answers: Answers, tokenizer: Tokenizer) -> None:
        self._answer, self._answers, self._tokenizer = answer, answers, tokenizer
        self._rows = {id_: row for row, id_ in enumerate(answers.ids)}
        spelled = [*answers.first, *answers.following]
        self._longest = max(map(len, answers.unsafe)) + len(answers.line) + sum(map(len, spelled))

    def __call__(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        begin = self._begin(ids)
        target = self._target(self._answer(self._tokenizer.decode(ids[:begin])))
        said = ids[begin:]
        # off the scripted answer, on a branch that was only tried, the list ends
        going_on = target[len(said)] if said == target[: len(said)] else self._answers.ends[0]
        row = np.zeros(len(self._rows), dtype=np.float32)
        row[self._rows[going_on]] = CERTAIN
        return row

    def _begin(self, ids: Ids) -> int:
        """Where the prompt ends: before the longest run at the end that the automaton allows as the start of an answer."""
        openings = {form[0] for form in self._answers.unsafe}
        for place in range(max(0, len(ids) - self._longest), len(ids)):
            if ids[place] in openings and self._allowed(ids[place:]):
                return place
        return len(ids)

    def _allowed(self, said: Ids) -> bool:
        for form in self._answers.unsafe:
            opening = (*form, *self._answers.line)
            size = min(len(said), len(opening))
            if said[:size] != opening[:size]:
                continue
            state = State()
            for id_ in said[size:]:
                steps = self._answers.steps(state)
                if id_ not in steps:
                    break
                state = steps[id_]
            else:
                return True
        return False

    def _target(self, answer: str) -> Ids:
        """Ids of a canonical answer with its end; raises `InputError` if it is none."""
        verdict, _, listed = answer.partition("\n")
        codes = self._answers.codes
        if answer == "safe":
            return (*self._answers.safe[0], self._answers.ends[0])
        asked = listed.split(",")
        if verdict != "unsafe" or not set(asked) <= set(codes) or len(set(asked)) != len(asked):
            raise InputError(f"{answer!r} is no answer; give 'safe', or 'unsafe', a line break and codes such as {codes[0]!r}.")
        path = self._answers.path(State(tuple(codes.index(code) for code in asked)))
        return (*self._answers.unsafe[0], *self._answers.line, *path, self._answers.ends[0])
