"""The GPU check on a CPU: what it refuses, and that it compares, places and times; a small random model stands for the real one."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_model import write_small_model

from edgeguard.bench import gpu_cells, gpu_check
from edgeguard.bench.artifacts import Measured
from edgeguard.bench.gpu_cells import Check, Limit, card, placement
from edgeguard.bench.page import page
from edgeguard.bench.prompts import Prompts
from edgeguard.bench.result import read_result
from edgeguard.cli import main
from edgeguard.convert.pipeline import convert
from edgeguard.errors import DeviceError, InferenceError, ModelNotFoundError
from edgeguard.guard import Guard
from edgeguard.store import Artifact, write_text

QUIET = Console(quiet=True)
CPU = "CPUExecutionProvider"
BOTH = {"onnx": "", "llama": ""}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small") / "source")


@pytest.fixture(scope="module")
def artifact(source: Path) -> Artifact:
    convert(source, source.parent / "onnx-fp16", target="onnx", precision="fp16")
    return Artifact.read(source.parent / "onnx-fp16")


@pytest.fixture(autouse=True)
def few_texts_and_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cells, "SHORT", 3)
    monkeypatch.setattr(gpu_cells, "LONG", ((64, 1),))
    monkeypatch.setattr(gpu_cells, "card", lambda: None)


def measured(artifact: Artifact) -> Measured:
    return Measured("small", {"onnx-fp16": artifact}, {}, "")


def test_without_cuda_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "_onnx_reason", lambda: "only a CPU")
    monkeypatch.setattr(gpu_check, "_llama_reason", lambda: "built for CPUs")
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "nothing was run" in err and "onnx: only a CPU; llama: built for CPUs" in err
    assert not (tmp_path / "out").exists()


def test_one_runtime_with_cuda_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_onnx_reason", lambda: "")
    monkeypatch.setattr(gpu_check, "_llama_reason", lambda: "built for CPUs")
    assert gpu_check.usable() == {"onnx": "", "llama": "built for CPUs"}


def test_a_runtime_for_cpus_says_what_is_lacking() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    assert "onnxruntime-gpu has to take its place" in gpu_check._onnx_reason()


def test_what_lacks_is_made_from_the_source(source: Path, artifact: Artifact, tmp_path: Path) -> None:
    found = gpu_check.gather(str(artifact.folder), str(source), "llama-guard-2", tmp_path, {"onnx": "", "llama": "none"}, QUIET)
    assert set(found.found) == {"onnx-fp16", "onnx-int4"}, "nothing is made for a runtime that cannot use it"
    assert found.found["onnx-int4"].manifest.profile == "llama-guard-2"
    again = gpu_check.gather(str(artifact.folder), None, "llama-guard-2", tmp_path, {"onnx": "", "llama": "none"}, QUIET)
    assert set(again.found) == {"onnx-fp16", "onnx-int4"} and not again.missing, "what was made is used again"


def test_what_cannot_be_made_is_named(artifact: Artifact, tmp_path: Path) -> None:
    found = gpu_check.gather(str(artifact.folder), None, "llama-guard-2", tmp_path, {"onnx": "", "llama": "none"}, QUIET)
    assert set(found.found) == {"onnx-fp16"} and "--source" in found.missing["onnx-int4"]
    result = gpu_check.check(found, {"onnx": "no CUDA", "llama": ""}, "cuda", 1, QUIET)
    assert [(cell["measured"], cell["reason"]) for cell in result["cells"]] == [
        (False, found.missing["onnx-int4"]), (False, "no CUDA")]
    only_int8 = artifact.folder.parent / "int8"
    only_int8.mkdir()
    replace(artifact.manifest, precision="int8").write(only_int8)
    for file in artifact.manifest.files:
        (only_int8 / file).symlink_to(artifact.folder / file)
    with pytest.raises(ModelNotFoundError, match="no artifact that a GPU runs"):
        gpu_check.gather(str(only_int8), None, "llama-guard-2", tmp_path / "none", BOTH, QUIET)


def test_a_device_that_agrees_meets_its_limits(artifact: Artifact) -> None:
    result = gpu_check.check(measured(artifact), BOTH, "cpu", 1, QUIET, timed=False)
    assert all(target["met"] for target in result["targets"]), result["targets"]
    by_id = {cell["id"]: cell for cell in result["cells"]}
    scores = by_id["gpu/onnx-fp16/scores-against-the-CPUs"]
    assert scores["p50"] == 0 and scores["extra"]["texts"] == len(scores["samples"]) == 8
    assert by_id["gpu/onnx-fp16/nodes"]["p50"] == 1 and by_id["gpu/onnx-fp16/nodes"]["extra"]["nodes"][CPU] > 10
    assert "nvidia-smi" in by_id["gpu/onnx-fp16/memory"]["reason"]


def test_scores_that_differ_fail(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Guard.check_many

    def moved(self: Guard, *args: Any, **named: Any) -> Any:
        return [replace(each, score=min(1.0, each.score + 0.05)) for each in real(self, *args, **named)]

    monkeypatch.setattr(Guard, "check_many", moved)
    result = gpu_check.check(measured(artifact), BOTH, "cpu", 1, QUIET, timed=False)
    failed = [target["what"] for target in result["targets"] if not target["met"]]
    assert failed == ["onnx-fp16: largest difference, scores in a pack against alone"]
    gpu_check.tell(result)
    assert "not met" in capsys.readouterr().out


def test_a_verdict_near_the_threshold_may_turn_and_others_not(artifact: Artifact) -> None:
    check = Check("x", artifact, Prompts(measured(artifact)), "cpu", 1)
    with Guard.load(artifact.folder, device="cpu") as guard:
        verdict = guard.check("Hello.")
    near, far = replace(verdict, score=0.49, verdict="safe"), replace(verdict, score=0.3, verdict="safe")
    unsafe = replace(verdict, score=0.51, verdict="unsafe")
    cell = check._compared("scores", [near, far], [unsafe, unsafe], 0.03)
    assert (cell.extra["verdicts_differ"], cell.extra["beyond_doubt"]) == (2, 1)
    assert [target["met"] for target in check.targets] == [False, False]


def test_an_artifact_that_fails_is_a_target_that_is_not_met(artifact: Artifact) -> None:
    result = gpu_check.check(measured(artifact), BOTH, "cuda", 1, QUIET)
    (cell,) = result["cells"]
    assert not cell["measured"] and "cuda" in cell["reason"]
    assert [target["met"] for target in result["targets"]] == [False]


def test_times_are_taken_and_shown(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cells, "LENGTHS", ((23, 2),))
    monkeypatch.setattr(gpu_cells, "PACKS", (1, 2))

    result = gpu_check.check(measured(artifact), BOTH, "cpu", 1, QUIET)
    counts = {cell["id"]: len(cell["samples"]) for cell in result["cells"] if cell["unit"] == "s"}
    assert counts == {"gpu/onnx-fp16/length/23/safe": 2, "gpu/onnx-fp16/length/23/unsafe": 2, "gpu/onnx-fp16/packed/1": 3,
                      "gpu/onnx-fp16/packed/2": 3}
    write_text(tmp_path / "result.json", json.dumps(result))
    shown = page(read_result(tmp_path / "result.json"))
    assert "time to verdict" in shown.lower() and "gpu/onnx-fp16/packed/2" in shown


def test_the_graph_s_nodes_are_counted_by_provider(artifact: Artifact, tmp_path: Path) -> None:
    assert placement(artifact.weights, [CPU]).keys() == {CPU}
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(InferenceError, match="does not say where"):
        placement(tmp_path / "broken.onnx", [CPU])


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("said", "status", "used"), [
    ("Card X, 550.1, 1024", 0, 1024 << 20), ("Card X, 550.1, [N/A]", 0, None), ("", 9, None)])
def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, status: int, used: int | None) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = card()
    assert (found.used if found else None) == used


def test_every_precision_that_is_made_has_limits() -> None:
    assert {label.partition("-")[2] for label in gpu_check.MADE} <= gpu_cells.LIMITS.keys()
    assert "int8" not in gpu_cells.LIMITS, "its kernels are the CPU's"
    assert all(limit.packed <= limit.device for limit in gpu_cells.LIMITS.values() if isinstance(limit, Limit))


def test_a_missing_runtime_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(DeviceError, match=r"onnxruntime-gpu is not installed.*llama-cpp-python"):
        gpu_check.usable()
