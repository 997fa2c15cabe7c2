"""The end of every conversion: the artifact on its runtime against its source in full precision, on the same fixed prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeguard.backends.base import Backend, FloatArray, Node, Run
from edgeguard.convert.prefixes import Entry
from edgeguard.convert.probe import softmax
from edgeguard.errors import ConversionError
from edgeguard.store import Artifact
from edgeguard.store.files import Progress
from edgeguard.verdict import Role

THRESHOLD = 0.5
ENOUGH = 6  # decided texts, below which agreement would be luck


@dataclass(frozen=True)
class Limits:
    """What a precision may lose."""

    difference: float | None
    """Largest difference of any compared logit; None where only the relative noise is judged."""
    noise: float
    """Root mean square of the logits' errors, relative to the spread of the source's own logits."""
    drift: float
    """Mean difference of the scores."""
    agreement: float
    """Share of equal verdicts among the decided texts."""


# measured noise of a 135M model: 0.05 at 8 bits, 0.13 at 4; random models have up to 0.3; weights that are wrong give 1 or more
EXACT = Limits(1e-2, 1e-2, 1e-3, 1.0)
HALF = Limits(None, 0.05, 0.02, 0.95)
EIGHT = Limits(None, 0.20, 0.05, 0.90)
FIVE = Limits(None, 0.35, 0.08, 0.85)
FOUR = Limits(None, 0.60, 0.12, 0.75)
LIMITS: dict[str, Limits] = {
    "fp32": EXACT, "f32": EXACT, "fp16": HALF, "f16": HALF, "bf16": HALF, "int8": EIGHT, "q8_0": EIGHT, "q6_k": EIGHT,
    "q5_k_m": FIVE, "int4": FOUR, "q4_k_m": FOUR, "q4_0": FOUR,
}
"""By precision."""


def answers_of(backend: Backend, prefixes: Mapping[Role, tuple[int, ...]], entries: Sequence[Entry],
               rows: Sequence[int], progress: Progress | None = None) -> FloatArray:
    """What the artifact says to the entries: logits (entries, rows) of the token ids `rows`."""
    run = Run()
    columns = np.searchsorted(backend.info.head_ids, rows)
    roots: dict[Role, Node] = {}
    found: list[FloatArray] = []
    for entry in entries:
        if progress:
            progress("gate", len(found), len(entries))
        if entry.prefix is None:
            node = backend.open(entry.ids, run)
        else:
            if entry.prefix not in roots:
                roots[entry.prefix] = backend.open(prefixes[entry.prefix], run)
            node = backend.extend([(roots[entry.prefix], entry.ids)], run)[0]
        found.append(np.array(node.logits[columns]))
        backend.close(node)
    if progress:
        progress("gate", len(found), len(entries))
    return np.stack(found)


def runtime_of(artifact: Artifact, threads: int | None, context: int, *, copies: bool) -> Backend:
    """The artifact on its runtime, for prompts of `context` tokens at most.

    Without `copies` a GGUF's weights stay mapped from their file; some kernels are slower so. For ONNX see `gate_pieces`.
    """
    if artifact.kind == "onnx":
        from edgeguard.backends.onnx import OnnxBackend

        return OnnxBackend(artifact, device="cpu", threads=threads)
    from edgeguard.backends.llama import LlamaBackend

    return LlamaBackend(artifact.weights, device="cpu", threads=threads, context=context, repack=copies)


def measure(source: FloatArray, artifact: FloatArray, safe: Sequence[int], unsafe: Sequence[int],
            precision: str) -> dict[str, Any]:
    """The manifest's `gate`, from the logits (prompts, rows) of both; `safe` and `unsafe` are columns.

    A text is decided when the source's score is farther from the threshold than the drift that the precision may have;
    with fewer than six decided texts (a random model) `agreement` is None and not judged.
    """
    limits = LIMITS[precision]
    error = artifact - source
    # what moves all logits of a prompt alike changes no probability
    spread = source - source.mean(1, keepdims=True)
    noise = np.sqrt(np.mean((error - error.mean(1, keepdims=True)) ** 2) / max(np.mean(spread**2), 1e-12))
    before, after = _scores(source, safe, unsafe), _scores(artifact, safe, unsafe)
    decided = np.abs(before - THRESHOLD) > limits.drift
    same = (before >= THRESHOLD) == (after >= THRESHOLD)
    drift = np.abs(after - before)
    return {
        "prompts": len(source),
        "rows": source.shape[1],
        "difference": _short(np.abs(error).max()),
        "noise": _short(noise),
        "drift": _short(drift.mean()),
        "drift_most": _short(drift.max()),
        "decided": int(decided.sum()),
        "agreement": _short(same[decided].mean()) if decided.sum() >= ENOUGH else None,
    }


def judge(numbers: Mapping[str, Any], precision: str) -> None:
    """Raises `ConversionError` naming every number that is over its limit, or not a number."""
    limits = LIMITS[precision]
    most = {"difference": limits.difference, "noise": limits.noise, "drift": limits.drift}
    # written so that NaN fails
    broken = [f"{name} {numbers[name]} is over {limit}" for name, limit in most.items()
              if limit is not None and not numbers[name] <= limit]
    agreement = numbers["agreement"]
    if agreement is not None and not agreement >= limits.agreement:
        broken.append(f"agreement {agreement} on {numbers['decided']} decided texts is under {limits.agreement}")
    if broken:
        raise ConversionError(f"The {precision} artifact failed the gate against its source: {'; '.join(broken)}.")


def _scores(logits: FloatArray, safe: Sequence[int], unsafe: Sequence[int]) -> FloatArray:
    """P(unsafe) among the answers, all forms summed."""
    both = softmax(logits[:, [*safe, *unsafe]])
    return np.asarray(both[:, len(safe) :].sum(1), np.float32)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
