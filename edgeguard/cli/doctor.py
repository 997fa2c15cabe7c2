"""`edgeguard doctor`: what this machine is, what edgeguard would do on it and why, and how fast that is."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict
from typing import Annotated, Any

import psutil
import typer
from rich.text import Text

from edgeguard import __version__, machine, store
from edgeguard.backends import llama_native, onnx_session
from edgeguard.cli.console import facts, line, show, size, waiting, write_json
from edgeguard.cli.status import ERROR
from edgeguard.errors import EdgeGuardError
from edgeguard.guard import Guard

PROBE_SECONDS = 2.0
BACKENDS = ("onnx", "llama")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object, on one line.")] = False,
    probe: Annotated[bool, typer.Option(help="Measure each installed backend for two seconds.")] = True,
) -> None:
    """Look at this machine: processor, memory, runtimes, devices, what is chosen and why, and the speed."""
    with waiting("Looking and measuring"):
        found = diagnose(probe=probe)
    if as_json:
        write_json(found)
    else:
        show(report(found))
    if found["problems"]:
        raise typer.Exit(ERROR)


def diagnose(*, probe: bool) -> dict[str, Any]:
    """Everything as plain values; `problems` says what keeps edgeguard from working."""
    cpu, installed = machine.cpu(), machine.runtimes()
    conflict = machine.runtime_conflict(installed)
    usable = {runtime.backend for runtime in installed if runtime.version}
    probes = [measure(backend) for backend in BACKENDS if probe and backend in usable]
    choice = _choice()
    problems = [conflict] if conflict else []
    if not usable:
        problems.append(f"No runtime is installed. {installed[0].install}")
    elif "error" in choice:
        problems.append(choice["error"])
    problems += [f"{each['backend']}: {each['error']}" for each in probes if "error" in each]
    return {
        "edgeguard": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {**asdict(cpu), "flags": sorted(cpu.flags), "int8": cpu.int8},
        "threads": asdict(machine.threads()),
        "memory": {"available": machine.available_memory(), "total": int(psutil.virtual_memory().total)},
        "runtimes": [{**asdict(runtime), "install": runtime.install} for runtime in installed],
        "devices": {backend: devices(backend) for backend in BACKENDS if backend in usable},
        "store": {"home": str(store.home()), "offline": store.offline(), "models": [entry.name for entry in store.models()]},
        "choice": choice,
        "probes": probes,
        "problems": problems,
    }


def devices(backend: str) -> list[str]:
    """What an installed runtime offers, by the names that --device takes; empty when it cannot be loaded."""
    try:
        if backend == "onnx":
            machine.no_telemetry()
            import onnxruntime

            offered = onnxruntime.get_available_providers()
            return [device for device, provider in onnx_session.PROVIDERS.items() if provider in offered]
        return ["cpu", *llama_native.devices(llama_native.library())]
    except Exception:  # a broken native library; the probe says what is wrong
        return []


def measure(backend: str) -> dict[str, Any]:
    """Load the built-in model and judge distinct texts for two seconds; milliseconds."""
    try:
        began = time.perf_counter()
        with Guard.load(backend=backend) as guard:
            loaded = time.perf_counter()
            guard.warmup()
            warm, times = time.perf_counter(), list[float]()
            while time.perf_counter() - warm < PROBE_SECONDS:
                start = time.perf_counter()
                guard.check(f"Question {len(times)}: how do I end a process that does not answer?")
                times.append((time.perf_counter() - start) * 1000)
            info = guard.backend_info
    except EdgeGuardError as error:
        return {"backend": backend, "error": str(error)}
    except Exception as error:  # a native runtime can fail in ways of its own; a report says so and goes on
        return {"backend": backend, "error": f"unexpected {type(error).__name__}"}
    return {
        "backend": backend, "runtime": info.runtime, "device": info.device, "precision": info.precision, "threads": info.threads,
        "load_ms": (loaded - began) * 1000, "warmup_ms": (warm - loaded) * 1000, "check_ms": statistics.median(times),
        "checks": len(times),
    }  # fmt: skip


def _choice() -> dict[str, str]:
    from edgeguard.loading import choose

    try:
        choice = choose(None, "auto")
    except EdgeGuardError as error:
        return {"error": str(error)}
    return {"backend": choice.backend, "folder": str(choice.model.folder), "reason": choice.reason}


def report(found: dict[str, Any]) -> list[Text]:
    """The findings for people."""
    cpu, memory, threads, choice = found["cpu"], found["memory"], found["threads"], found["choice"]
    pairs = [
        ("edgeguard", f"{found['edgeguard']}, Python {found['python']}, {found['platform']}"),
        ("processor", f"{cpu['model'] or cpu['vendor'] or 'unknown'}, {cpu['arch']}; {' '.join(cpu['flags'])}"),
        ("int8", "fast dot products" if cpu["int8"] else "no VNNI or dotprod: int8 models run in reduced range or slower"),
        ("threads", f"{threads['count']}, because of {threads['reason']}"),
        ("memory", f"{size(memory['available'])} available of {size(memory['total'])}"),
        *((runtime["name"], runtime["version"] or f"not installed: {runtime['install']}") for runtime in found["runtimes"]),
        *((f"{backend} devices", ", ".join(names) or "none") for backend, names in found["devices"].items()),
        ("models", f"{', '.join(found['store']['models'])}; installed in {found['store']['home']}"),
        ("network", "forbidden (offline)" if found["store"]["offline"] else "used by `models pull` and `convert` with a hub id only"),
    ]
    if "error" not in choice:
        pairs.append(("chosen", f"{choice['backend']}: {choice['reason']}"))
    pairs += [(f"{each['backend']} speed", _speed(each)) for each in found["probes"]]
    problems = [line(("  problem  ", "red"), problem) for problem in found["problems"]]
    return [*facts(pairs), *(problems or [line(("  all well", "green"))])]


def _speed(probe: dict[str, Any]) -> str:
    if "error" in probe:
        return "failed, see below"
    return (
        f"{probe['check_ms']:.0f} ms a check (median of {probe['checks']}), loaded in {probe['load_ms']:.0f} ms; "
        f"{probe['runtime']}, {probe['precision']}, {probe['device']}, {probe['threads']} threads"
    )
