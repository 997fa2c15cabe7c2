"""Our kernels for what lies between a guard graph's products (`fused.c`): where there are some, tried against NumPy, refused if wrong.

Guard graphs hold these operators as functions (`convert/functions.py`), which ONNX Runtime takes apart where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.kernels import FUSED, NOT_BUILT, Kernel
from edgeguard.backends.onnx_protobuf import Node, operators
from edgeguard.errors import InferenceError, ModelMemoryError
from edgeguard.machine import Cpu

Values: TypeAlias = Mapping[str, NDArray[Any]]
Compute: TypeAlias = "Callable[[bytes, Kernel, Values], Values]"
"""Runs a model, by a kernel, on named inputs; gives named results."""

NEEDS = frozenset({"avx2", "fma"})
PARTS = 4
"""Of a row that is quantised in parts, each with its own largest magnitude."""
TERMS = 2
"""Of a row that is quantised finely: its bytes, and those of what their rounding leaves."""
STEP, ZERO = np.float32(1 / 127), np.uint8(128)  # of the largest magnitude, and the byte that stands for 0
FINER = np.float32(1 / 254)  # a step of the second term over one of the first, whose rounding leaves half a step up or down
TINY = np.float32(1e-30)  # smaller magnitudes are taken for it
EPSILON = 0.5  # of the trial's norms, so large that a norm without it is another one
CLOSE = 1e-5
"""How far sums of a trial may be from NumPy's, relative to numbers around 1."""
BROKEN = np.array([0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000], np.uint32).view(np.float32)
"""NaNs of all kinds, and infinities."""


def _attention(of: str = "", past_key: str = "past_key") -> tuple[str, ...]:
    names = ("query", "key", "value", past_key, "past_value", "asked_at", "asked_cosines", "asked_sines", "at", "cosines", "sines",
             "queries", "places", "keys", "mask")
    return tuple(f"{of}{name}" for name in names)


NODES = (
    Node("Quantise", ("rows", "zeros"), ("bytes", "steps")),
    Node("QuantiseParts", ("rows", "zeros"), (*(f"part_{part}" for part in range(PARTS)), "part_steps")),
    Node("QuantiseFinely", ("rows", "zeros"), ("terms", "term_steps")),
    Node("CombineParts", ("part_steps", *(f"product_{part}" for part in range(PARTS))), ("combined",)),
    Node("CombineFinely", ("term_steps", "products"), ("finely",)),
    Node("Gate", ("rows", "up"), ("gated",)),
    Node("GateInSteps", ("rows", "up", "multiples"), ("gated_in_steps",)),
    Node("Norm", ("residual", "up", "weights"), ("normed", "sum"), numbers={"epsilon": EPSILON}),
    Node("NormInSteps", ("residual", "up", "weights", "multiples"), ("normed_in_steps", "sum_in_steps"), numbers={"epsilon": EPSILON}),
    Node("Attention", _attention(), ("seen", "new_key", "new_value")),
    Node("AttentionInSteps", (*_attention("long_"), "long_query_steps", "long_steps"), ("long_seen", "long_new_key", "long_new_value")),
    Node("Quantise", ("broken", "broken_zeros"), ("_0", "broken_steps")),
    Node("QuantiseFinely", ("broken", "broken_zeros"), ("_1", "broken_term_steps")),
    Node("Gate", ("broken", "broken"), ("broken_gated",)),
    Node("Norm", ("broken", "broken", "broken_weights"), ("broken_normed", "broken_sum"), numbers={"epsilon": EPSILON}),
    Node("Attention", _attention(past_key="broken_key"), ("broken_seen", "_2", "_3")),
)


def tried(cpu: Cpu, compute: Compute) -> tuple[Path | None, tuple[str, ...]]:
    """The library for a processor, None where there is none that is right, and what was wanted in vain."""
    if not fits(cpu):
        return None, ()
    library = built()
    if library is None:
        return None, (NOT_BUILT,)
    given = _given()
    try:
        found = compute(operators(NODES, given), Kernel("trial", fused=library), given)
    except (InferenceError, ModelMemoryError):  # it may not fit the runtime
        return None, ("edgeguard's fused operators were tried here and failed",)
    right = all(_is_right(found[name], wanted) for name, wanted in _wanted(given).items()) and _are_broken(found)
    return (library, ()) if right else (None, ("edgeguard's fused operators were tried here and are wrong",))


def fits(cpu: Cpu) -> bool:
    """Whether a processor has what the library is made for."""
    return cpu.arch == "x86_64" and cpu.flags >= NEEDS


def built() -> Path | None:
    """The library, unless it was not built when edgeguard was installed."""
    spec = find_spec(FUSED)
    return Path(spec.origin) if spec and spec.origin else None


def told(cpu: Cpu) -> dict[str, Kernel]:
    """What a processor gets, by what it is for."""
    if not fits(cpu):
        return {}
    reason = "the processor has AVX2 and FMA; one operator of edgeguard's own for each of what lies between products"
    return {"fused": Kernel("edgeguard fused", reason=reason) if built() else Kernel("onnxruntime", reason=NOT_BUILT)}


def _is_right(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """The same bits, or sums nearly: those in float64."""
    exact = wanted.dtype != np.float64
    return found.shape == wanted.shape and (np.array_equal(found, wanted) if exact else np.allclose(found, wanted, CLOSE, CLOSE))


def _are_broken(found: Values) -> bool:
    """What was computed from a NaN or an infinity is no ordinary number."""
    whole = (found[f"broken_{name}"] for name in ("steps", "term_steps", "seen", "normed"))
    return not any(np.isfinite(each).any() for each in (*whole, found["broken_gated"][:, 5], found["broken_sum"][:, 5]))


def _given() -> dict[str, NDArray[Any]]:
    """Large and small numbers, widths with a rest, attention that goes all ways through the library, and what is not finite."""
    tokens = 15
    rows = _drawn(0, tokens, 300) * np.exp2(np.arange(tokens)[:, None] - 9).astype(np.float32)
    rows[0], rows[1, 7], rows[2, 3] = 0, 1e30, -1e-38
    broken = _drawn(1, len(BROKEN), 40)
    broken[:, 5] = BROKEN
    # few queries at a time, whose keys are read where they lie; many of an odd width, whose keys are copied together
    short, long = _lanes(2, 2, 64, [13, 2], [41, 31]), _lanes(4, 1, 40, [76, 1], [41, 70], more=3)
    return {
        "rows": rows, "zeros": np.full(tokens, 128, np.uint8), "up": _drawn(2, tokens, 300),
        **{f"product_{part}": _drawn(20 + part, tokens, 1, 37) for part in range(PARTS)},
        "products": _drawn(4, tokens, TERMS, 37), "multiples": _multiples(tokens),
        "broken": broken, "broken_zeros": np.full(len(BROKEN), 128, np.uint8), "broken_weights": _drawn(10, 40),
        "residual": _drawn(11, tokens, 300), "weights": _drawn(12, 300), **short,
        "broken_key": np.full_like(short["past_key"], BROKEN[1]),
        **{f"long_{name}": each for name, each in long.items()}, "long_steps": _multiples(len(long["key"])),
        "long_query_steps": _multiples(len(long["query"]))[::-1].copy(),
    }


def _drawn(seed: int, *sizes: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


def _multiples(tokens: int) -> NDArray[np.float32]:
    return np.exp2(np.arange(tokens) % 3 - 1).astype(np.float32)[:, None]


def _lanes(group: int, kv_heads: int, width: int, counts: Sequence[int], seen: Sequence[int], more: int = 0) -> dict[str, NDArray[Any]]:
    """Attention in two lanes that share a past: `counts` tokens ask, the first of a lane sees `seen` keys, each later one a key more.

    The pass has `more` tokens that do not ask, first of all.
    """
    past, tokens, depth, columns = 40, sum(counts), max(counts), 128
    angles = np.arange(tokens + more)[:, None] / np.exp2(np.arange(width // 2) / 4)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    starts = (0, counts[0])
    queries = np.stack([np.minimum(start + np.arange(depth), start + count - 1) for start, count in zip(starts, counts, strict=True)])
    own = [np.arange(past), past + more + np.arange(starts[1]), past + more + np.arange(starts[1], tokens)]
    keys = np.zeros((2, columns), np.int64)
    for lane, (line, count) in enumerate(zip((np.r_[own[0], own[1]], np.r_[own[0][: seen[1] - 1], own[2]]), counts, strict=True)):
        keys[lane, : len(line)] = line[: seen[lane] + count - 1]
    mask = np.where(np.arange(columns) < (np.asarray(seen)[:, None] + np.arange(depth))[:, :, None], 0, -np.inf).astype(np.float32)
    return {
        "query": _drawn(5, tokens, group * kv_heads * width), "key": _drawn(6, tokens + more, kv_heads * width),
        "value": _drawn(7, tokens + more, kv_heads * width), "past_key": _drawn(8, past, kv_heads, width),
        "past_value": _drawn(9, past, kv_heads, width), "at": np.arange(tokens + more)[None], "cosines": cosines, "sines": sines,
        "asked_at": np.arange(tokens)[None], "asked_cosines": cosines[more:], "asked_sines": sines[more:], "queries": queries,
        "places": np.r_[np.arange(counts[0]), depth + np.arange(counts[1])], "keys": keys, "mask": np.tile(mask, (1, group, 1)),
    }


def _wanted(given: Values) -> dict[str, NDArray[Any]]:
    """By NumPy: what is to be the same bits as such, sums in float64."""
    rows = given["rows"]
    whole, steps = _quantised(rows)
    parts = [_quantised(part) for part in np.split(rows, PARTS, 1)]
    rest, finer = rows - (whole.astype(np.float32) - 128) * steps, steps * FINER
    terms = np.stack([whole, (np.rint(rest / finer) + 128).astype(np.uint8)], 1)
    part_steps, term_steps = np.stack([step for _, step in parts], 1), np.stack([steps, finer], 1)
    multiples, long = given["multiples"], {name[5:]: each for name, each in given.items() if name.startswith("long_")}
    long |= {name: long[name] * long[steps] for name, steps in (("query", "query_steps"), ("key", "steps"), ("value", "steps"))}
    return {
        "bytes": whole, "steps": steps, **{f"part_{place}": part[:, None] for place, (part, _) in enumerate(parts)},
        "part_steps": part_steps, "terms": terms, "term_steps": term_steps,
        "gated": _gated(rows, given["up"]), "gated_in_steps": _gated(rows * multiples, given["up"] * multiples),
        "combined": sum(part_steps[:, part].astype(np.float64) * given[f"product_{part}"][:, 0] for part in range(PARTS)),
        "finely": (term_steps.astype(np.float64) * given["products"]).sum(1),
        **_normed(given, given["up"]), **_normed(given, given["up"] * multiples, "_in_steps"),
        **_attended(given), **{f"long_{name}": each for name, each in _attended(long).items()},
    }


def _quantised(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    steps = np.maximum(np.abs(rows).max(1, keepdims=True), TINY) * STEP
    return (np.rint(rows / steps) + 128).astype(np.uint8), steps


def _gated(x: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float64]:
    gate = x.astype(np.float64)
    return np.asarray(gate / (1 + np.exp(-np.clip(gate, -500, 500))) * up)


def _normed(given: Values, change: NDArray[np.float32], name: str = "") -> dict[str, NDArray[Any]]:
    total = given["residual"].astype(np.float64) + change
    scale = 1 / np.sqrt((total**2).mean(1, keepdims=True) + EPSILON)
    return {f"normed{name}": total * scale * given["weights"], f"sum{name}": total}


def _attended(given: Values) -> dict[str, NDArray[Any]]:
    """Token by token."""
    kv_heads, width = given["past_key"].shape[1:]
    query, key = (_rotated(given[name].reshape(len(given[name]), -1, width), given, of) for name, of in (("query", "asked_"), ("key", "")))
    value = given["value"].reshape(-1, kv_heads, width)
    keys, values = (np.concatenate([given[past], new]) for past, new in (("past_key", key), ("past_value", value)))
    group, lanes, seen = query.shape[1] // kv_heads, given["queries"].shape[1], []
    for token, place in enumerate(given["places"]):
        lane, row = divmod(int(place), lanes)
        line = given["keys"][lane][given["mask"][lane, row] == 0]
        scores = np.einsum("khd,skd->khs", query[token].reshape(kv_heads, group, width), keys[line]) / np.sqrt(width)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        seen.append(np.einsum("khs,skd->khd", shares / shares.sum(-1, keepdims=True), values[line].astype(np.float64)).ravel())
    return {"seen": np.stack(seen), "new_key": key, "new_value": value}


def _rotated(x: NDArray[np.float32], given: Values, of: str) -> NDArray[np.float64]:
    """RoPE."""
    cosines, sines = (given[f"{of}{name}"][given[f"{of}at"][0], None].astype(np.float64) for name in ("cosines", "sines"))
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], -1)
