"""A second form of an artifact's weights, packed as ONNX Runtime multiplies them: mapped at load, so that no copy is in memory.

It is twice as large on disk as the weights, fits one artifact, processor and build of the runtime only, and is made on request.
Whatever does not fit is a miss. One that is loaded must give the bits that were written down when it was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeguard import strict_json
from edgeguard.backends.base import FloatArray
from edgeguard.backends.onnx_session import Session
from edgeguard.errors import EdgeGuardError, InferenceError, ModelMemoryError, StoreError
from edgeguard.machine import cpu
from edgeguard.store.catalogue import digest, home
from edgeguard.store.files import Seen, write_text
from edgeguard.store.manifest import Artifact

FORMAT = 1
MODEL, DATA, FORM = "model.onnx", "model.onnx.data", "form.json"
TIMES = 2.2
"""Bytes on disk for each byte of weights, at most."""
SAVING = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": DATA,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}

Probe = Callable[[Session], FloatArray]
"""The logits of a fixed small input."""


def key(artifact: Artifact, build: str) -> dict[str, str]:
    """All on which the packed form depends; `build` is ONNX Runtime's (`Session.build`)."""
    here = cpu()
    return {"model": digest(artifact), "processor": " ".join([here.arch, here.vendor, here.model, *sorted(here.flags)]),
            "runtime": build, "format": str(FORMAT)}


def make(artifact: Artifact, folder: Path, probe: Probe) -> Path:
    """Write the form of an artifact for this machine below `folder`, replacing an older one; gives its own folder.

    Needs memory for a packed copy once, for two where products are `unsigned` (`kernels`). Raises `StoreError` (no room, not
    writable), `InferenceError` when the mapped form gives other results, and what `Session` raises.
    """
    _check_room(artifact, folder)
    weights, precision = artifact.path(artifact.manifest.weights), artifact.manifest.precision
    partial = folder / f"{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        session = Session(weights, precision, "cpu", None, entries=SAVING, written=partial / MODEL)
        wanted, whole = _mark(probe(session)), key(artifact, session.build)
        del session
        if _mark(probe(_mapped(partial, precision, None))) != wanted:
            raise InferenceError("The packed weights give other results than the artifact; it is used as it is.")
        seen = Seen(home() / ".seen.json")
        files = {name: seen.sha256(partial / name) for name in (MODEL, DATA)}
        write_text(partial / FORM, json.dumps({"key": whole, "files": files, "answer": wanted}))
        place = _place(folder, whole)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        _forget_older(folder, whole)
    except OSError as error:
        raise StoreError(f"The packed weights could not be written below {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def find(artifact: Artifact, folder: Path, build: str) -> Path | None:
    """The whole form of an artifact for this machine, or None."""
    whole = key(artifact, build)
    place = _place(folder, whole)
    form = _form(place)
    if form.get("key") != whole or not isinstance(form.get("files"), dict):
        return None
    seen = Seen(home() / ".seen.json")  # hashed once, and again only when a file has changed
    try:
        good = set(form["files"]) == {MODEL, DATA} and all(seen.sha256(place / name) == known for name, known in form["files"].items())
    except OSError:
        return None
    return place if good else None


def load(artifact: Artifact, folder: Path, build: str, threads: int | None, probe: Probe) -> Session | None:
    """A session on the mapped form, which has proved itself; None when there is none. One that is wrong is removed."""
    place = find(artifact, folder, build)
    if place is None:
        return None
    try:
        session = _mapped(place, artifact.manifest.precision, threads)
        if _mark(probe(session)) == _form(place).get("answer"):
            return session
    except ModelMemoryError:
        raise
    except EdgeGuardError:
        pass  # the artifact itself is loaded instead, and says what is wrong if it is not the form
    shutil.rmtree(place, ignore_errors=True)
    return None


def _mapped(place: Path, precision: str, threads: int | None) -> Session:
    return Session(place / MODEL, precision, "cpu", threads, optimised=True, checked=True)


def _forget_older(folder: Path, whole: Mapping[str, str]) -> None:
    """Remove forms for other builds of the runtime on this processor, which nothing reads any more."""
    for place in folder.iterdir():
        known = _form(place).get("key")
        if isinstance(known, dict) and known.get("processor") == whole["processor"] and known.get("runtime") != whole["runtime"]:
            shutil.rmtree(place, ignore_errors=True)


def _mark(answer: FloatArray) -> str:
    return hashlib.sha256(answer.tobytes()).hexdigest()


def _place(folder: Path, whole: Mapping[str, str]) -> Path:
    return folder / hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _form(place: Path) -> dict[str, Any]:
    try:
        found = strict_json.loads((place / FORM).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_room(artifact: Artifact, folder: Path) -> None:
    above = next(each for each in (folder, *folder.parents) if each.exists())
    needed, free = int(artifact.size * TIMES), shutil.disk_usage(above).free
    if needed > free:
        raise StoreError(f"Packed weights of {artifact.name} take up to {needed / 2**30:.1f} GiB; {above} has {free / 2**30:.1f} GiB free.")
