"""The artifacts of one model that a run measures, by label (`onnx-int8`, `gguf-q4_k_m`); the mini's further ones are made here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from edgeguard import profiles, store
from edgeguard.architecture import Shape
from edgeguard.errors import EdgeGuardError, ModelNotFoundError
from edgeguard.store import Artifact, Kind
from edgeguard.store.catalogue import BUILT_IN

MADE = ("onnx-int4", "gguf-q4_k_m", "gguf-q4_0", "onnx-fp32")
"""Artifacts of the mini that do not come with edgeguard; made from its master."""
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
    """A folder or name that other runtimes prepare their own model from; empty when there is none."""

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
             "sha256": each.manifest.files[_largest(each)].sha256}
            for label, each in self.found.items()
        ]
        return {"name": self.name, "profile": self.profile.name, "random": self.random, "shape": self.shape.to_dict(),
                "artifacts": artifacts}


def find(model: str | None, work: Path, told: Told = lambda _: None, *, make: bool = True) -> Measured:
    """All artifacts of a name or folder; of the built-in model also those of `MADE`, converted into `work` when they lack.

    Without `make` they are only named, as if they were there. Raises `ModelNotFoundError` where there is no artifact, and
    whatever reading one raises.
    """
    place = store.locate(model)
    found = {_label(each): each for each in store.scan(place) if isinstance(each, Artifact)}
    if not found:
        raise ModelNotFoundError(f"{place} holds no artifact (a folder with manifest.json); make one with: edgeguard convert")
    missing: dict[str, str] = {}
    master = place / "master"
    if model in (None, BUILT_IN):
        shipped = next(iter(found.values()))
        for label in MADE:
            try:
                made = _made(label, master, work / label, shipped, told) if make else _named(label, work, shipped)
                found[label] = made
            except (EdgeGuardError, ImportError) as error:
                missing[label] = f"it could not be made: {error}"
    source = str(master) if master.is_dir() else ""
    name = os.path.commonprefix([artifact.name for artifact in found.values()]).rstrip("-_.")  # noqa: RUF071  names are no paths
    return Measured(name or next(iter(found.values())).name, found, missing, source)


def _made(label: str, master: Path, out: Path, like: Artifact, told: Told) -> Artifact:
    if not (out / "manifest.json").is_file():
        if not master.is_dir():
            raise ModelNotFoundError("the built-in model's master weights are in a checkout of edgeguard only")
        if importlib.util.find_spec("safetensors") is None:
            raise ModelNotFoundError('conversion needs: pip install "edgeguard[convert]"')
        from edgeguard.convert.pipeline import convert

        kind, _, precision = label.partition("-")
        told(f"Converting the built-in model to {label}")
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(master, out, target=kind, precision=precision, profile=like.manifest.profile, name=f"{like.name}-{precision}", force=True)
    return Artifact.read(out)


def _named(label: str, work: Path, like: Artifact) -> Artifact:
    kind, _, precision = label.partition("-")
    return Artifact(work / label, replace(like.manifest, kind=cast(Kind, kind), precision=precision))


def _label(artifact: Artifact) -> str:
    return f"{artifact.kind}-{artifact.manifest.precision}"


def _largest(artifact: Artifact) -> str:
    return max(artifact.manifest.files, key=lambda name: artifact.manifest.files[name].size)
