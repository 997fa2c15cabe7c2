"""What this machine is: CPU features, cores and memory that may be used, runtimes that are installed.

Reading is apart from judging: every record is made by a pure function of texts, so each kind of machine can be tested
on any other. Nothing is read or set at import.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")

# the flags that decide how fast a model runs, by the names each system gives them
FLAGS = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx512_bf16": ("avx512_bf16",),
    "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
    "bf16": ("bf16", "feat_bf16"),
    "sve": ("sve",),
}
ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}
# IsProcessorFeaturePresent, winnt.h
WINDOWS_FEATURES = {"avx2": 40, "avx512f": 41, "neon": 19, "dotprod": 43}


@dataclass(frozen=True)
class Cpu:
    """The processor, with those of its features that matter here."""

    vendor: str
    model: str
    arch: str
    """`x86_64`, `arm64`, ..."""
    flags: frozenset[str]
    """Keys of `FLAGS`."""

    @property
    def int8(self) -> bool:
        """Has int8 dot products (VNNI, dotprod); on x86 without them U8S8 products saturate."""
        return bool(self.flags & {"avx512_vnni", "avx_vnni", "dotprod"})


def cpu() -> Cpu:
    """This machine's processor; unknown parts are empty."""
    arch = platform.machine()
    if platform.system() == "Linux":
        return parse_cpuinfo(_read(Path("/proc/cpuinfo")) or "", arch)
    if platform.system() == "Darwin":
        return parse_sysctl(_output("/usr/sbin/sysctl", "machdep.cpu", "hw.optional"), arch)
    return _windows_cpu(arch)


def parse_cpuinfo(text: str, arch: str) -> Cpu:
    """From the text of Linux's /proc/cpuinfo, first processor."""
    fields = _fields(text.split("\n\n", 1)[0])
    words = f"{fields.get('flags', '')} {fields.get('Features', '')}"
    vendor = fields.get("vendor_id") or fields.get("CPU implementer", "")
    return _cpu(vendor, fields.get("model name", ""), arch, words.split())


def parse_sysctl(text: str, arch: str) -> Cpu:
    """From what macOS's `sysctl machdep.cpu hw.optional` prints."""
    fields = _fields(text)
    words = f"{fields.get('machdep.cpu.features', '')} {fields.get('machdep.cpu.leaf7_features', '')}".split()
    words += [name.rsplit(".", 1)[-1] for name, value in fields.items() if name.startswith("hw.optional.") and value == "1"]
    model = fields.get("machdep.cpu.brand_string", "")
    vendor = fields.get("machdep.cpu.vendor") or ("Apple" if model.startswith("Apple") else "")
    return _cpu(vendor, model, arch, words)


def _windows_cpu(arch: str) -> Cpu:
    kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    words = [name for name, number in WINDOWS_FEATURES.items() if kernel and kernel.IsProcessorFeaturePresent(number)]
    return _cpu("", platform.processor(), arch, words)


def _cpu(vendor: str, model: str, arch: str, words: Sequence[str]) -> Cpu:
    present = {word.lower() for word in words}
    flags = frozenset(name for name, spellings in FLAGS.items() if present.intersection(spellings))
    return Cpu(vendor, model, ARCHITECTURES.get(arch.lower(), arch.lower()), flags)


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def no_telemetry() -> None:
    """Keep ONNX Runtime from writing a device id and asking for its collector; works only before it is first imported."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True)
class Threads:
    """How many threads a backend gets, and what decided it."""

    count: int
    reason: str


def default_threads() -> int:
    """Physical cores that this process may use: capped by its affinity and its container's CPU quota; at least 1."""
    return threads().count


def threads() -> Threads:
    """As `default_threads`, with the reason."""
    # psutil counts no cores in some containers and on some ARM boards
    return _allowed(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def most_threads() -> int:
    """All CPUs that this process may use, a core as often as it runs threads; what `default_threads` is tried against."""
    return _allowed(os.cpu_count() or 1).count


def _allowed(cores: int) -> Threads:
    try:
        affinity = len(psutil.Process().cpu_affinity() or ())
    except (AttributeError, psutil.Error):  # macOS has none
        affinity = 0
    return choose_threads(cores, affinity or os.cpu_count() or 1, cpu_quota(_membership()))


def choose_threads(cores: int, affinity: int, quota: float | None) -> Threads:
    """The smallest of the limits; `quota` is in CPUs, None without one."""
    limits = [(cores, f"{cores} physical cores"), (affinity, f"{affinity} CPUs in the process's affinity")]
    if quota is not None:
        limits.append((int(quota), f"the container's quota of {quota:g} CPUs"))
    count, reason = min(limits, key=lambda limit: limit[0])
    return Threads(max(1, count), reason)


def cpu_quota(membership: str, root: Path = CGROUPS) -> float | None:
    """CPUs that the control groups (v1 or v2) grant, None without a limit; `membership` is /proc/self/cgroup's text."""
    grants = []
    for group in _groups(membership, root, "cpu"):
        v1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        if match := re.match(r"(\d+)\s+(\d+)", _read(group / "cpu.max") or v1):  # no limit is "max" or -1
            grants.append(int(match[1]) / int(match[2]))
    return min(grants, default=None)


def available_memory() -> int:
    """Bytes that can be had without swapping, within the limits of the control groups."""
    return min([int(psutil.virtual_memory().available), *memory_room(_membership())])


def memory_room(membership: str, root: Path = CGROUPS) -> list[int]:
    """Bytes left in each control group that has a limit; page cache that can be dropped counts as free."""
    rooms = []
    for group in _groups(membership, root, "memory"):
        limit = (_read(group / "memory.max") or _read(group / "memory.limit_in_bytes") or "").strip()
        used = (_read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or "").strip()
        # v1 says "no limit" with a number near 2**63
        if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
            stat = _read(group / "memory.stat") or ""
            cached = re.search(r"^total_inactive_file (\d+)", stat, re.M) or re.search(r"^inactive_file (\d+)", stat, re.M)
            rooms.append(max(0, int(limit) - int(used) + int(cached[1] if cached else 0)))
    return rooms


def _groups(membership: str, root: Path, controller: str) -> Iterator[Path]:
    """This process's group and all above it; inside a container the own path may not be visible, or begin with `..`."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        own = top / path.lstrip("/")
        yield from (each for each in (own, *own.parents) if (each == top or top in each.parents) and ".." not in each.parts)


def _membership() -> str:
    return _read(Path("/proc/self/cgroup")) or ""


@dataclass(frozen=True)
class Runtime:
    """A runtime that edgeguard can use."""

    name: str
    """Of the distribution, as `onnxruntime-gpu`."""
    backend: str
    version: str | None
    """None when it is not installed."""
    extra: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "edgeguard[{self.extra}]"'


RUNTIMES = (
    ("onnxruntime", "onnx", "cpu"),
    ("onnxruntime-gpu", "onnx", "cuda"),
    ("llama-cpp-python", "llama", "llama"),
)


def runtimes() -> list[Runtime]:
    """Every runtime and its installed version, without importing one."""
    return [Runtime(name, backend, _version(name), extra) for name, backend, extra in RUNTIMES]


def runtime_conflict(installed: Sequence[Runtime]) -> str | None:
    """What is wrong and the fix when both onnxruntime packages are there: they overwrite each other's files."""
    onnx = [runtime.name for runtime in installed if runtime.backend == "onnx" and runtime.version]
    if len(onnx) < 2:
        return None
    return (
        f"{' and '.join(onnx)} are both installed and overwrite each other. Keep one: "
        "pip uninstall onnxruntime onnxruntime-gpu, then install edgeguard[cpu] or edgeguard[cuda] again."
    )


def _version(distribution: str) -> str | None:
    import importlib.metadata  # slow, and no verdict needs it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
