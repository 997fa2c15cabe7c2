"""From logits to a decision: verdict at the first answer token, codes by the automaton; ends in a decision or an exception.

Codes are the masked greedy ones: at every choice the likeliest token that the automaton allows. Passes are saved by
feeding forced tokens together, and likely continuations as branches of one pass; a branch that is not needed changes nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from edgeguard.answers import Answers, Ids, State
from edgeguard.backends.base import Backend, FloatArray, IntArray, Node, Run
from edgeguard.calibration import UNCALIBRATED, Calibration
from edgeguard.errors import InferenceError, InputError, ModelMismatchError

MASS_FLOOR = 1e-4
"""Below this share of the first answer position, the model is not answering the question."""
BRANCHES = 12
"""Sequences fed ahead in one pass; on a CPU about ten tokens of a pass cost as much as one pass more."""
LIKELY = 0.03
"""Branches less likely than this are not fed ahead."""
END, NEXT, LONGER = 0.5, 0.35, 0.15
"""Guesses of what comes behind a code, as long as the model was not asked: the end, one more code, or (`S1`, `S10`) a digit."""

Requests = list[tuple[Node, Ids]]
Walk = Generator[Requests, list[Node], "Decision"]


@dataclass(frozen=True)
class Decision:
    """What a model decided about one conversation."""

    unsafe: bool
    score: float
    """`raw_score`, calibrated."""
    raw_score: float
    """P(unsafe) of the two answers, their surface forms summed."""
    mass: float
    """Share of the two answers in the probability of all rows of the head."""
    raw: str
    """The canonical answer, `safe`, `unsafe`, or `unsafe\\nS1,S10`."""
    codes: tuple[str, ...] = ()
    """Codes that the answer lists, in its order; empty when safe or not asked for."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """For each code P(it appears in the list | unsafe), a lower bound; at most `unexplored` more. Empty like `codes`."""
    unexplored: float = 0.0
    """Probability of the lists that were followed only in part, so that further codes may appear in them."""
    passes: int = 0
    """Forward passes after the prompt's."""
    decoded: int = 0
    """Tokens evaluated after the prompt's, branches included."""


def decide(backend: Backend, node: Node, answers: Answers, run: Run, *, threshold: float = 0.5,
           calibration: Calibration = UNCALIBRATED, verdict_only: bool = False) -> Decision:
    """`decide_many` for one conversation."""
    return decide_many(backend, [node], answers, run, threshold=threshold, calibration=calibration, verdict_only=verdict_only)[0]


def decide_many(backend: Backend, nodes: Sequence[Node], answers: Answers, run: Run, *, threshold: float = 0.5,
                calibration: Calibration = UNCALIBRATED, verdict_only: bool = False) -> list[Decision]:
    """A decision for each node, which stands at the last token of its prompt (lead-in included); all share their passes.

    Unsafe from a calibrated score of `threshold` on; the calibration's own threshold is left to the caller. The nodes given
    stay open, all others are closed. Raises `InputError` for a threshold outside 0 to 1, `ModelMismatchError` if the head
    lacks a row, `InferenceError` for logits that are not finite or a mass below `MASS_FLOOR`, and whatever the backend raises.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold is {threshold!r}; a number from 0 to 1 is needed.")
    head = _Head(backend.info.head_ids, answers)
    walks = [_walk(node, answers, head, calibration, threshold, verdict_only) for node in nodes]
    decisions: dict[int, Decision] = {}
    opened: list[Node] = []
    answered: dict[int, list[Node] | None] = dict.fromkeys(range(len(walks)))
    try:
        while answered:
            wanted: dict[int, Requests] = {}
            for place, new in answered.items():
                reply = _advance(walks[place], new)
                if isinstance(reply, Decision):
                    decisions[place] = reply
                else:
                    wanted[place] = reply
            entries = [entry for requests in wanted.values() for entry in requests]
            made = backend.extend(entries, run) if entries else []
            opened += made
            given = iter(made)
            answered = {place: [next(given) for _ in requests] for place, requests in wanted.items()}
    finally:
        for node in reversed(opened):
            backend.close(node)
    return [decisions[place] for place in range(len(walks))]


def _advance(walk: Walk, new: list[Node] | None) -> Requests | Decision:
    """What the walk asks for next, or its decision."""
    try:
        return next(walk) if new is None else walk.send(new)
    except StopIteration as stop:
        decision: Decision = stop.value
        return decision


class _Head:
    """Rows of a node's logits by token id."""

    def __init__(self, head_ids: IntArray, answers: Answers) -> None:
        rows = np.searchsorted(head_ids, answers.ids)
        held = rows < len(head_ids)
        held[held] = head_ids[rows[held]] == np.asarray(answers.ids)[held]
        if not held.all():
            lacking = np.asarray(answers.ids)[~held].tolist()
            raise ModelMismatchError(f"The model's head lacks the answer tokens {lacking}; convert it for this profile.")
        self._rows = dict(zip(answers.ids, rows.tolist(), strict=True))

    def read(self, logits: FloatArray, ids: Sequence[int]) -> NDArray[np.float64]:
        """Logits of `ids`; raises `InferenceError` if any row of all is NaN or infinite."""
        if not np.isfinite(logits).all():
            raise InferenceError("The model gave logits that are NaN or infinite; the text was not judged.")
        return logits[[self._rows[id_] for id_ in ids]].astype(np.float64)


def _walk(node: Node, answers: Answers, head: _Head, calibration: Calibration, threshold: float, verdict_only: bool) -> Walk:
    """One conversation: yields the sequences that it wants evaluated, is sent their nodes, returns its decision."""
    safe = head.read(node.logits, [ids[0] for ids in answers.safe])
    unsafe = head.read(node.logits, [ids[0] for ids in answers.unsafe])
    with np.errstate(over="ignore"):
        raw_score = float(1 / (1 + np.exp(_log_sum(safe) - _log_sum(unsafe))))
    mass = float(np.exp(_log_sum([*safe, *unsafe]) - _log_sum(node.logits.astype(np.float64))))
    if mass < MASS_FLOOR:
        raise InferenceError(f"The model gave its two answers a probability of only {mass:.1e}; the text was not judged.")
    score = calibration(raw_score)
    if score < threshold:
        return Decision(False, score, raw_score, mass, "safe")
    if verdict_only:
        return Decision(True, score, raw_score, mass, "unsafe")
    tree = _Tree(answers, head)
    begin = (*answers.unsafe[int(np.argmax(unsafe))], *answers.line)
    wanted, passes, decoded = tree.opening(), 0, 0
    requests: Requests = [(node, (*begin, *answers.path(place))) for place in wanted]
    state = tree.root
    while not state.ended:
        if state not in tree.best:
            if passes:
                wanted = tree.plan(state)
                requests = tree.requests(wanted)
            for place, new in zip(wanted, (yield requests), strict=True):
                tree.add(place, new)
            passes, decoded = passes + 1, decoded + _tokens(requests)
        state = tree.best[state]
    probabilities, unexplored = tree.probabilities()
    codes = tuple(answers.codes[code] for code in state.listed)
    raw = f"unsafe\n{','.join(codes)}"
    return Decision(True, score, raw_score, mass, raw, codes, probabilities, unexplored, passes, decoded)


class _Tree:
    """The lists of codes as far as the model was asked; its places are settled states, those with a real choice.

    P(list | unsafe) is the product, over the choices on the way to it, of the softmax over the tokens that the automaton
    allows there, end tokens summed. With the product of the choices on the way to a place as its weight,

        P(code in list | unsafe) >= sum of the weights of all complete lists with the code
                                  + sum of the weights of all unasked places at which the code is certain already
        unexplored                = sum of the weights of all unasked places

    and the two bounds of a probability differ by at most `unexplored`.
    """

    def __init__(self, answers: Answers, head: _Head) -> None:
        self.root = answers.settle(State())
        self.best: dict[State, State] = {}
        """For every place asked, where the likeliest allowed token leads."""
        self._next: dict[State, dict[State, float]] = {}
        self._nodes: dict[Ids, Node] = {}
        self._reached: dict[State, tuple[list[int], list[State]]] = {}
        self._answers, self._head = answers, head

    def add(self, place: State, node: Node) -> None:
        """The model was asked at `place`."""
        self._nodes[self._answers.path(place)] = node
        ids, reached = self._steps(place)
        logits = self._head.read(node.logits, ids)
        self.best[place] = reached[int(np.argmax(logits))]  # of equals the lowest id, as argmax over all rows has it
        self._next[place] = _shares(reached, logits)

    def _steps(self, place: State) -> tuple[list[int], list[State]]:
        """Ids that may follow, ascending, and the places that they lead to."""
        if place not in self._reached:
            steps = self._answers.steps(place)
            ids = sorted(steps)
            self._reached[place] = ids, [self._answers.settle(steps[id_]) for id_ in ids]
        return self._reached[place]

    def opening(self) -> list[State]:
        """Places for the first pass: the choice of the first code and what is behind each, so that one code takes one pass."""
        places = list(self._spelling(self.root))
        return places if len(places) <= BRANCHES else [self.root]

    def _spelling(self, place: State) -> Iterator[State]:
        """The choices within the code at hand, up to the one behind it."""
        yield place
        for reached in self._steps(place)[1]:
            if not reached.ended and reached.listed == place.listed:
                yield from self._spelling(reached)

    def plan(self, missing: State) -> list[State]:
        """Places for the next pass: what the code at hand can need, then what is likely, the most likely first."""
        wanted = dict.fromkeys(self._cover(missing))
        order = count()
        queue = [(-1.0, next(order), missing), (-1.0, next(order), self.root)]
        seen: set[State] = set()
        while queue and len(wanted) < BRANCHES:
            weight, _, place = heapq.heappop(queue)
            if -weight < LIKELY:
                break
            if place in seen or place.ended:
                continue
            seen.add(place)
            if place not in self._next:
                wanted[place] = None
            for reached, share in (self._next.get(place) or self._guess(place)).items():
                heapq.heappush(queue, (weight * share, next(order), reached))
        return list(wanted)

    def _cover(self, place: State) -> Iterator[State]:
        """All that is needed to read the code at hand to its end and to choose the next: one pass a code at most."""
        yield place
        for reached in self._steps(place)[1]:
            if not reached.ended:
                yield from self._cover(reached) if reached.listed == place.listed else [reached]

    def _guess(self, place: State) -> dict[State, float]:
        """Shares where the model was not asked yet; codes as at the first choice. Only decides what is fed ahead."""
        ids, reached = self._steps(place)
        kinds = [END if state.ended else NEXT if len(state.listed) > len(place.listed) else LONGER for state in reached]
        if END in kinds:
            return _shares(reached, np.log([kind / kinds.count(kind) for kind in kinds]))
        logits = self._head.read(self._nodes[self._answers.path(self.root)].logits, ids)
        # what listed codes begin with was likely because of them
        size, spelled = len(place.partial), [self._answers.following[code] for code in place.listed]
        taken = {code[size] for code in spelled if len(code) > size and code[:size] == place.partial}
        logits[[id_ in taken for id_ in ids]] = logits.min()
        return _shares(reached, logits)

    def requests(self, places: Sequence[State]) -> Requests:
        """Each place as a sequence that goes on from the longest one kept."""
        requests: Requests = []
        for path in map(self._answers.path, places):
            kept = next(size for size in range(len(path) - 1, -1, -1) if path[:size] in self._nodes)
            requests.append((self._nodes[path[:kept]], path[kept:]))
        return requests

    def probabilities(self) -> tuple[dict[str, float], float]:
        """Lower bounds for each code, in the order of the codes, and what is unexplored; see the class."""
        found = [0.0] * len(self._answers.codes)
        unexplored = 0.0
        stack = [(self.root, 1.0)]
        while stack:
            place, weight = stack.pop()
            if place in self._next:
                stack += [(reached, weight * share) for reached, share in self._next[place].items()]
                continue
            certain = list(place.listed)
            if not place.ended:
                unexplored += weight
                possible = self._answers.possible(place)
                certain += possible if len(possible) == 1 else []
            for code in certain:
                found[code] += weight
        return dict(zip(self._answers.codes, (min(share, 1.0) for share in found), strict=True)), min(unexplored, 1.0)


def _shares(reached: Sequence[State], logits: NDArray[np.float64]) -> dict[State, float]:
    """Softmax of the logits, summed for each place reached."""
    shares: dict[State, float] = dict.fromkeys(reached, 0.0)
    for state, share in zip(reached, np.exp(logits - _log_sum(logits)), strict=True):
        shares[state] += float(share)
    return shares


def _log_sum(logits: Sequence[float] | NDArray[np.float64]) -> np.float64:
    """log of the sum of exp."""
    values = np.asarray(logits, dtype=np.float64)
    top: np.float64 = values.max()
    result: np.float64 = top + np.log(np.exp(values - top).sum())
    return result


def _tokens(requests: Requests) -> int:
    """Tokens that a pass evaluates: beginnings shared by sequences of one node count once."""
    return len({(node, ids[:size]) for node, ids in requests for size in range(1, len(ids) + 1)})
