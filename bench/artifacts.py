"""The artifacts of one model that a run measures, by label (`onnx-int8`, `gguf-q4_k_m`); the mini's further ones are made of its GGUF."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from edgeguard import profiles, store
from edgeguard.architecture import Shape
from edgeguard.bench import checkpoint
from edgeguard.bench.checkpoint import Ends
from edgeguard.errors import EdgeGuardError, ModelNotFoundError, StoreError
from edgeguard.store import Artifact, Kind
from edgeguard.store.catalogue import BUILT_IN, cache_folder
from edgeguard.store.files import locked

MADE = ("onnx-int4", "gguf-q4_k_m", "gguf-q4_0", "onnx-fp32")
"""Artifacts of the mini that do not come with edgeguard."""
MINI_SOURCE = "gguf-q8_0"
"""The mini's artifact that all others are made of."""
MINI_ENDS = Ends("<|im_start|>", 1, "<|im_end|>", 2)
Told = Callable[[str], object]
BACKENDS = {"onnx": "onnx", "gguf": "llama"}
CARRIERS = {"onnx": ("int8", "int4", "fp32"), "gguf": ("q4_k_m", "q8_0", "q4_0")}
"""Precisions by how well they speak for their backend: long cells are measured with the first one that is there."""


@dataclass(frozen=True)
class Measured:
    """One model in several artifacts."""

    name: str
    found: Mapping[str, Artifact]
    """By label."""
    missing: Mapping[str, str]
    """Labels that could not be had, and why."""
    source: str
    """A folder that other runtimes prepare their own model from, for the built-in one to be written first; empty when there is none."""

    @property
    def any(self) -> Artifact:
        """Any of them: shape, tokenizer and profile are the same in all."""
        return next(iter(self.found.values()))

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return self.any.manifest.shape

    @property
    def profile(self) -> profiles.Profile:
        """Which guard model it is."""
        return profiles.get(self.any.manifest.profile)

    @property
    def random(self) -> bool:
        """Its weights are made up: speed can be measured, verdicts mean nothing."""
        return any(each.manifest.source.get("kind") == "random" for each in self.found.values())

    def label(self, kind: str) -> str | None:
        """The artifact that speaks for a kind, `onnx` or `gguf`; None if there is none."""
        wanted = [f"{kind}-{precision}" for precision in CARRIERS[kind]]
        held = [label for label in self.found if label.startswith(f"{kind}-")]
        return next((label for label in [*wanted, *held] if label in self.found), None)

    def to_dict(self) -> dict[str, Any]:
        """For the result file."""
        artifacts = [
            {"label": label, "kind": each.kind, "precision": each.manifest.precision, "bytes": each.size,
             "sha256": each.manifest.files[_largest(each)].sha256, "digest": store.digest(each)}
            for label, each in self.found.items()
        ]
        return {"name": self.name, "profile": self.profile.name, "random": self.random, "shape": self.shape.to_dict(),
                "artifacts": artifacts}


def find(model: str | None, work: Path, told: Told = lambda _: None, *, make: bool = True) -> Measured:
    """All artifacts of a name or folder; of the built-in model also those of `MADE`, converted into `work` when they lack.

    Without `make` they are only named, as if they were there. The source is the folder `master` beside the artifacts; the built-in
    model's is written by `write_source`. Raises `ModelNotFoundError` where there is no artifact, and whatever reading one raises.
    """
    place = store.locate(model)
    found = {_label(each): each for each in store.scan(place) if isinstance(each, Artifact)}
    if not found:
        raise ModelNotFoundError(f"{place} holds no artifact (a folder with manifest.json); make one with: edgeguard convert")
    missing: dict[str, str] = {}
    source = str(place / "master") if (place / "master").is_dir() else ""
    if model in (None, BUILT_IN):
        origin = mini_source(found)
        source = str(cache_folder() / "sources" / f"{origin.name}-{origin.manifest.files[origin.manifest.weights].sha256[:16]}")
        for label in MADE:
            try:
                found[label] = _made(label, origin, work / label, told) if make else _named(label, origin, work / label)
            except (EdgeGuardError, ImportError) as error:
                missing[label] = f"it could not be made: {error}"
    name = os.path.commonprefix([artifact.name for artifact in found.values()]).rstrip("-_.")  # noqa: RUF071  names are no paths
    return Measured(name or next(iter(found.values())).name, found, missing, source)


def mini_source(found: Mapping[str, Artifact]) -> Artifact:
    """The built-in model's GGUF; raises `ModelNotFoundError` where it did not come with the package."""
    if MINI_SOURCE not in found:
        raise ModelNotFoundError(f"The built-in model's {MINI_SOURCE} is not part of this installation. Install edgeguard again.")
    return found[MINI_SOURCE]


def write_source(model: Measured) -> Path:
    """The folder that `model.source` names; the built-in model's is written from its GGUF, in bfloat16, when it is not there.

    Raises `StoreError` when it cannot be written, `RuntimeMissingError` without the extra `convert`.
    """
    out = Path(model.source)
    if out.is_dir():
        return out
    try:
        with locked(out.with_name(f"{out.name}.lock"), what=str(out)):
            if not out.is_dir():
                _write_source(mini_source(model.found), out)
    except OSError as error:
        raise StoreError(f"{out} could not be written: {error.strerror or error}.") from error
    return out


def _write_source(origin: Artifact, out: Path) -> None:
    from edgeguard.convert.gguf_source import GgufWeights

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checkpoint.write(GgufWeights(origin.weights), partial, lambda _stage, _done, _total: None, MINI_ENDS)
    shutil.copyfile(origin.tokenizer, partial / "tokenizer.json")
    partial.rename(out)


def made_of(origin: Artifact, out: Path) -> Artifact | None:
    """The artifact in a folder, if it was converted from this one."""
    if not (out / "manifest.json").is_file():
        return None
    made = Artifact.read(out)
    return made if made.manifest.source.get("sha256") == origin.manifest.files[origin.manifest.weights].sha256 else None


def _made(label: str, origin: Artifact, out: Path, told: Told) -> Artifact:
    if made := made_of(origin, out):
        return made
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError('conversion needs: pip install "edgeguard[convert]"')
    from edgeguard.convert.pipeline import convert

    kind, _, precision = label.partition("-")
    told(f"Converting the built-in model to {label}")
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(origin.folder, out, target=kind, precision=precision, name=f"{origin.name}-{precision}", force=True)
    return Artifact.read(out)


def _named(label: str, origin: Artifact, out: Path) -> Artifact:
    kind, _, precision = label.partition("-")
    return Artifact(out, replace(origin.manifest, kind=cast(Kind, kind), precision=precision))


def _label(artifact: Artifact) -> str:
    return f"{artifact.kind}-{artifact.manifest.precision}"


def _largest(artifact: Artifact) -> str:
    return max(artifact.manifest.files, key=lambda name: artifact.manifest.files[name].size)
