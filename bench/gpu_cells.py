"""What is measured of one artifact on a GPU: that the GPU really has it, that it answers as the CPU does, and how fast it is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.bench.artifacts import BACKENDS
from edgeguard.bench.cells import Cell
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.suite import SUITES
from edgeguard.bench.texts import messages
from edgeguard.errors import InferenceError
from edgeguard.guard import Guard
from edgeguard.store import Artifact
from edgeguard.verdict import Verdict

SHORT, LONG = 12, ((128, 4), (512, 2))
"""Texts of each kind whose scores are compared: short messages, and tokens of longer ones with their number."""
LENGTHS = ((23, 20), (128, 10), (512, 5), (2048, 3), (8000, 2))
"""Lengths that are timed, and how often."""
PACKS = SUITES["short"].packs
TURNS = 3  # of each pack
BATCH = 16
WALK = {"safe": 1.0, "unsafe": 0.0}
"""Thresholds that make any text walk an answer's path."""
PLACED = re.compile(r"placed on \[(\w+)\]\. Number of nodes: (\d+)")
PLACING = """
import sys, onnxruntime as ort
if hasattr(ort, "preload_dlls"): ort.preload_dlls()
options = ort.SessionOptions()
options.log_severity_level, options.log_verbosity_level = 0, 1
ort.InferenceSession(sys.argv[1], options, providers=sys.argv[2:])
"""
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


@dataclass(frozen=True)
class Limit:
    """Largest differences of the score of any text."""

    device: float
    """The GPU's from the CPU's."""
    packed: float
    """One in a pack from the same alone, on the GPU."""


# the CPU's 4- and 8-bit kernels quantise activations too, the GPU's do not; fp16 sums are cut in another order
LIMITS = {
    "fp32": Limit(0.01, 0.01), "f32": Limit(0.01, 0.01), "fp16": Limit(0.03, 0.02), "f16": Limit(0.03, 0.02), "bf16": Limit(0.05, 0.03),
    "q8_0": Limit(0.05, 0.02), "q6_k": Limit(0.06, 0.02), "q5_k_m": Limit(0.08, 0.02), "int4": Limit(0.1, 0.02),
    "q4_k_m": Limit(0.1, 0.02), "q4_0": Limit(0.1, 0.02),
}
ON_GPU = 0.5
"""Least share of a graph's nodes, and of the weights' bytes, that must have come to the GPU."""


@dataclass(frozen=True)
class Card:
    """The first GPU, as its driver tells."""

    name: str
    driver: str
    used: int
    """Bytes of its memory in use, of all processes."""


def card() -> Card | None:
    """None where there is no NVIDIA driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    parts = [part.strip() for part in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(parts) != 3 or not parts[2].isdigit():
        return None
    return Card(parts[0], parts[1], int(parts[2]) << 20)


def placement(model: Path, providers: Sequence[str]) -> dict[str, int]:
    """How many nodes of an ONNX graph each provider got, by ONNX Runtime's own log; asked in a process of its own."""
    command = [sys.executable, "-c", PLACING, str(model), *providers]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=1800)  # noqa: S603
    found: dict[str, int] = {}
    for provider, nodes in PLACED.findall(done.stderr + done.stdout):
        found[provider] = found.get(provider, 0) + int(nodes)
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InferenceError(f"ONNX Runtime does not say where the nodes of {model} lie: {last}")
    return found


class Check:
    """One artifact on one device; every method gives cells, and `targets` what they were held against."""

    def __init__(self, label: str, artifact: Artifact, prompts: Prompts, device: str, threads: int) -> None:
        self.label, self._artifact, self._prompts, self._device, self._threads = label, artifact, prompts, device, threads
        self.name = f"edgeguard {BACKENDS[artifact.kind]} {artifact.manifest.precision}"
        self.targets: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {}

    def run(self, *, timed: bool = True) -> Iterator[Cell]:
        """Everything, in turn; raises what loading and judging raise."""
        limit = LIMITS[self._artifact.manifest.precision]
        texts = [*messages("harmless", SHORT), *messages("harmful", SHORT), *(
            item["message"] for tokens, number in LONG for answer in WALK for item in self._prompts.items(answer, tokens, 0, number))]
        with self._guard("cpu") as guard:
            wanted = [guard.check(text) for text in texts]
        before = card()
        with self._guard(self._device) as guard:
            yield from self._granted(guard, before)
            alone = [guard.check(text) for text in texts]
            yield self._compared("scores against the CPU's", wanted, alone, limit.device)
            yield self._compared("scores in a pack against alone", alone, list(guard.check_many(texts, batch=BATCH)), limit.packed)
            if timed:
                yield from self._lengths(guard)
                yield from self._packs(guard)

    @contextmanager
    def _guard(self, device: str) -> Iterator[Guard]:
        with Guard.load(self._artifact.folder, backend=BACKENDS[self._artifact.kind], device=device, threads=self._threads,
                        calibration="none") as guard:
            info = guard.backend_info
            self._facts = {"runtime": info.runtime, "device": info.device, "precision": info.precision, "threads": info.threads,
                           "bytes": self._artifact.size, "sha256": guard.identity.sha256}
            yield guard

    def _granted(self, guard: Guard, before: Card | None) -> Iterator[Cell]:
        """By three witnesses: the backend, ONNX Runtime's placement of nodes, and the memory that the GPU lost."""
        granted = guard.backend_info.device
        self._hold("device granted by its name", float(granted == self._device), ">=", 1, (), f"asked for {self._device}, got {granted}")
        if self._artifact.kind == "onnx":
            provider = PROVIDERS[self._device]
            nodes = placement(self._artifact.weights, list(dict.fromkeys([provider, PROVIDERS["cpu"]])))
            share = nodes.get(provider, 0) / sum(nodes.values())
            yield self._cell("nodes", "share of the graph's nodes on the device", "share", [share], nodes=nodes)
            self._hold("nodes on the device", share, ">=", ON_GPU, ("nodes",))
        after = card()
        if before is None or after is None:
            yield self._cell("memory", "memory taken on the GPU", "B", [], reason="nvidia-smi does not tell the memory in use")
            return
        grown = max(0, after.used - before.used)
        yield self._cell("memory", "memory taken on the GPU", "B", [float(grown)])
        self._hold("memory taken on the GPU over the weights", grown / self._artifact.size, ">=", ON_GPU, ("memory",))

    def _compared(self, what: str, wanted: Sequence[Verdict], found: Sequence[Verdict], limit: float) -> Cell:
        """Differences of all texts; a verdict may differ only where the score lies within the limit of the threshold."""
        apart = np.abs([other.score - one.score for one, other in zip(wanted, found, strict=True)])
        turned = [abs(one.score - one.threshold) > limit for one, other in zip(wanted, found, strict=True) if one.verdict != other.verdict]
        key = what.replace("'", "").replace(" ", "-")
        self._hold(f"largest difference, {what}", float(apart.max()), "<=", limit, (key,))
        self._hold(f"verdicts that differ beyond doubt, {what}", float(sum(turned)), "<=", 0, (key,))
        unsafe = sum(each.verdict == "unsafe" for each in found)
        return self._cell(key, what, "of 1", apart.tolist(), largest=float(apart.max()), verdicts_differ=len(turned),
                          beyond_doubt=sum(turned), unsafe=unsafe, texts=len(found))

    def _lengths(self, guard: Guard) -> Iterator[Cell]:
        for tokens, number in LENGTHS:
            for answer, threshold in WALK.items():
                items = self._prompts.items(answer, tokens, 0, number + 1)
                guard.check(items[0]["message"], threshold=threshold)  # a device chooses kernels and memory for each size
                seconds = [_seconds(guard, [item["message"]], threshold) for item in items[1:]]
                yield self._cell(f"length/{tokens}/{answer}", "time to verdict", "s", seconds, tokens=self._prompts.size(tokens),
                                 answer=answer, prompt_tokens=len(items[0]["ids"]))

    def _packs(self, guard: Guard) -> Iterator[Cell]:
        for pack in PACKS:
            items = self._prompts.items("safe", 23, 0, pack * (TURNS + 1))
            packs = [[item["message"] for item in items[start: start + pack]] for start in range(0, len(items), pack)]
            _seconds(guard, packs[0], WALK["safe"])
            seconds = [_seconds(guard, texts, WALK["safe"]) / pack for texts in packs[1:]]
            yield self._cell(f"packed/{pack}", "a message in a pack", "s", seconds, tokens=23, answer="safe", pack=pack)

    def _cell(self, key: str, what: str, unit: str, samples: Sequence[float], *, reason: str | None = None, tokens: int | None = None,
              answer: str | None = None, pack: int | None = None, **extra: object) -> Cell:
        params = {name: value for name, value in (("tokens", tokens), ("answer", answer), ("pack", pack)) if value is not None}
        return Cell(f"gpu/{self.label}/{key}", "gpu", self.name, unit, {"what": what, **params}, tuple(samples), self._facts, extra, reason)

    def _hold(self, what: str, got: float, sign: str, bound: float, cells: Sequence[str], note: str = "") -> None:
        met = got >= bound if sign == ">=" else got <= bound
        self.targets.append({"what": f"{self.label}: {what}", "wanted": f"{sign} {bound:g}", "got": got, "met": met,
                             "from": [f"gpu/{self.label}/{key}" for key in cells], "note": note})


def _seconds(guard: Guard, texts: Sequence[str], threshold: float) -> float:
    began = time.perf_counter()
    if len(texts) == 1:
        guard.check(texts[0], threshold=threshold)
    else:
        list(guard.check_many(texts, threshold=threshold, batch=len(texts)))
    return time.perf_counter() - began
