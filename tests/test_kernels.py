from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.backends import kernels, onnx_session
from edgeguard.backends.kernels import EXACT_X86, Kernel, Multiply, is_close, is_exact, kernel, own_kernel, tried
from edgeguard.errors import InferenceError
from edgeguard.machine import Cpu, parse_cpuinfo, parse_sysctl

INTEL = "vendor_id : GenuineIntel\nmodel name : Xeon\nflags : fma avx2 avx512f avx512bw {}\n"
ARM = "CPU implementer : 0x41\nFeatures : fp asimd {}\n"
RECORDED = {
    "avx512-vnni": parse_cpuinfo(INTEL.format("avx512_vnni"), "x86_64"),
    "amx": parse_cpuinfo(INTEL.format("avx512_vnni amx_tile amx_int8"), "x86_64"),
    "avx-vnni": parse_cpuinfo("vendor_id : GenuineIntel\nflags : fma avx2 avx_vnni\n", "x86_64"),
    "unsigned": parse_cpuinfo("vendor_id : AuthenticAMD\nmodel name : AMD EPYC 7763\nflags : fma avx2 f16c\n", "x86_64"),
    "dotprod": parse_cpuinfo(ARM.format("asimddp"), "aarch64"),
    "i8mm": parse_sysctl("machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_DotProd: 1\n", "arm64"),
    "neon": parse_cpuinfo(ARM.format(""), "aarch64"),
    "generic": Cpu("", "", "riscv64", frozenset()),
}
OLD = parse_cpuinfo(INTEL.format(""), "x86_64")  # AVX-512 without VNNI
NOTHING = Cpu("", "", "x86_64", frozenset())
AS_IT_IS = Kernel("as it is")


@pytest.mark.parametrize("name", RECORDED)
def test_a_processor_gets_the_kernel_that_is_right_on_it(name: str) -> None:
    chosen = kernel(RECORDED[name], "int8")
    assert (chosen.name, kernel(RECORDED[name], "int4")) == (name, chosen)
    assert dict(chosen.entries) == (EXACT_X86 if name == "unsigned" else {}) and chosen.reason


@pytest.mark.parametrize("cpu", [OLD, NOTHING])
def test_x86_without_vnni_does_not_multiply_signed(cpu: Cpu) -> None:
    assert kernel(cpu, "int8").entries == EXACT_X86


@pytest.mark.parametrize("precision", ["fp32", "fp16", "exported"])
def test_floats_need_no_choice(precision: str) -> None:
    def never(*_: object) -> NDArray[np.float32]:
        raise AssertionError

    assert kernel(OLD, precision).name == tried(OLD, precision, never).name == "float"


class Machine:
    """Multiplies as processors do: exactly, or in pairs that saturate unless it is told to take bytes as unsigned."""

    def __init__(self, *, saturates: bool, heeds: bool = True, grants: bool = True) -> None:
        self.saturates, self.heeds, self.grants = saturates, heeds, grants

    def __call__(self, model: bytes, kernel: Kernel, a: NDArray[Any]) -> NDArray[np.float32]:
        if kernel.library and not self.grants:
            raise InferenceError
        start = model.index(b"b" + b"\x4a") + 2
        size = place = 0
        while model[start] > 127:  # the length's varint
            size, place, start = size | (model[start] & 127) << place, place + 7, start + 1
        size |= model[start] << place
        weights = np.frombuffer(model[start + 1 :][:size], np.int8).reshape(a.shape[1], -1).astype(np.int64)
        scales = kernels._scales(weights.shape[1])
        if not self.saturates or (self.heeds and dict(kernel.entries) == EXACT_X86):
            return ((a.astype(np.int64) - 128) @ weights).astype(np.float32) * scales
        pairs = a.astype(np.int64)[:, :, None] * weights
        summed = np.clip(pairs[:, ::2] + pairs[:, 1::2], -32768, 32767).sum(1) - 128 * weights.sum(0)
        return summed.astype(np.float32) * scales


def test_what_the_record_does_not_tell_is_tried() -> None:
    """Windows does not tell of VNNI; an emulator may tell of it and not multiply so."""
    vnni = RECORDED["avx512-vnni"]
    assert tried(vnni, "int8", Machine(saturates=False)).name == "avx512-vnni"
    assert tried(NOTHING, "int8", Machine(saturates=False)).entries == {}
    assert tried(NOTHING, "int8", Machine(saturates=True)).entries == EXACT_X86
    fallen = tried(vnni, "int8", Machine(saturates=True))
    assert fallen.entries == EXACT_X86 and "avx512-vnni" in fallen.fallbacks[0]
    assert not tried(vnni, "int8", Machine(saturates=False)).fallbacks and not tried(NOTHING, "int8", Machine(saturates=True)).fallbacks


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, "edgeguard.backends.kernels")  # any module that there is


def in_place(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(kernels, "OWN", {name: replace(own, module=module) for name, own in kernels.OWN.items()})


def both(*, plain: bool = True, own: bool = True, grants: bool = True) -> Multiply:
    """Multiplies bytes rightly by the processor as it is (`plain`) and by our `own`, or not; 4 bits as this machine does."""
    four_bits = partial(onnx_session._multiplied, {})
    by_plain, by_own = Machine(saturates=not plain), Machine(saturates=not own, grants=grants)

    def multiply(model: bytes, kernel: Kernel, a: NDArray[Any]) -> NDArray[np.float32]:
        if a.dtype == np.float32:
            return four_bits(model, replace(kernel, library=None), a)
        return (by_own if kernel.library else by_plain)(model, kernel, a)

    return multiply


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("processor", "name", "precisions"), [
    ("amx", "edgeguard amx", {"int8"}), ("unsigned", "edgeguard avx2", {"int8", "int4"}),
    ("avx512-vnni", None, set()), ("neon", None, set()),
])
def test_large_weights_get_our_own_kernel_where_it_is_better(processor: str, name: str | None, precisions: set[str]) -> None:
    cpu = RECORDED[processor]
    multiply = both(plain=processor != "unsigned")
    for precision in kernels.QUANTISED:
        chosen = tried(cpu, precision, multiply, own=True)
        mine = precision in precisions
        assert (chosen.name, chosen.library) == ((name, Path(kernels.__file__)) if mine else (chosen.name, None))
        assert not chosen.fallbacks and not chosen.entries
        assert tried(cpu, precision, multiply).library is None, "small weights stay in the caches"
        assert (own_kernel(cpu, precision) is not None) == mine


@pytest.mark.usefixtures("built")
def test_vnni_that_the_record_does_not_tell_needs_no_kernel_of_our_own() -> None:
    for precision in kernels.QUANTISED:
        assert tried(RECORDED["unsigned"], precision, both(plain=True), own=True).name == "signed"


@pytest.mark.usefixtures("built")
def test_our_own_kernel_needs_its_instructions() -> None:
    assert own_kernel(parse_cpuinfo("vendor_id : GenuineIntel\nflags : avx\n", "x86_64"), "int4") is None
    assert own_kernel(NOTHING, "int8") is None
    assert own_kernel(OLD, "int8") is None, "the runtime has products of 512 bits"


@pytest.mark.usefixtures("built")
def test_our_own_kernel_that_fails_is_told_of() -> None:
    fallen = tried(RECORDED["amx"], "int8", both(grants=False), own=True)
    assert fallen.name == "amx" and fallen.library is None and "edgeguard amx" in fallen.fallbacks[0]
    twice = tried(RECORDED["amx"], "int8", both(plain=False, own=False), own=True)
    assert twice.entries == EXACT_X86 and len(twice.fallbacks) == 2
    for precision in kernels.QUANTISED:
        avx2 = tried(RECORDED["unsigned"], precision, both(plain=False, own=False), own=True)
        assert (avx2.name, avx2.library) == ("unsigned", None) and "edgeguard avx2" in avx2.fallbacks[0]


def test_without_a_compiler_there_is_no_kernel_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, "edgeguard.backends._not_built")
    for processor in ("amx", "unsigned"):
        kept = tried(RECORDED[processor], "int8", both(plain=processor == "amx"), own=True)
        assert kept.name == processor and kernels.told(RECORDED[processor])["large int8"].reason == kernels.NOT_BUILT
        assert kept.fallbacks == (kernels.NOT_BUILT,)


@pytest.mark.usefixtures("built")
def test_kernels_are_told_by_what_they_are_for() -> None:
    found = {use: each.name for use, each in kernels.told(RECORDED["amx"]).items()}
    assert found == {"int8": "amx", "int4": "amx", "large int8": "edgeguard amx"}
    assert {"large int8", "large int4"} <= kernels.told(RECORDED["unsigned"]).keys()
    assert kernels.told(RECORDED["avx512-vnni"]).keys() == {"int8", "int4"}


@pytest.mark.parametrize("cpu", [OLD, RECORDED["avx512-vnni"], RECORDED["neon"]])
def test_a_processor_that_saturates_whatever_it_is_told_is_refused(cpu: Cpu) -> None:
    with pytest.raises(InferenceError, match="saturate"):
        tried(cpu, "int8", Machine(saturates=True, heeds=False))


def test_this_machine_multiplies_rightly() -> None:
    multiply = partial(onnx_session._multiplied, {})
    assert is_exact(multiply, AS_IT_IS) or is_exact(multiply, Kernel("unsigned", EXACT_X86))
    assert is_close(multiply, AS_IT_IS)


def test_4_bit_products_that_are_off_are_refused() -> None:
    good = partial(onnx_session._multiplied, {})
    for wrong in (lambda y: np.clip(y, -2000, 2000), lambda y: y + 40, lambda y: y * np.nan, lambda y: y[:, ::-1]):
        with pytest.raises(InferenceError, match="4-bit"):
            tried(OLD, "int4", lambda model, kernel, a, wrong=wrong: wrong(good(model, kernel, a)))


def test_the_largest_numbers_are_among_those_tried() -> None:
    seen: list[NDArray[Any]] = []
    good = Machine(saturates=False)
    library = replace(AS_IT_IS, library=Path("any"))
    assert is_exact(lambda model, kernel, a: seen.append(a) or good(model, kernel, a), library)
    assert seen[0].max() == 255 and kernels.BLOCK == 32
    deep = {len(a) for a in seen if a.shape[1] == 4201}
    assert {a.shape for a in seen} >= {(1, 576), (48, 576)} and {-(-tokens // 16) for tokens in deep} >= {1, 2, 4, 6}, "tiles of AMX"
    assert {tokens % 6 for tokens in deep} == {0, 1, 2, 3, 4, 5} and max(deep) > 256, "rows of AVX2, and more than a pass"
