"""A guard for GuardBench (https://github.com/AmenRa/guardbench, 1.0): it asks a function for probabilities; above 0.5 is unsafe to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgeguard.errors import InputError
from edgeguard.guard import Guard
from edgeguard.verdict import Verdict


def moderate(conversations: Sequence[Sequence[Mapping[str, str]]], guard: Guard, threshold: float | None = None) -> list[float]:
    """A number for each conversation, its last turn judged: above 0.5 exactly if the verdict is unsafe.

    GuardBench passes on what its `benchmark` is given besides, as `guard=guard`. At a threshold of 0.5 the number is the score, at another
    one a stretched score of the same order. A first turn of the assistant's, for which no guard model's prompt has a place, is left out if
    others follow. Raises `InputError` for a conversation that cannot be judged, with its place in the batch.
    """
    verdicts: list[Verdict] = []
    items = [turns[1:] if len(turns) > 1 and turns[0].get("role") == "assistant" else turns for turns in conversations]
    judged = guard.check_many(items, None, threshold, verdict_only=True)
    for place in range(1, len(items) + 1):
        try:
            verdicts.append(next(judged))
        except InputError as error:
            raise InputError(f"Conversation {place} of the batch cannot be judged: {error}") from error
    return [probability(verdict.score, verdict.threshold) for verdict in verdicts]


def probability(score: float, threshold: float) -> float:
    """The score stretched so that the threshold lies at 0.5; from the threshold on it is above 0.5, as GuardBench wants it."""
    if score < threshold:
        return 0.5 * score / threshold
    above = 0.5 + 0.5 * (score - threshold) / (1 - threshold) if threshold < 1 else 1.0
    return max(above, math.nextafter(0.5, 1.0))
