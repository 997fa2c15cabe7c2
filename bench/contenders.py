"""Who takes part: edgeguard's own levels on every artifact, llama-cpp-python as people call it, and the table of peers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeguard.backends import fused
from edgeguard.backends.kernels import own_kernel
from edgeguard.backends.onnx import LARGE
from edgeguard.bench.artifacts import BACKENDS, Measured
from edgeguard.bench.driver import WORKERS, Program
from edgeguard.machine import cpu

L0 = "llama_cpp_python.py"
BASE = {"onnx": ("int4", "int8", "fp32"), "gguf": ("q4_k_m", "q8_0", "q4_0")}
"""Formats that the ladder starts from, before the best one is chosen."""
CONTEXT = 8192  # what a guard model's caller sets
L0_FORMATS = ("q4_k_m", "q8_0")
RUNTIMES = "-runtime"
"""Behind an artifact's label: with the runtime's kernels, where edgeguard has some of its own."""


@dataclass(frozen=True)
class Setting:
    """What all contenders of a run have in common."""

    threads: int
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """One way to get a verdict."""

    id: str
    """Where its cells stand: `ladder/L2/onnx-int8`, `peers/openvino`."""
    program: Program
    precision: str
    """As in the artifact's manifest, for the guess of how long it takes."""
    bytes: int
    """On disk."""
    missing: str | None = None
    """Why it cannot run."""
    edgeguard: bool = True
    """One of edgeguard's own paths: it can be told which verdict to walk."""
    keeps: bool = True
    """It keeps the prefix from call to call."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Of its cells."""
        return self.id.partition("/")[0]

    @property
    def key(self) -> str:
        """The last part of its id."""
        return self.id.rpartition("/")[2]

    @property
    def level(self) -> str | None:
        """`L0` to `L2` on the ladder."""
        return self.id.split("/")[1] if self.group == "ladder" else None

    @property
    def backend(self) -> str:
        """The runtime that it comes down to."""
        return BACKENDS.get(self.key.partition("-")[0], self.key)

    @property
    def name(self) -> str:
        """For people."""
        return self.program.name


def guard(model: Measured, label: str, level: str, setting: Setting, **options: str) -> Contender:
    """edgeguard on one artifact at a level of the ladder."""
    artifact = model.found[label]
    backend = BACKENDS[artifact.kind]
    chosen = {"backend": backend, "device": setting.device, "level": level, **options}
    name = f"edgeguard {backend} {artifact.manifest.precision}"
    name += ", weights mapped as packed" if "packed" in options else ""
    name += ", the runtime's own kernels" if "own" in options else ""
    name += ", nothing kept" if level == "L1" else ", prefix evaluated" if options.get("prefix") == "evaluate" else ""
    program = Program(name, (sys.executable, str(WORKERS / "guard.py")), str(artifact.folder), setting.threads, chosen)
    place = f"ladder/{level}/{label}{RUNTIMES if 'own' in options else ''}"
    return Contender(place, program, artifact.manifest.precision, artifact.size, keeps=level != "L1")


def ladder(model: Measured, setting: Setting) -> list[Contender]:
    """L0 as people call llama-cpp-python; L1 on the format each backend starts from; L2 on every format."""
    made = [_usual_way(model, f"gguf-{precision}", setting) for precision in L0_FORMATS if f"gguf-{precision}" in model.found]
    for kind, precisions in BASE.items():
        start = next((label for precision in precisions if (label := f"{kind}-{precision}") in model.found), None)
        made += [guard(model, start, "L1", setting)] if start else []
    made += [guard(model, label, "L2", setting) for label in model.found if label != "onnx-fp32"]
    made += [guard(model, label, "L2", setting, own="no") for label in _beside_ours(model)]
    return made


def _beside_ours(model: Measured) -> list[str]:
    """Artifacts that are measured without our own kernels too: large ones of 4 bits, whose load is bearable, and small ones of 8."""
    large, small = model.found.get("onnx-int4"), model.found.get("onnx-int8")
    of_products = large and large.size >= LARGE and own_kernel(cpu(), "int4")
    between = small and small.size < LARGE and fused.fits(cpu()) and fused.built()
    return [*(["onnx-int4"] if of_products else []), *(["onnx-int8"] if between else [])]


def _usual_way(model: Measured, label: str, setting: Setting) -> Contender:
    artifact = model.found[label]
    context = min(CONTEXT, artifact.manifest.shape.context)
    options = {"context": context, "precision": artifact.manifest.precision, "device": setting.device}
    program = Program(f"llama-cpp-python {artifact.manifest.precision}", (sys.executable, str(WORKERS / L0)),
                      str(artifact.weights), setting.threads, options)
    return Contender(f"ladder/L0/{label}", program, artifact.manifest.precision, artifact.size, edgeguard=False)


def precision_order(labels: Sequence[str]) -> list[str]:
    """Labels of artifacts from the most exact one on; the first is what others are held against."""
    order = ("onnx-fp32", "gguf-f32", "gguf-bf16", "gguf-f16", "onnx-fp16", "gguf-q8_0", "onnx-int8")
    return sorted(labels, key=lambda label: (order.index(label) if label in order else len(order), label))
