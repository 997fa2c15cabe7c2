"""Machines that are not this one, from recorded texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeguard import machine
from edgeguard.machine import Runtime, choose_threads, cpu_quota, memory_room, parse_cpuinfo, parse_sysctl, runtime_conflict

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9354
flags\t\t: fpu sse2 fma f16c avx avx2 avx512f avx512_vnni avx512_bf16
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: SomethingElse
"""
RASPBERRY_PI_5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
M2 = """machdep.cpu.brand_string: Apple M2
machdep.cpu.core_count: 8
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 0
hw.optional.AdvSIMD: 1
hw.optional.neon: 1
"""
INTEL_MAC = """machdep.cpu.vendor: GenuineIntel
machdep.cpu.brand_string: Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz
machdep.cpu.features: FPU SSE2 FMA AVX1.0 F16C
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2
"""


@pytest.mark.parametrize(("cpu", "vendor", "model", "arch", "flags", "int8"), [
    (parse_cpuinfo(EPYC, "x86_64"), "AuthenticAMD", "AMD EPYC 9354", "x86_64",
     {"fma", "f16c", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"}, True),
    (parse_cpuinfo(RASPBERRY_PI_5, "aarch64"), "0x41", "", "arm64", {"neon", "dotprod"}, True),
    (parse_sysctl(M2, "arm64"), "Apple", "Apple M2", "arm64", {"neon", "dotprod", "i8mm"}, True),
    (parse_sysctl(INTEL_MAC, "x86_64"), "GenuineIntel", "Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz", "x86_64",
     {"fma", "f16c", "avx2"}, False),
    (parse_cpuinfo("", "AMD64"), "", "", "x86_64", set(), False),
])  # fmt: skip
def test_processors(cpu: machine.Cpu, vendor: str, model: str, arch: str, flags: set[str], int8: bool) -> None:
    assert (cpu.vendor, cpu.model, cpu.arch, cpu.flags, cpu.int8) == (vendor, model, arch, flags, int8)


@pytest.mark.parametrize(("cores", "affinity", "quota", "count", "reason"), [
    (8, 16, None, 8, "8 physical cores"),
    (8, 2, None, 2, "affinity"),
    (8, 16, 2.5, 2, "quota of 2.5"),
    (8, 16, 0.5, 1, "quota of 0.5"),
    (4, 4, 64.0, 4, "4 physical cores"),
])
def test_threads_take_the_smallest_limit(cores: int, affinity: int, quota: float | None, count: int, reason: str) -> None:
    chosen = choose_threads(cores, affinity, quota)
    assert chosen.count == count
    assert reason in chosen.reason


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_v2_is_the_smallest_on_the_way_up(tmp_path: Path) -> None:
    put(tmp_path / "cpu.max", "max 100000\n")
    put(tmp_path / "user" / "cpu.max", "300000 100000\n")
    put(tmp_path / "user" / "job" / "cpu.max", "400000 100000\n")
    assert cpu_quota("0::/user/job\n", tmp_path) == 3.0
    assert cpu_quota("0::/\n", tmp_path) is None


def test_quota_of_v1(tmp_path: Path) -> None:
    put(tmp_path / "cpu" / "box" / "cpu.cfs_quota_us", "150000\n")
    put(tmp_path / "cpu" / "box" / "cpu.cfs_period_us", "100000\n")
    put(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1\n")
    put(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    membership = "4:memory:/elsewhere\n2:cpu,cpuacct:/box\n"
    assert cpu_quota(membership, tmp_path) == 1.5
    assert cpu_quota("2:cpu,cpuacct:/\n", tmp_path) is None


def test_group_that_is_not_visible_in_a_container_falls_back_to_the_root(tmp_path: Path) -> None:
    put(tmp_path / "cpu.max", "50000 100000\n")
    assert cpu_quota("0::/docker/0123abcd\n", tmp_path) == 0.5


def test_group_path_cannot_leave_the_root(tmp_path: Path) -> None:
    put(tmp_path / "outside" / "cpu.max", "100000 100000\n")
    put(tmp_path / "inner" / "cpu.max", "200000 100000\n")
    assert cpu_quota("0::/../outside\n", tmp_path / "inner") == 2.0


def test_memory_room_counts_cache_that_can_be_dropped(tmp_path: Path) -> None:
    put(tmp_path / "box" / "memory.max", "1000\n")
    put(tmp_path / "box" / "memory.current", "700\n")
    put(tmp_path / "box" / "memory.stat", "anon 5\ninactive_file 200\n")
    put(tmp_path / "memory.max", "max\n")
    assert memory_room("0::/box\n", tmp_path) == [500]


def test_memory_room_of_v1_knows_its_way_to_say_no_limit(tmp_path: Path) -> None:
    put(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    put(tmp_path / "memory" / "memory.usage_in_bytes", "700\n")
    put(tmp_path / "memory" / "box" / "memory.limit_in_bytes", "1000\n")
    put(tmp_path / "memory" / "box" / "memory.usage_in_bytes", "1200\n")
    assert memory_room("4:memory:/box\n", tmp_path) == [0]


def test_this_machine_has_threads_and_memory() -> None:
    assert machine.default_threads() >= 1
    assert machine.available_memory() > 1 << 20
    assert machine.cpu().arch


@pytest.mark.parametrize(("versions", "conflict"), [
    (("1.30", "1.30", None), True), (("1.30", None, "0.3"), False), ((None, "1.30", None), False), ((None, None, None), False),
])
def test_both_onnxruntime_packages_are_a_conflict(versions: tuple[str | None, ...], conflict: bool) -> None:
    installed = [Runtime(name, backend, version, extra)
                 for (name, backend, extra), version in zip(machine.RUNTIMES, versions, strict=True)]
    message = runtime_conflict(installed)
    assert (message is not None) == conflict
    if message:
        assert "pip uninstall onnxruntime onnxruntime-gpu" in message


def test_runtimes_are_listed_with_their_install_line() -> None:
    listed = {runtime.name: runtime for runtime in machine.runtimes()}
    assert listed["llama-cpp-python"].install == 'pip install "edgeguard[llama]"'
    assert set(listed) == {"onnxruntime", "onnxruntime-gpu", "llama-cpp-python"}
