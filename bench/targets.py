"""What the project wants of its speed, as data, and what a run's cells say of it; what was not measured is never called met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from edgeguard.bench.artifacts import BACKENDS
from edgeguard.bench.cells import Cell

Cells = Mapping[str, Cell]
BEST = ("ladder/L3/onnx/23/safe", "ladder/L3/llama/23/safe")
EXACT = {"int8": 0.995, "q8_0": 0.995, "int4": 0.975, "q4_0": 0.975, "q4_k_m": 0.975}
"""Least agreement of verdicts with full precision, by precision."""
NO_BUILDER = "MatMulNBits, block 32, in edgeguard's graph: the builder of onnxruntime-genai was not run or does not fit into memory"
EIGHT, MINI = "8B", "mini"


@dataclass(frozen=True)
class Found:
    """A value and the cells that it comes from; without a value, why."""

    value: float | None
    cells: tuple[str, ...] = ()
    note: str = ""


Formula = Callable[[Cells], Found]


@dataclass(frozen=True)
class Target:
    """One row of the table."""

    what: str
    model: str
    """`8B` or `mini`, or empty for both."""
    bound: float | None
    """None for what is told beside a target and not wanted itself."""
    most: bool
    """The value may be at most the bound; else at least."""
    formula: Formula
    unit: str = ""

    @property
    def wanted(self) -> str:
        """`>= 10x`, `<= 1.1`."""
        return "told" if self.bound is None else f"{'<=' if self.most else '>='} {self.bound:g}{self.unit}"

    def judge(self, cells: Cells, model: str) -> dict[str, Any]:
        """This row of the result file; `met` is None where it could not be measured."""
        found = self.formula(cells) if self.model in ("", model) else Found(None, note=f"measured on the {self.model} only")
        value = found.value
        met = None if value is None or self.bound is None else value <= self.bound if self.most else value >= self.bound
        return {"what": self.what, "wanted": self.wanted, "got": value, "met": met, "from": list(found.cells), "note": found.note}


def median(*patterns: str) -> Formula:
    """The smallest median of all measured cells that a pattern fits."""
    def formula(cells: Cells) -> Found:
        fitting = [cell for id_, cell in cells.items() if any(fnmatch(id_, pattern) for pattern in patterns)]
        measured = [cell for cell in fitting if cell.p50 is not None]
        if not measured:
            reasons = [cell.reason for cell in fitting if cell.reason]
            return Found(None, note=reasons[0] if reasons else f"there is no cell {' or '.join(patterns)}")
        least = min(measured, key=lambda cell: cell.p50 or 0.0)
        return Found(least.p50, (least.id,))

    return formula


def either(one: Formula, other: Formula, note: str) -> Formula:
    """The first value, else the second one, said so."""
    def formula(cells: Cells) -> Found:
        found, instead = one(cells), other(cells)
        return found if found.value is not None or instead.value is None else replace(instead, note=note)

    return formula


def over(one: Formula, other: Formula) -> Formula:
    """The quotient of two values."""
    def formula(cells: Cells) -> Found:
        above, below = one(cells), other(cells)
        if above.value is None or not below.value:
            return Found(None, (), above.note or below.note)
        return Found(above.value / below.value, tuple(dict.fromkeys((*above.cells, *below.cells))), above.note or below.note)

    return formula


def products(kind: str = "") -> Formula:
    """Seconds of the matrix products of edgeguard's best path alone, at the measured ceiling of a kind, or of the path's precision."""
    def formula(cells: Cells) -> Found:
        best = median(*BEST)(cells)
        cell = cells[best.cells[0]] if best.cells else None
        given = kind or ("int4" if cell and cell.facts.get("precision") == "int4" else "int8")
        share = cell.extra.get(f"share_of_{given}_ceiling") if cell else None
        if best.value is None or not share:
            return Found(None, note=best.note or "no such ceiling was measured")
        return Found(best.value * share, best.cells)

    return formula


def over_weights(pattern: str) -> Formula:
    """The larger of memory at load and in steady state, beside the weights on disk."""
    def formula(cells: Cells) -> Found:
        found = [cell for id_, cell in cells.items() if fnmatch(id_, pattern) and cell.p50 is not None and cell.facts.get("bytes")]
        if not found:
            return Found(None, note=f"there is no cell {pattern}")
        largest = max(found, key=lambda cell: (cell.p50 or 0.0) / cell.facts["bytes"])
        note = "" if largest.extra.get("anonymous") is not None else "resident memory: this system does not tell the anonymous part"
        return Found((largest.p50 or 0.0) / largest.facts["bytes"], tuple(cell.id for cell in found), note)

    return formula


def largest(pattern: str, scale: float) -> Formula:
    """The largest median of all cells that the pattern fits, in units of `scale`."""
    def formula(cells: Cells) -> Found:
        found = [cell for id_, cell in cells.items() if fnmatch(id_, pattern) and cell.p50 is not None]
        return Found(max(cell.p50 or 0.0 for cell in found) / scale, tuple(cell.id for cell in found)) if found else Found(
            None, note=f"there is no cell {pattern}")

    return formula


def agreement(precision: str) -> Formula:
    """The least agreement of the artifacts of a precision."""
    def formula(cells: Cells) -> Found:
        wanted = [f"fidelity/{kind}-{precision}" for kind in BACKENDS]
        found = [cell for id_, cell in cells.items() if id_ in wanted and cell.p50 is not None]
        return Found(min(cell.p50 or 0.0 for cell in found), tuple(cell.id for cell in found)) if found else Found(
            None, note=f"no artifact of {precision} was compared")

    return formula


def by_runtime(one: Formula) -> Formula:
    """A value unless a kernel of edgeguard's own had a part in it."""
    def formula(cells: Cells) -> Found:
        found = one(cells)
        mine = [id_ for id_ in found.cells if str(cells[id_].facts.get("kernel", "")).startswith("edgeguard")]
        return Found(None, note=f"{mine[0]} ran on a kernel of edgeguard's own") if mine else found

    return formula


NBITS = either(median("ladder/L2/onnx-int4-runtime/23/safe"), by_runtime(median("ladder/L2/onnx-int4/23/safe")), "")
"""ONNX Runtime's own kernel of 4 bits, also where edgeguard's is used instead."""


TARGETS = (
    Target("8B, safe verdict: llama-cpp-python q4_k_m, first call, over edgeguard's best CPU path", EIGHT, 10, False,
           over(median("ladder/L0/gguf-q4_k_m/23/first"), median(*BEST)), "x"),
    Target("8B, safe verdict: llama-cpp-python q4_k_m, steady stream, over the same", EIGHT, 3.5, False,
           over(median("ladder/L0/gguf-q4_k_m/23/safe"), median(*BEST)), "x"),
    Target("8B, safe verdict: that first call over the matrix products of edgeguard's pass alone, at the measured ceiling", EIGHT, None,
           False, over(median("ladder/L0/gguf-q4_k_m/23/first"), products()), "x"),
    Target("8B, safe verdict: that steady stream over the same products", EIGHT, None, False,
           over(median("ladder/L0/gguf-q4_k_m/23/safe"), products()), "x"),
    Target("8B, safe verdict: llama.cpp low-level q4_k_m, prefix kept, one forward, over edgeguard's best CPU path", EIGHT, None, False,
           over(median("ladder/L2/gguf-q4_k_m/23/safe"), median(*BEST)), "x"),
    Target("8B, safe verdict: onnxruntime-genai int4 with cached prefix, over the same", EIGHT, 2.5, False,
           over(either(median("peers/onnxruntime-genai*/23/safe"), NBITS, NO_BUILDER), median(*BEST)), "x"),
    Target("8B, 77-token pass: measured GEMM ceiling over edgeguard's achieved rate", EIGHT, 1.3, True,
           over(median(*BEST), products())),
    Target("8B, 77-token pass: the same with a ceiling whose weights come from memory too", EIGHT, None, True,
           over(median(*BEST), products("streamed"))),
    Target("8B: unsafe with one code over safe", EIGHT, 1.5, True,
           over(median("length/onnx-int8/23/unsafe"), median("length/onnx-int8/23/safe"))),
    Target("8B, packed 16 messages: per message, over one by one", EIGHT, 1.0, True,
           over(median("packed/onnx-int8/16"), median("packed/onnx-int8/1"))),
    Target("mini, packed 16 messages: per message, over one by one", MINI, 0.6, True,
           over(median("packed/onnx-int8/16"), median("packed/onnx-int8/1"))),
    Target("8B int8, process start to first verdict: with the stored prefix over evaluating it", EIGHT, 0.75, True,
           over(median("cold/onnx-int8/stored"), median("cold/onnx-int8/evaluated"))),
    Target("8B int8, packed weights mapped: the same", EIGHT, None, True,
           over(median("cold/onnx-int8-mapped/stored"), median("cold/onnx-int8-mapped/evaluated"))),
    Target("8B int8, anonymous memory at load and in steady state, over the weights", EIGHT, 1.1, True,
           over_weights("memory/ladder-L2-onnx-int8/*")),
    Target("8B, 8,000-token conversation: peak memory above the weights, GiB", EIGHT, 3, True, largest("memory/*/peak-8000", 2**30)),
    Target("mini, safe verdict: transformers fp32 generate over edgeguard's best CPU path", MINI, 8, False,
           over(median("peers/transformers-fp32/23/safe"), median(*BEST)), "x"),
    *(Target(f"mini, {precision}: verdicts that agree with full precision", MINI, least, False, agreement(precision))
      for precision, least in EXACT.items()),
)


def judge(cells: Iterable[Cell], model: str) -> list[dict[str, Any]]:
    """Every target against the cells of a run on `8B`, `mini`, or another model."""
    by_id = {cell.id: cell for cell in cells}
    return [target.judge(by_id, model) for target in TARGETS]
