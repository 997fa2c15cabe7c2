"""From the cells of all steps to one result: what follows from them is computed here, nothing is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from typing import Any

import psutil

from edgeguard import __version__, machine
from edgeguard.bench import targets
from edgeguard.bench.artifacts import BACKENDS, Measured
from edgeguard.bench.ceilings import achieved
from edgeguard.bench.cells import Cell, Store, merged
from edgeguard.bench.cost import HOSTED, Power, prompt_tokens
from edgeguard.bench.report import FORMAT
from edgeguard.bench.suite import Plan
from edgeguard.bench.visits import TOKENS

PACK = 16
PACKAGES = ("edgeguard", "numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "torch", "transformers")
EIGHT_BILLION = 7e9
"""Parameters from which on a model counts as one of 8B."""


def result(plan: Plan, store: Store, model: Measured, suite: str, threads: int, power: Power) -> dict[str, Any]:
    """The whole result file."""
    cells = complete([cell for step in plan.steps for cell in store.cells(step) or ()], model, power)
    return {
        "bench": "speed", "format": FORMAT, "suite": suite, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "edgeguard": __version__, "machine": host(threads), "model": model.to_dict(), "cost": {**vars(power), "hosted": HOSTED},
        "cells": [cell.to_dict() for cell in cells], "targets": targets.judge(cells, size_of(model)),
    }


def size_of(model: Measured) -> str:
    """Which of the models that targets speak of this is: `8B`, `mini`, or its own name."""
    if model.shape.parameters > EIGHT_BILLION:
        return targets.EIGHT
    return targets.MINI if model.profile.name == "edgeguard-mini" else model.name


def host(threads: int) -> dict[str, Any]:
    """The machine, what is installed, and the threads that everyone got."""
    cpu = machine.cpu()
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu.model, "flags": sorted(cpu.flags), "arch": cpu.arch, "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": threads, "memory_bytes": psutil.virtual_memory().total, "os": platform.platform(terse=True),
        "python": platform.python_version(), "packages": packages,
    }


def complete(found: Sequence[Cell], model: Measured, power: Power) -> list[Cell]:
    """Samples of all rounds together, the upper levels of the ladder, bytes on disk, shares of the ceilings, costs."""
    cells = merged(found)
    shared = [replace(cell, extra={**cell.extra, **achieved(cell, model.shape, cells), **_cost(cell, power)}) for cell in cells]
    return [*shared, *best_of_ladder(shared), *_on_disk(model)]


def best_of_ladder(cells: Sequence[Cell]) -> list[Cell]:
    """L3, the fastest format of each backend, and L4, that backend's packed passes: taken over from cells that were measured."""
    made = []
    for kind, backend in BACKENDS.items():
        for level, pattern in (("L3", f"ladder/L2/{kind}-*/safe"), ("L4", f"packed/{kind}-*/{PACK}")):
            measured = [cell for cell in cells if cell.measured and fnmatch(cell.id, pattern)]
            if measured:
                made.append(_raised(min(measured, key=lambda cell: cell.p50 or 0.0), level, backend))
    return made


def _raised(cell: Cell, level: str, backend: str) -> Cell:
    params = {**cell.params, "level": level, "backend": backend, "start": "steady"}
    return replace(cell, id=f"ladder/{level}/{backend}/{TOKENS}/safe", group="ladder", params=params,
                   extra={**cell.extra, "taken_from": cell.id})


def _on_disk(model: Measured) -> list[Cell]:
    return [
        Cell(f"memory/{label}/disk", "memory", f"edgeguard {BACKENDS[each.kind]} {each.manifest.precision}", "B",
             {"when": "disk", "what": "on disk"}, (float(each.size),), {"bytes": each.size, "precision": each.manifest.precision})
        for label, each in model.found.items()
    ]


def _cost(cell: Cell, power: Power) -> dict[str, float]:
    tokens = prompt_tokens(cell)
    return {"usd_per_million_tokens": power.per_million(cell.p50, tokens)} if tokens and cell.p50 and cell.unit == "s" else {}
