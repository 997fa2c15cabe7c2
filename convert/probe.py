"""What the source's full head says at the place of the verdict: which forms come, how much mass they have, which rows to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.answers import Answers
from edgeguard.backends.base import FloatArray
from edgeguard.profiles import Profile
from edgeguard.tokenizer import Tokenizer

SENTINELS = 256
MOST_CODES = 50  # of a custom policy


def needed_rows(profile: Profile, tokenizer: Tokenizer, answers: Answers) -> list[int]:
    """Ids that the head must hold: all answers and end tokens, and the codes of the longest custom policy."""
    ids = set(answers.ids)
    if profile.custom_policy:
        codes = [f"{profile.code_prefix}{number}" for number in range(1, MOST_CODES + 1)]
        ids |= set(Answers.build(profile, codes, tokenizer).ids)
    return sorted(ids)


def head_rows(needed: Sequence[int], logits: FloatArray, sentinels: int = SENTINELS) -> tuple[int, ...]:
    """The needed ids and the likeliest others over all prompts (prompts, vocab), ascending."""
    others = softmax(logits).max(0)
    others[list(needed)] = -1
    count = min(sentinels, len(others) - len(needed))
    return tuple(sorted({*needed, *np.argsort(-others, kind="stable")[:count].tolist()}))


def probe(profile: Profile, answers: Answers, rows: Sequence[int], logits: FloatArray, bare: FloatArray) -> dict[str, Any]:
    """The manifest's `probe`.

    `logits` (prompts, vocab) with the profile's beginning tokens, `bare` without them (no rows if it has none).
    `forms`: mean probability of each surface form's first token; `mass`: share of all forms in the whole vocabulary,
    `mass_in_rows`: in the rows that are kept.
    """
    forms = (*profile.safe_forms, *profile.unsafe_forms)
    spelled = {form: ids[0] for form, ids in zip(forms, (*answers.safe, *answers.unsafe), strict=True)}
    firsts = sorted(set(spelled.values()))
    likely = softmax(logits)
    mass = likely[:, firsts].sum(1)
    kept = softmax(logits[:, list(rows)])
    inside = kept[:, np.searchsorted(list(rows), firsts)].sum(1)
    report: dict[str, Any] = {
        "prompts": len(logits),
        "bos": list(profile.begin),
        "lead_in": len(answers.lead_in),
        "forms": {form: _short(likely[:, first].mean()) for form, first in spelled.items()},
        "mass": {"mean": _short(mass.mean()), "least": _short(mass.min())},
        "mass_in_rows": {"mean": _short(inside.mean()), "least": _short(inside.min())},
    }
    if len(bare):
        report["mass_without_bos"] = {"mean": _short(softmax(bare)[:, firsts].sum(1).mean())}
    return report


def softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Probabilities over the last axis."""
    raised = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return np.asarray(raised / raised.sum(-1, keepdims=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
