"""Machine ceilings, measured in the run itself: integer and float products at the model's own sizes, and read bandwidth."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeguard.architecture import Shape
from edgeguard.backends.kernels import own_kernel
from edgeguard.bench.cells import Cell, Step
from edgeguard.bench.driver import WORKERS, Program, Worker
from edgeguard.bench.work import fastest_seconds, linears, macs
from edgeguard.machine import cpu

BUDGET = 0.7  # seconds for each size and operator
READ_BYTES = 1 << 30  # more than any cache holds


@dataclass(frozen=True)
class Ceiling:
    """One runtime whose products are timed."""

    runtime: str
    """As `workers/gemm.py` names it."""
    kind: str
    """`int8`, `int4` or `float`, of a matrix that is in the cache; `streamed`: int8, of one that comes from memory, as all do in a pass."""
    library: str = ""
    """Of edgeguard's own kernel."""


CEILINGS = (Ceiling("onnxruntime", "int8"), Ceiling("torch", "int8"), Ceiling("openvino", "int8"),
            Ceiling("onnxruntime-int4", "int4"), Ceiling("onnxruntime-streamed", "streamed"), Ceiling("onnxruntime-float", "float"))
KINDS = tuple(dict.fromkeys(ceiling.kind for ceiling in CEILINGS))


def steps(shape: Shape, rows: int, threads: int, pythons: Mapping[str, str], logs: Path) -> list[Step]:
    """One step for each runtime; `rows` is M, the tokens of a usual message's pass; `pythons` name other environments'."""
    made = []
    for ceiling in (*CEILINGS, *_own()):
        if ceiling.kind == "streamed" and shape.parameters < READ_BYTES:  # these weights stay in a cache
            continue
        program = Program(ceiling.runtime, (pythons.get(ceiling.runtime, sys.executable), str(WORKERS / "gemm.py")), "", threads,
                          {"runtime": ceiling.runtime, "precision": ceiling.kind, "library": ceiling.library})
        sizes = {name: (rows, *size) for name, size in linears(shape).items()}
        cells = {
            name: Cell(f"ceiling/{ceiling.kind}/{ceiling.runtime}/{name.replace('/', '-')}", "ceiling", ceiling.runtime, "GMAC/s",
                       {"what": f"{ceiling.kind} gemm", "kind": ceiling.kind, "matrix": name, "shape": f"{m} x {k} x {n}"})
            for name, (m, k, n) in sizes.items()
        }
        step = f"ceiling/{ceiling.kind}-{ceiling.runtime}"
        seconds = 80.0 if ceiling.kind == "streamed" else 3 + 2 * len(sizes) * (BUDGET + 0.3)
        made.append(Step(step, tuple(cells.values()), seconds, partial(_products, program, cells, sizes, logs / f"{step}.log")))
    return [*made, _reading(threads, logs)]


def _own() -> list[Ceiling]:
    """edgeguard's own kernels, where it has some; the one of 8 bits is made for weights that come from memory."""
    kinds = {"int8": "streamed", "int4": "int4"}
    found = {kind: own for precision, kind in kinds.items() if (own := own_kernel(cpu(), precision))}
    return [Ceiling(f"edgeguard-{kind}", kind, str(own.library)) for kind, own in found.items()]


def _reading(threads: int, logs: Path) -> Step:
    program = Program("read", (sys.executable, str(WORKERS / "gemm.py")), "", threads, {"runtime": "read", "library": ""})
    cells = {"read": Cell("ceiling/read", "ceiling", "memory, read", "GB/s", {"what": "read"})}
    return Step("ceiling/read", tuple(cells.values()), 6.0,
                partial(_products, program, cells, {"read": (1, READ_BYTES, 0)}, logs / "ceiling/read.log"))


def _products(program: Program, cells: Mapping[str, Cell], sizes: Mapping[str, tuple[int, ...]], log: Path) -> list[Cell]:
    with Worker(program, log) as worker:
        worker.load()
        reply = worker.ask({"op": "judge", "items": [], "sizes": [list(size) for size in sizes.values()], "budget": BUDGET})
        return [
            cells[name].with_samples(rates, {**worker.facts, "kernel": operator})
            for name, rates, operator in zip(sizes, reply["rates"], reply["operators"], strict=True)
        ]


def fastest(cells: Iterable[Cell], kind: str = "int8") -> dict[str, float]:
    """GMAC/s of the fastest runtime for each kind of matrix, by medians."""
    best: dict[str, float] = {}
    for cell in cells:
        if cell.group == "ceiling" and cell.params.get("kind") == kind and cell.p50 is not None:
            name = str(cell.params["matrix"])
            best[name] = max(best.get(name, 0.0), cell.p50)
    return best


def achieved(cell: Cell, shape: Shape, cells: Iterable[Cell]) -> dict[str, Any]:
    """What a cell with `pass_tokens` achieved: GMAC/s, and the share of the measured ceilings; empty where nothing can be said.

    edgeguard computes only the asked row in the last layer, so only that is counted.
    """
    tokens, seconds = cell.extra.get("pass_tokens"), cell.p50
    if not tokens or not seconds or cell.unit != "s":
        return {}
    given = list(cells)
    work = macs(shape, float(tokens), 1 if cell.contender.startswith("edgeguard") else None)
    shares = {f"share_of_{kind}_ceiling": least / seconds for kind in KINDS
              if (least := fastest_seconds(work, fastest(given, kind))) is not None}
    return {"gmacs": sum(work.values()) / seconds / 1e9, **shares}
