"""Artifacts of a few bytes and a home of one's own, for tests of the store and of what stands on it."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest

from edgeguard import store
from edgeguard.architecture import Shape
from edgeguard.store import Artifact, Manifest, PrefixRecord, catalogue

SHAPE = Shape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=100, context=64, rope_theta=1e4, rms_eps=1e-5,
              tied=True)


def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not there yet, and a network that is not forbidden."""
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
    for name in ("EDGEGUARD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def make_artifact(folder: Path, kind: Any = "onnx", name: str = "test") -> Artifact:
    """A whole artifact whose weights are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = f"model.{kind}"
    (folder / weights).write_bytes(b"GGUF" + bytes(100))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "prefix-user.npz").write_bytes(b"prefix")
    files = store.records(folder)
    prefix = PrefixRecord("user", (1, 2, 3), "prefix-user.npz", files["prefix-user.npz"].sha256)
    manifest = Manifest(
        name=name, kind=kind, profile="edgeguard-mini", precision="int8", weights=weights, files=files, shape=SHAPE,
        head_ids=(3, 5, 9), prefixes=(prefix,), source={"kind": "hf"}, builder="0.1.0", types={"int8": 4}, probe={"mass": 0.9},
        gate={"agreement": 1.0}, licence="Apache-2.0",
    )
    manifest.write(folder)
    return Artifact.read(folder)


def own_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in model of a few bytes."""
    folder = tmp_path / "models" / catalogue.BUILT_IN_FOLDER
    for kind in ("onnx", "gguf"):
        make_artifact(folder / kind, kind, "mini")
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder.parent)])
    find = importlib.util.find_spec  # of all modules, and some are imported for the first time while this holds
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: spec if name == "edgeguard.models" else find(name))
    return folder
