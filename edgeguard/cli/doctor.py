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

from edgeguard import __version__, loading, machine, store
from edgeguard.cli.check import ModelOption
from edgeguard.cli.console import facts, line, show, size, waiting, write_json
from edgeguard.cli.status import ERROR
from edgeguard.cli.tune import told
from edgeguard.errors import EdgeGuardError, ModelMismatchError
from edgeguard.guard import Guard

PROBE_SECONDS = 2.0
BACKENDS = ("onnx", "llama")


def doctor(
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object, on one line.")] = False,
    probe: Annotated[bool, typer.Option(help="Measure each installed backend for two seconds.")] = True,
) -> None:
    """Look at this machine: processor, memory, runtimes, devices, what is chosen and why, and the speed."""
    with waiting("Looking and measuring"):
        found = diagnose(model, probe=probe)
    if as_json:
        write_json(found)
    else:
        show(report(found))
    if found["problems"]:
        raise typer.Exit(ERROR)


def diagnose(model: str | None = None, *, probe: bool) -> dict[str, Any]:
    """Everything as plain values, the choice for a model, by default the built-in one; `problems` keep edgeguard from working."""
    from edgeguard.backends import fused, kernels

    cpu, installed = machine.cpu(), machine.runtimes()
    conflict = machine.runtime_conflict(installed)
    usable = {runtime.backend for runtime in installed if runtime.version}
    probes = [measure(backend) for backend in BACKENDS if probe and backend in usable]
    choice = _choice(model)
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
        "kernels": {use: {"name": each.name, "reason": each.reason} for use, each in {**kernels.told(cpu), **fused.told(cpu)}.items()},
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

            from edgeguard.backends import onnx_session

            offered = onnxruntime.get_available_providers()
            return [device for device, provider in onnx_session.PROVIDERS.items() if provider in offered]
        from edgeguard.backends import llama_native

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
        "checks": len(times), "kernel": info.kernel, "fallbacks": list(info.fallbacks),
    }  # fmt: skip


def _choice(model: str | None) -> dict[str, Any]:
    """What `auto` takes for a model, why, what was measured for it, whose calibration counts, and which prefixes are at hand."""
    try:
        choice, (tuned, why) = loading.choose(model), loading.tuned_record(model)
        calibration = _calibration(choice.model)
    except EdgeGuardError as error:
        return {"error": str(error)}
    measured = tuned.to_dict() if tuned else {"error": f"{why}: edgeguard tune" + (f" --model {model}" if model else "")}
    return {
        "backend": choice.backend, "folder": str(choice.model.folder), "reason": choice.reason, "threads": choice.threads,
        "prepacked": choice.prepacked, "tuned": measured, "calibration": calibration, "prefixes": _prefixes(choice.model),
    }


def _calibration(model: store.Model) -> dict[str, Any]:
    """Of the scores, and whose it is; raises `StoreError` for one that cannot be read."""
    try:
        profile = loading.profile_of(model)
    except ModelMismatchError:
        return {"error": "it depends on the profile that is named when the model is loaded"}
    calibration, whose = loading.calibration_of(model, profile, known=True)
    return {"of": whose, **asdict(calibration)}


def _prefixes(model: store.Model) -> dict[str, Any]:
    """Prefix states that a new process does not have to evaluate: the artifact's own, and those in the cache."""
    own = [prefix.role for prefix in model.manifest.prefixes] if isinstance(model, store.Artifact) else []
    known = store.digest(model, known=True)
    cache = store.PrefixCache(store.cache_folder() / "prefixes", {"model": known})
    held = cache.entries() if known else []
    return {"own": own, "cached": len(held), "bytes": sum(count for _, count in held), "folder": str(cache.folder)}


def report(found: dict[str, Any]) -> list[Text]:
    """The findings for people."""
    cpu, memory, threads, choice = found["cpu"], found["memory"], found["threads"], found["choice"]
    pairs = [
        ("edgeguard", f"{found['edgeguard']}, Python {found['python']}, {found['platform']}"),
        ("processor", f"{cpu['model'] or cpu['vendor'] or 'unknown'}, {cpu['arch']}; {' '.join(cpu['flags'])}"),
        *((f"{use} kernel", f"{each['name']}: {each['reason']}") for use, each in found["kernels"].items()),
        ("threads", f"{threads['count']}, because of {threads['reason']}"),
        ("memory", f"{size(memory['available'])} available of {size(memory['total'])}"),
        *((runtime["name"], runtime["version"] or f"not installed: {runtime['install']}") for runtime in found["runtimes"]),
        *((f"{backend} devices", ", ".join(names) or "none") for backend, names in found["devices"].items()),
        ("models", f"{', '.join(found['store']['models'])}; installed in {found['store']['home']}"),
        ("network", "forbidden (offline)" if found["store"]["offline"] else "used by `models pull` and `convert` with a hub id only"),
    ]
    if "error" not in choice:
        pairs += _chosen(choice)
    pairs += [(f"{each['backend']} speed", _speed(each)) for each in found["probes"]]
    problems = [line(("  problem  ", "red"), problem) for problem in found["problems"]]
    return [*facts(pairs), *(problems or [line(("  all well", "green"))])]


def _chosen(choice: dict[str, Any]) -> list[tuple[str, str]]:
    tuned, prefixes = choice["tuned"], choice["prefixes"]
    threads = "" if choice["threads"] is None else f", {choice['threads']} threads"
    own = f"the artifact has its own ({', '.join(prefixes['own'])}); " if prefixes["own"] else ""
    pairs = [("chosen", f"{choice['backend']}{threads}: {choice['reason']}")]
    if "error" in tuned:
        pairs.append(("measured", f"no, {tuned['error']}"))
    else:
        record = store.Tuned.from_dict(tuned)
        pairs += [("measured" if place == 0 else "", f"{each.title}: {told(each)}") for place, each in enumerate(record.candidates)]
    pairs.append(("calibration", _calibrated(choice["calibration"])))
    return [*pairs, ("prefixes", f"{own}{prefixes['cached']} in the cache ({size(prefixes['bytes'])})")]


def _calibrated(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"unknown, {found['error']}"
    if found["of"] == "none":
        return f"none: the model's own scores, unsafe from {found['threshold']:g}"
    owner = "yours" if found["of"] == "user" else "the artifact's"
    return (f"{owner}, fitted on {found['rows']} rows: slope {found['slope']:.3g}, offset {found['offset']:.3g}, "
            f"unsafe from {found['threshold']:.3g}")


def _speed(probe: dict[str, Any]) -> str:
    if "error" in probe:
        return "failed, see below"
    return (
        f"{probe['check_ms']:.0f} ms a check (median of {probe['checks']}), loaded in {probe['load_ms']:.0f} ms; "
        f"{probe['runtime']}, {probe['precision']}, {probe['device']}, {probe['threads']} threads"
        + "".join(f"; {each}" for each in (probe["kernel"], *probe["fallbacks"]) if each)
    )
