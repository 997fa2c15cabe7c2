"""Conversions that are killed and taken up again, and the memory that is measured meanwhile."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from small_model import write_small_model
from test_guard_graph import HEAD, SHAPE, RandomWeights

from edgeguard.convert import guard_graph, pieces, prefixes, resume
from edgeguard.convert.guard_graph import build
from edgeguard.convert.memory import MemoryMeter, usage
from edgeguard.convert.pipeline import convert
from edgeguard.convert.prefixes import Entry, walk
from edgeguard.convert.quantize import int4_blocks, int8_rows
from edgeguard.errors import ModelFileError
from edgeguard.store import Artifact, verify

PREFIXES: dict[Any, tuple[int, ...]] = {"user": (5, 9, 200, 31), "assistant": (5, 7)}
ENTRIES = [Entry("user", (77, 250, 3)), Entry(None, (5, 1, 2)), Entry("assistant", (8,))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path_factory.mktemp("home")))
    yield


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all but what it took to make it."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found.pop("manifest.json"))
    assert manifest.pop("conversion")["memory"]["resident"] > 0
    return {**found, "manifest.json": manifest}


@pytest.mark.parametrize(("target", "precision"), [("onnx", "int8"), ("gguf", "q8_0")])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(small: Path, tmp_path: Path, target: str, precision: str) -> None:
    def run(out: Path, number: int) -> int:
        command = [sys.executable, str(Path(__file__).with_name("killed_conversion.py")), str(small), str(out), target, precision]
        done = subprocess.run([*command, str(number)], capture_output=True, text=True, check=False)
        assert number or done.returncode == 0, done.stderr
        assert not number or done.returncode, "it ended before its end"
        return int(done.stdout or 0)

    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / "out.partial"
    events = run(whole, 0)
    assert events > 60
    moments = random.Random(precision)
    for _ in range(5):
        run(out, moments.randint(1, events // 5))
        assert not out.exists()
        if partial.exists():
            with pytest.raises(ModelFileError):
                Artifact.read(partial)
    run(out, 0)
    assert contents(out) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    assert all(differences.ok for _, differences in verify(out))


@pytest.mark.parametrize("stage", ["reference", "graph", "gate"])
def test_what_is_finished_is_not_done_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def stop(told: str, done: int, total: int) -> None:
        if told == stage and (done * 2 >= total or stage == "gate"):
            raise KeyboardInterrupt

    made: list[str] = []
    quantised = guard_graph.quantised
    monkeypatch.setattr(guard_graph, "quantised", lambda weights, name, *rest: made.append(name) or quantised(weights, name, *rest))
    monkeypatch.setattr(prefixes, "EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        convert(small, tmp_path / "out", target="onnx", precision="int8", threads=1, progress=stop)
    before = len(made)
    stages: list[str] = []
    convert(small, tmp_path / "out", target="onnx", precision="int8", threads=1, progress=lambda told, *_: stages.append(told))
    assert len(set(made)) == len(made) == 14  # every matrix once, over both runs
    assert {"reference": before == 0, "graph": 0 < before < 14, "gate": before == 14}[stage]
    assert stages.count("reference") == (2 if stage == "reference" else 1)
    assert "model.safetensors" not in stages  # hashed once
    assert "conversion" in json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.parametrize("change", ["source", "settings", "builder"])
def test_what_is_of_another_conversion_begins_anew(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    def stop(told: str, *_: int) -> None:
        if told == "gate":
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"target": "onnx", "precision": "int8"}
    with pytest.raises(KeyboardInterrupt):
        convert(small, tmp_path / "out", **settings, progress=stop)
    (tmp_path / "out.partial" / "model.onnx").write_text("of another")
    if change == "source":
        os.utime(small / "config.json")
    elif change == "settings":
        settings["precision"] = "fp32"
    else:
        monkeypatch.setattr(resume, "__version__", "another")
    stages: list[str] = []
    convert(small, tmp_path / "out", **settings, progress=lambda told, *_: stages.append(told))
    assert {"model.safetensors", "reference", "graph"} <= set(stages)
    assert all(differences.ok for _, differences in verify(tmp_path / "out"))


def test_damage_behind_a_kill_is_written_anew(tmp_path: Path) -> None:
    weights = RandomWeights(SHAPE)
    build(weights, tmp_path / "whole", precision="int8", head_ids=HEAD)
    build(weights, tmp_path / "other", precision="int8", head_ids=HEAD, identity={"of": 1})
    data = tmp_path / "other" / "model.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed[:-100])
    (tmp_path / "other" / "model.onnx").unlink()
    build(weights, tmp_path / "other", precision="int8", head_ids=HEAD, identity={"of": 1})
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Asked(RandomWeights):
    """Weights that remember what was asked for, and that can fail."""

    def __init__(self, fail: str = "") -> None:
        super().__init__(SHAPE)
        self.fail, self.asked = fail, set[str]()

    def rows(self, name: str, index: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        if self.fail and name.startswith(self.fail):
            raise KeyboardInterrupt
        self.asked.add(name)
        return super().rows(name, index)


def summary(_name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.abs(value).max(0)


def test_a_walk_goes_on_behind_its_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "EVERY", 1)
    state = tmp_path / "state"
    whole = walk(Asked(), PREFIXES, ENTRIES, observer=summary)
    with pytest.raises(KeyboardInterrupt):
        walk(Asked("model.layers.1.mlp"), PREFIXES, ENTRIES, observer=summary, state=state, identity="a")
    again = walk(rest := Asked(), PREFIXES, ENTRIES, observer=summary, state=state, identity="a")
    assert not any("layers.0." in name for name in rest.asked)
    np.testing.assert_array_equal(again.logits, whole.logits)
    for role, both in whole.keys_values.items():
        np.testing.assert_array_equal(again.keys_values[role], both)
    assert again.observed.keys() == whole.observed.keys()
    assert all((again.observed[name] == value).all() for name, value in whole.observed.items())


@pytest.mark.parametrize("change", ["identity", "damage", "questions"])
def test_a_state_that_does_not_fit_is_not_taken_up(tmp_path: Path, change: str) -> None:
    state = tmp_path / "state"
    whole = walk(Asked(), PREFIXES, ENTRIES, state=state, identity="a")
    if change == "damage":
        bytes_ = bytearray(state.read_bytes())
        bytes_[len(bytes_) // 2] ^= 1
        state.write_bytes(bytes_)
    entries = ENTRIES[::-1] if change == "questions" else ENTRIES
    again = walk(weights := Asked(), PREFIXES, entries, state=state, identity="b" if change == "identity" else "a")
    assert any("layers.0." in name for name in weights.asked)
    np.testing.assert_array_equal(again.logits[0], whole.logits[-1 if change == "questions" else 0])


def test_an_observer_sees_what_the_artifact_evaluates(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    walked = walk(Asked(), PREFIXES, ENTRIES, observer=lambda name, value: seen.setdefault(name, value.shape) and summary(name, value))
    widths = {"self_attn.q_proj": 64, "self_attn.o_proj": 64, "mlp.gate_proj": 64, "mlp.down_proj": 96}
    behind = sum(len(entry.ids) for entry in ENTRIES if entry.prefix)
    assert seen == {f"model.layers.{layer}.{name}": (behind, width) for layer in range(2) for name, width in widths.items()}
    assert {name: len(value) for name, value in walked.observed.items()} == {name: shape[1] for name, shape in seen.items()}


@pytest.mark.parametrize("quantise", [int8_rows, int4_blocks])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_quantise_like_the_whole(quantise: Callable[..., Any], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, name = RandomWeights(SHAPE), "model.layers.0.mlp.down_proj.weight"
    monkeypatch.setattr(pieces, "QUANTISED", 7 * 96)
    whole, parts = quantise(name, weights.tensor(name)), pieces.quantised(weights, name, quantise, threads)
    assert type(parts) is type(whole)
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.scales, whole.scales)
    assert parts.values.dtype == whole.values.dtype


def test_memory_is_measured_and_peaks_are_kept() -> None:
    with MemoryMeter({"anonymous": None, "resident": 7}) as meter:
        before = meter.look()
        held = np.ones(30 << 20, np.uint8)
        during = meter.look()
        del held
    assert during["resident"] >= before["resident"] + (20 << 20)  # type: ignore[operator]
    if before["anonymous"] is not None:
        assert during["anonymous"] >= before["anonymous"] + (20 << 20)  # type: ignore[operator]
    with MemoryMeter({"anonymous": 1 << 60, "resident": 1 << 60}) as later:
        pass
    assert (later.anonymous, later.resident) == (1 << 60, 1 << 60)


def test_mapped_files_are_not_anonymous(tmp_path: Path) -> None:
    process, path = psutil.Process(), tmp_path / "file"
    path.write_bytes(bytes(40 << 20))
    before = usage(process)
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped[::4096].sum() == 0
    after = usage(process)
    assert after[0] >= before[0] + (30 << 20)
    if after[1] is not None and before[1] is not None:
        assert after[1] < before[1] + (10 << 20)
