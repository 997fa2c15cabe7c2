"""Which 8- and 4-bit kernels of ONNX Runtime are right on a processor: chosen by its record, then tried, and refused if wrong.

On x86 a product of unsigned by signed bytes is added up in pairs of 16 bits, which saturates, unless the processor has VNNI.
There the runtime is told to take both as unsigned, which is exact and slower, and keeps a converted copy of the weights.
For large weights there are kernels of our own, on AMX (`amx.c`) and on AVX2 without VNNI (`avx2.c`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.onnx_protobuf import int4_product, int8_product
from edgeguard.errors import InferenceError, ModelMemoryError
from edgeguard.machine import Cpu

QUANTISED = ("int8", "int4")
"""Precisions whose kernels are tried; an int4 artifact may hold layers of 8 bits."""
EXACT_X86 = {"session.x64quantprecision": "1"}
BLOCK = 32  # of 4-bit weights
ROUNDING = 0.5  # of a step: as far as activations in 8 bits may be from what they were

Multiply: TypeAlias = "Callable[[bytes, Kernel, NDArray[Any]], NDArray[np.float32]]"
"""Runs a model of one product, by a kernel, on `a`; gives `y`."""


@dataclass(frozen=True)
class Kernel:
    """How products are computed, and what lies between them."""

    name: str
    """`vnni`, `unsigned`, `dotprod`, ...; `float` for precisions without quantised products."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """Of the session's configuration."""
    reason: str = ""
    fallbacks: tuple[str, ...] = ()
    """Better ones, by the processor's record, that were tried in vain."""
    library: Path | None = None
    """Of products that take the place of the runtime's."""
    fused: Path | None = None
    """Of what lies between products (`fused`)."""


@dataclass(frozen=True)
class Own:
    """A kernel of our own that is used instead of one of the runtime's for weights that come from memory."""

    name: str
    module: str
    """That holds its library, where it was built."""
    needs: frozenset[str]
    """Features of the processor, beside those of the runtime's kernel."""
    lacks: frozenset[str]
    """Those for which the runtime has better ones."""
    precisions: tuple[str, ...]
    reason: str


# for each architecture the features that decide, best first; the name of a kernel and why it is right
CHOICES: Mapping[str, tuple[tuple[str, Kernel], ...]] = {
    "x86_64": (
        ("amx_int8", Kernel("amx", {}, "the processor has AMX, whose byte products are added up in 32 bits")),
        ("avx512_vnni", Kernel("avx512-vnni", {}, "the processor has AVX-512 VNNI, whose byte products are added up in 32 bits")),
        ("avx_vnni", Kernel("avx-vnni", {}, "the processor has AVX-VNNI, whose byte products are added up in 32 bits")),
    ),
    "arm64": (
        ("i8mm", Kernel("i8mm", {}, "the processor has i8mm, whose byte products are added up in 32 bits")),
        ("dotprod", Kernel("dotprod", {}, "the processor has dotprod, whose byte products are added up in 32 bits")),
    ),
}
REST: Mapping[str, Kernel] = {
    "x86_64": Kernel("unsigned", EXACT_X86, "the processor has no VNNI, so signed byte products would saturate"),
    "arm64": Kernel("neon", {}, "NEON multiplies bytes to 16 bits and adds them up in 32"),
}
OWN: Mapping[str, Own] = {
    "amx": Own("edgeguard amx", "edgeguard.backends._amx", frozenset(), frozenset(), ("int8",),
               "it reads weights ahead while it multiplies"),
    "unsigned": Own("edgeguard avx2", "edgeguard.backends._avx2", frozenset({"avx2", "fma"}), frozenset({"avx512f"}), ("int8", "int4"),
                    "it multiplies weights as they lie in the file"),
}
"""By the runtime's."""
FUSED = "edgeguard.backends._fused"
"""Holds the library of what lies between products."""
NOT_BUILT = "edgeguard's own kernels were not built, for want of a C compiler (GCC 11, Clang 12 or later) when edgeguard was installed"
UNKNOWN = Kernel("generic", {}, "the processor is unknown")
FLOAT = Kernel("float", {}, "no product is quantised")


def kernel(cpu: Cpu, precision: str) -> Kernel:
    """What is right on a processor by what is known of it."""
    if precision not in QUANTISED:
        return FLOAT
    for feature, choice in CHOICES.get(cpu.arch, ()):
        if feature in cpu.flags:
            return choice
    return REST.get(cpu.arch, UNKNOWN)


def tried(cpu: Cpu, precision: str, multiply: Multiply, *, own: bool = False) -> Kernel:
    """The kernel for a processor, which has multiplied rightly; raises `InferenceError` when none does.

    `own`: one of our own if there is one that is better with weights that come from memory.
    """
    first = kernel(cpu, precision)
    if precision not in QUANTISED:
        return first
    # some systems do not tell of VNNI: what multiplies rightly as it is needs no other way
    signed = Kernel("signed", {}, "signed byte products were tried here and do not saturate")
    if first.entries and is_exact(multiply, signed):
        first = signed
    elif own and (wanted := own_of(cpu, precision)):
        better = own_kernel(cpu, precision)
        if better and _is_right_if_it_runs(multiply, better, precision):
            return better
        first = replace(first, fallbacks=(f"the kernel {wanted.name} was tried here and failed" if better else NOT_BUILT,))
    if precision == "int4" and not is_close(multiply, first):
        raise InferenceError("The 4-bit kernels of this CPU give wrong sums; take an int8 or fp32 artifact or a GGUF.")
    saturates = f"the kernel {first.name} was tried here and saturates"
    careful = Kernel("unsigned", EXACT_X86, saturates, (*first.fallbacks, saturates))
    if first is signed or is_exact(multiply, first):
        return first
    if not first.entries and is_exact(multiply, careful):
        return careful
    raise InferenceError("The 8-bit kernels of this CPU saturate and give wrong sums; take an fp32 artifact or a GGUF.")


@cache
def libraries() -> str:
    """A mark of the operator libraries that were built when edgeguard was installed: other ones may add up in another order."""
    specs = [find_spec(module) for module in (*(own.module for own in OWN.values()), FUSED)]
    return sha256(b"".join(Path(spec.origin).read_bytes() for spec in specs if spec and spec.origin)).hexdigest()[:16]


def own_kernel(cpu: Cpu, precision: str) -> Kernel | None:
    """Our own in the place of the runtime's; None where there is none, or it was not built when edgeguard was installed."""
    own = own_of(cpu, precision)
    spec = find_spec(own.module) if own else None
    if own is None or spec is None or spec.origin is None:
        return None
    reason = f"{kernel(cpu, precision).reason}; edgeguard's own kernel for large weights: {own.reason}"
    return Kernel(own.name, {}, reason, (), Path(spec.origin))


def own_of(cpu: Cpu, precision: str) -> Own | None:
    """The kernel of our own that a processor is to have, whether it was built or not."""
    own = OWN.get(kernel(cpu, precision).name)
    fits = own is not None and precision in own.precisions and own.needs <= cpu.flags and not own.lacks & cpu.flags
    return own if fits else None


def told(cpu: Cpu) -> dict[str, Kernel]:
    """The kernels of a processor, by what they are for."""
    found = {precision: kernel(cpu, precision) for precision in QUANTISED}
    large = {f"large {precision}": own_kernel(cpu, precision) or replace(found[precision], reason=NOT_BUILT)
             for precision in QUANTISED if own_of(cpu, precision)}
    return {**found, **large}


def is_exact(multiply: Multiply, kernel: Kernel) -> bool:
    """Whether 8-bit products of the largest numbers there are give exact sums, for few tokens and for many.

    Of a library also deeper ones with an edge: all ways through it.
    """
    deep = [(4201, 40, (1, 4, 5, 9, 32, 64, 90, 301)), (70, 296, (7, 13))]
    blocks = [(576, 64, (1, 48)), *(deep if kernel.library else [])]
    return all(_is_exact(multiply, kernel, *block) for block in blocks)


def _is_exact(multiply: Multiply, kernel: Kernel, depth: int, columns: int, counts: tuple[int, ...]) -> bool:
    weights = np.empty((depth, columns), np.int8)
    weights[:, ::3], weights[:, 1::3], weights[:, 2::3] = 127, -128, 1
    weights[1::2, 2::3] = -128
    activations = np.full((max(counts), depth), 255, np.uint8)
    activations[1::3], activations[2::3, ::2] = 0, 0
    activations[_marked(len(activations))] = 17
    scales = _scales(columns)
    wanted = ((activations.astype(np.int64) - 128) @ weights.astype(np.int64)).astype(np.float32) * scales
    model = int8_product(weights, scales)
    return all(np.array_equal(multiply(model, kernel, activations[:tokens]), wanted[:tokens]) for tokens in counts)


def _marked(tokens: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """A place in each token's activations that differs from those of its neighbours, so that none is taken for another one."""
    return np.arange(tokens), np.arange(tokens) % 7


def _scales(columns: int) -> NDArray[np.float32]:
    """One after the other different; products by them are exact."""
    return np.exp2(np.arange(columns) % 3).astype(np.float32)


def _is_right_if_it_runs(multiply: Multiply, kernel: Kernel, precision: str) -> bool:
    """A library may not fit the runtime, nor a system grant what it needs."""
    try:
        return is_exact(multiply, kernel) and (precision != "int4" or is_close(multiply, kernel))
    except (InferenceError, ModelMemoryError):
        return False


def is_close(multiply: Multiply, kernel: Kernel) -> bool:
    """Whether 4-bit products of the largest numbers there are differ no more than by the rounding of activations to 8 bits.

    A step of that rounding is a 127th of the largest activation. Of a library also deeper ones with an edge: all ways through it.
    """
    deep = [(1056, 40, (2, 3, 4, 5, 300)), (64, 168, (7, 13))]
    blocks = [(512, 96, (1, 48)), *(deep if kernel.library else [])]
    return all(_is_close(multiply, kernel, *block) for block in blocks)


def _is_close(multiply: Multiply, kernel: Kernel, depth: int, columns: int, counts: tuple[int, ...]) -> bool:
    weights = np.empty((columns, depth), np.uint8)
    weights[::3], weights[1::3], weights[2::3] = 15, 0, np.arange(depth) % 16
    activations = np.ones((max(counts), depth), np.float32)
    activations[1::3] = -1
    activations[2::3] = np.linspace(-1, 1, depth, dtype=np.float32)
    activations[_marked(len(activations))] = 0.5
    scales = np.repeat(_scales(columns)[:, None], depth // BLOCK, 1)
    signed = (weights.T.astype(np.float64) - 8) * scales[:, 0]
    wanted, allowed = activations.astype(np.float64) @ signed, 1.1 * ROUNDING / 127 * np.abs(signed).sum(0)
    model = int4_product(weights, scales, BLOCK)
    return all(bool((np.abs(multiply(model, kernel, activations[:tokens]) - wanted[:tokens]) <= allowed).all())
               for tokens in counts)
