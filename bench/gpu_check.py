"""`edgeguard bench gpu`: a CUDA machine held against its own CPU, then timed. Also a script: `python bench/gpu_check.py --out FOLDER`.

ONNX Runtime runs the fp16 and int4 guard graphs on its CUDA provider, llama.cpp the GGUFs with all layers on the GPU. Without
CUDA nothing is run, and the status is 2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from edgeguard import __version__, machine, store
from edgeguard.bench.artifacts import BACKENDS, Measured, made_of, mini_source
from edgeguard.bench.assemble import host
from edgeguard.bench.cells import Cell
from edgeguard.bench.gpu_cells import LIMITS, Check, card
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.report import FORMAT, show, table
from edgeguard.bench.result import figure
from edgeguard.cli.check import ThreadsOption
from edgeguard.errors import DeviceError, EdgeGuardError, InferenceError, InputError, ModelNotFoundError
from edgeguard.store import Artifact, write_text
from edgeguard.store.catalogue import BUILT_IN

MADE = ("onnx-fp16", "onnx-int4", "gguf-f16", "gguf-q4_k_m")
"""What is measured, and made from the source where it lacks."""
RESULT = "result.json"


def gpu(
    *,
    out: Annotated[Path, typer.Option(help="Folder for result.json and for artifacts that have to be made.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Folder with artifacts of one model; the built-in one by default.")] = None,
    source: Annotated[str | None, typer.Option(help="Checkpoint to make lacking artifacts from; the built-in model's by default.")] = None,
    profile: Annotated[str | None, typer.Option(help="Which guard model a source is that does not say so.", show_default=False)] = None,
    threads: ThreadsOption = None,
) -> None:
    """Check scores and verdicts on a CUDA device against the CPU's, and measure speed there."""
    errors = Console(stderr=True, highlight=False)
    runtimes = usable()
    found = gather(model, source, profile, out / "models", runtimes, errors)
    result = check(found, runtimes, "cuda", threads or machine.default_threads(), errors)
    write_text(out / RESULT, json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    tell(result)
    if failed := [target["what"] for target in result["targets"] if target["met"] is False]:
        raise InferenceError(f"{len(failed)} checks failed ({'; '.join(failed)}); all numbers are in {out / RESULT}.")


def usable() -> dict[str, str]:
    """Backends and why each cannot use CUDA here, empty if it can; raises `DeviceError` when none can."""
    reasons = {"onnx": _onnx_reason(), "llama": _llama_reason()}
    if all(reasons.values()):
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise DeviceError(f"There is no CUDA device that edgeguard could use, so nothing was run and nothing was checked. {told}")
    return reasons


def _onnx_reason() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return 'onnxruntime-gpu is not installed (pip install "edgeguard[cuda]")'
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in offered:
        return ""
    return f"this ONNX Runtime has {', '.join(offered)} only; onnxruntime-gpu has to take its place"


def _llama_reason() -> str:
    from edgeguard.backends.llama_native import choose_device, devices, library

    try:
        choose_device("cuda", devices(library()))
    except (EdgeGuardError, ImportError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return ""


def gather(model: str | None, source: str | None, profile: str | None, work: Path, runtimes: Mapping[str, str],
           errors: Console) -> Measured:
    """The model's artifacts that a GPU can run, those that lack converted from the source; raises `ModelNotFoundError`."""
    place = store.locate(model)
    found = {f"{each.kind}-{each.manifest.precision}": each for each in store.scan(place) if isinstance(each, Artifact)}
    kept = [Artifact.read(path) for path in sorted(work.glob("*-*")) if (path / "manifest.json").is_file()]
    chosen = source or (str(place / "master") if (place / "master").is_dir() else None)
    if chosen is None and model in (None, BUILT_IN):
        origin = mini_source(found)
        chosen, kept = str(origin.folder), [each for each in kept if made_of(origin, each.folder)]
    found |= {each.folder.name: each for each in kept}
    missing: dict[str, str] = {}
    for label in MADE:
        backend = BACKENDS[label.partition("-")[0]]
        if label in found or runtimes[backend]:
            continue
        try:
            found[label] = _made(label, chosen, _profile(found, profile), work / label, errors)
        except (EdgeGuardError, ImportError) as error:
            missing[label] = f"it could not be made: {error}"
    fitting = {label: each for label, each in found.items() if each.manifest.precision in LIMITS}
    if not fitting:
        raise ModelNotFoundError(f"{place} has no artifact that a GPU runs ({', '.join(LIMITS)}), and none could be made: "
                                 f"{'; '.join(missing.values()) or 'no runtime for it'}.")
    return Measured(next(iter(fitting.values())).name, fitting, missing, chosen or "")


def _profile(found: Mapping[str, Artifact], asked: str | None) -> str | None:
    """What the model's own artifacts say, else what was asked for."""
    return next((each.manifest.profile for each in found.values()), asked)


def _made(label: str, source: str | None, profile: str | None, out: Path, errors: Console) -> Artifact:
    if source is None:
        raise InputError("there is no checkpoint to make it from; name one with --source")
    from edgeguard.convert.pipeline import convert

    kind, _, precision = label.partition("-")
    errors.print(f"Converting {source} to {label}", markup=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(source, out, target=kind, precision=precision, profile=profile, force=True)
    return Artifact.read(out)


def check(model: Measured, runtimes: Mapping[str, str], device: str, threads: int, errors: Console, *,
          timed: bool = True) -> dict[str, Any]:
    """The result file's content; an artifact that fails leaves a cell with the reason, and a target that is not met."""
    prompts = Prompts(model)
    cells: list[Cell] = [_absent(label, reason) for label, reason in model.missing.items()]
    targets: list[dict[str, Any]] = []
    for label, artifact in model.found.items():
        backend = BACKENDS[artifact.kind]
        if runtimes[backend]:
            cells.append(_absent(label, runtimes[backend]))
            continue
        each = Check(label, artifact, prompts, device, threads)
        try:
            for cell in each.run(timed=timed):
                errors.print(f"{cell.id}  {'-' if cell.p50 is None else figure(cell.p50, cell.unit)}", markup=False)
                cells.append(cell)
        except Exception as error:  # a native runtime can fail in ways of its own; the other artifacts are still checked
            reason = str(error) if isinstance(error, EdgeGuardError) else f"unexpected {type(error).__name__}: {error}"
            cells.append(_absent(label, reason))
            targets.append({"what": f"{label}: runs to the end", "wanted": ">= 1", "got": 0, "met": False, "from": [], "note": reason})
        targets += each.targets
    return {
        "bench": "gpu", "format": FORMAT, "suite": "gpu", "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "edgeguard": __version__, "machine": {**host(threads), **_card()}, "model": model.to_dict(),
        "cells": [cell.to_dict() for cell in cells], "targets": targets,
    }


def _absent(label: str, reason: str) -> Cell:
    return Cell(f"gpu/{label}", "gpu", f"edgeguard {label}", "s", {"what": "all of it"}, reason=reason)


def _card() -> dict[str, str]:
    found = card()
    return {"gpu": found.name, "driver": found.driver} if found else {}


def tell(result: Mapping[str, Any]) -> None:
    """The checks for people."""
    shown = table("Checks on the GPU", "", ("check", "wanted", "got", ""))
    for target in result["targets"]:
        shown.add_row(target["what"], target["wanted"], f"{target['got']:.4g}", "met" if target["met"] else "not met")
    show([shown])


if __name__ == "__main__":
    from edgeguard.cli import main

    del sys.path[0]  # modules of this folder must not be taken for packages of the same names
    sys.exit(main(["bench", "gpu", *sys.argv[1:]]))
