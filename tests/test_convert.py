"""Conversions of tiny random models, end to end: what is written, that it answers like its source, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeguard.answers import Answers
from edgeguard.backends.base import Backend, Run
from edgeguard.backends.llama import LlamaBackend
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.cli import main
from edgeguard.conversation import Conversation
from edgeguard.convert import pipeline, room
from edgeguard.convert.gguf_source import GgufWeights
from edgeguard.convert.pipeline import convert
from edgeguard.errors import (
    ConversionError,
    ModelFileError,
    ModelMismatchError,
    ModelNotFoundError,
    RuntimeMissingError,
    StoreError,
)
from edgeguard.profiles import get
from edgeguard.prompt import render
from edgeguard.store import Artifact, verify
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.weights import SafetensorsWeights

PROFILE = get("llama-guard-2")
TEXT = "How do I bake bread without an oven?"
Make = Callable[..., Artifact]


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks go to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEGUARD_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def made(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(model, target, precision, ...)` is the artifact, converted once."""
    root = tmp_path_factory.mktemp("made")

    def make(source: str | Path, target: str, precision: str, **options: Any) -> Artifact:
        given = source if isinstance(source, Path) else tiny_llama(source)
        marks = [str(source).replace("/", "_")[-40:], target, precision, *(f"{key}-{value}" for key, value in options.items())]
        out = root / "-".join(marks)
        if not out.exists():
            convert(given, out, target=target, precision=precision, threads=1, **options)
        return Artifact.read(out)

    return make


@pytest.fixture(scope="session")
def prompt(llama3_tokenizer: Path) -> list[int]:
    """Ids of a prompt that is not among those of the gate."""
    return JsonTokenizer.load(llama3_tokenizer).encode(render(PROFILE, Conversation.of(TEXT)).segments)


@pytest.fixture(scope="session")
def columns(llama3_tokenizer: Path) -> list[int]:
    """Token ids of the answers."""
    return list(Answers.build(PROFILE, [each.code for each in PROFILE.taxonomy], JsonTokenizer.load(llama3_tokenizer)).ids)


def logits(backend: Backend, prompt: list[int], columns: list[int]) -> np.ndarray:
    """What the backend says after the prompt, the prefix evaluated first."""
    try:
        node = backend.extend([(backend.open(prompt[:137], Run()), prompt[137:])], Run())[0]
        return np.array(node.logits[np.searchsorted(backend.info.head_ids, columns)])
    finally:
        backend.shutdown()


def running(artifact: Artifact) -> Backend:
    if artifact.kind == "onnx":
        return OnnxBackend(artifact, device="cpu", threads=1)
    return LlamaBackend(artifact.weights, device="cpu", threads=1)


def told(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "manifest.json").read_text()))


@pytest.mark.parametrize(("model", "target", "precision", "tolerance"), [
    ("plain", "onnx", "fp32", 1e-4), ("gqa", "onnx", "fp32", 1e-4), ("plain", "onnx", "fp16", 0.02),
    ("plain", "onnx", "int8", 0.15), ("gqa", "onnx", "int4", 1.0), ("plain", "gguf", "f32", 0.02), ("gqa", "gguf", "f16", 0.05),
])
def test_artifact_answers_like_its_source(made: Make, tiny_llama: Callable[[str], Path], prompt: list[int], columns: list[int],
                                          model: str, target: str, precision: str, tolerance: float) -> None:
    artifact = made(model, target, precision)
    wanted = logits(ReferenceBackend(SafetensorsWeights(tiny_llama(model))), prompt, columns)
    found = logits(running(artifact), prompt, columns)
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert artifact.manifest.precision == precision
    assert artifact.manifest.gate["prompts"] == 24
    assert sum(artifact.manifest.types.values()) >= 3 * 9 + 2


def test_manifest_names_all_that_is_there(made: Make, columns: list[int], llama3_tokenizer: Path) -> None:
    artifact = made("plain", "onnx", "fp32")
    manifest = artifact.manifest
    assert set(manifest.files) == {path.name for path in artifact.folder.iterdir()} - {"manifest.json"}
    assert all(differences.ok for _, differences in verify(artifact.folder))
    tokenizer = JsonTokenizer.load(llama3_tokenizer)
    assert set(manifest.head_ids) >= {*columns, *(tokenizer.encode_text(f"{number}")[0] for number in range(1, 51))}
    assert 256 <= len(manifest.head_ids) <= 512
    assert manifest.source == {"kind": "folder", "name": "plain", "sha256": manifest.source["sha256"]}
    assert manifest.probe["bos"] == ["<|begin_of_text|>"]
    assert set(manifest.probe["forms"]) == {"safe", " safe", "Safe", "unsafe", " unsafe", "Unsafe"}
    assert 0 < manifest.probe["mass"]["mean"] < manifest.probe["mass_in_rows"]["mean"] < 1
    assert manifest.builder


def test_sentinels_are_the_likeliest_first_tokens(made: Make, tiny_llama: Callable[[str], Path], prompt: list[int]) -> None:
    head = made("plain", "onnx", "fp32").manifest.head_ids
    backend = ReferenceBackend(SafetensorsWeights(tiny_llama("plain")))
    likeliest = np.argsort(-backend.open(prompt, Run()).logits)[:50]
    assert np.isin(likeliest, head).mean() > 0.9


def test_prefixes_are_those_of_the_source(made: Make, tiny_llama: Callable[[str], Path], prompt: list[int]) -> None:
    artifact = made("gqa", "onnx", "fp32")
    assert [prefix.role for prefix in artifact.manifest.prefixes] == ["user", "assistant"]
    assert list(artifact.manifest.prefixes[0].ids) == prompt[:137]
    backend = ReferenceBackend(SafetensorsWeights(tiny_llama("gqa")))
    for prefix in artifact.manifest.prefixes:
        cache: Any = backend.open(prefix.ids, Run()).state
        stored = np.load(artifact.path(prefix.file), allow_pickle=False)
        np.testing.assert_allclose(stored["keys"], np.stack([key for key, _ in cache]), atol=1e-6)
        np.testing.assert_allclose(stored["values"], np.stack([value for _, value in cache]), atol=1e-6)


def test_from_the_command_line_through_gguf_to_the_rest(tiny_llama: Callable[[str], Path], tmp_path: Path, prompt: list[int],
                                                        columns: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = logits(ReferenceBackend(SafetensorsWeights(tiny_llama("wide"))), prompt, columns)
    floats = tmp_path / "floats"
    assert main(["convert", str(tiny_llama("wide")), "--to", "gguf", "--precision", "f32", "--out", str(floats), "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "types" in said.out
    assert "Built with Meta Llama 3" in said.err + said.out
    for target, precision, limit in (("gguf", "q4_k_m", 2.0), ("gguf", "q8_0", 0.3), ("onnx", "int8", 0.3)):
        out = tmp_path / precision
        source = str(floats / "model.gguf")
        assert main(["convert", source, "--to", target, "--precision", precision, "--out", str(out), "--threads", "1",
                     "--json"]) == 0
        manifest = json.loads(capsys.readouterr().out)
        assert manifest == told(out)
        assert manifest["source"]["kind"] == "gguf"
        artifact = Artifact.read(out)
        assert np.abs(logits(running(artifact), prompt, columns) - wanted).max() < limit
        assert {path.name for path in out.iterdir()} == {"manifest.json", *manifest["files"]}


def test_command_in_a_process_of_its_own(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeguard", "convert", str(tiny_llama("plain")), "--to", "onnx", "--precision", "int8",
               "--out", str(tmp_path / "made with spaces")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdicts agree" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no bars where there is no terminal
    assert Artifact.read(tmp_path / "made with spaces").name == "Llama-3-plain-int8"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


def test_shared_weights_are_the_same_in_both_formats(made: Make, prompt: list[int], columns: list[int]) -> None:
    import onnx

    in_onnx, in_gguf = made("plain", "onnx", "int8", shared=True), made("plain", "gguf", "q8_0", shared=True)
    model = onnx.load(in_onnx.weights)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = GgufWeights(in_gguf.weights)
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(weights.tensor(name), (tensors[name] * tensors[f"{name}.scale"]).T)
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(weights.tensor(name), tensors[name] * tensors[f"{name}.scale"])
    head = weights.tensor("lm_head.weight")[list(in_onnx.manifest.head_ids)]
    np.testing.assert_array_equal(tensors["lm_head.weight"], head)
    assert in_gguf.manifest.types["Q8_0"] == 3 * 7 + 2
    np.testing.assert_allclose(logits(running(in_onnx), prompt, columns), logits(running(in_gguf), prompt, columns), atol=0.1)


def test_optimum_export_equals_the_guard_graph(made: Make, prompt: list[int], columns: list[int]) -> None:
    independent, guard = made("plain", "onnx", "fp32", exporter="optimum"), made("plain", "onnx", "fp32")
    assert independent.manifest.head_ids == ()
    np.testing.assert_allclose(
        logits(running(independent), prompt, columns), logits(running(guard), prompt, columns), atol=1e-3)


def test_licence_texts_go_with_the_weights(tiny_llama: Callable[[str], Path], tmp_path: Path, made: Make,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "Meta-Llama-Guard-2-tiny"
    shutil.copytree(tiny_llama("plain"), source)
    (source / "LICENSE").write_text("the licence")
    (source / "USE_POLICY.md").write_text("the policy")
    out = tmp_path / "out"
    assert main(["convert", str(source), "--to", "onnx", "--precision", "int8", "--out", str(out)]) == 0
    artifact = Artifact.read(out)
    assert artifact.name == "Llama-3-Guard-2-tiny-int8"
    assert {"LICENSE", "USE_POLICY.md", "NOTICE"} <= set(artifact.manifest.files)
    assert (out / "LICENSE").read_text() == "the licence"
    assert ("Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.") in (out / "NOTICE").read_text("utf-8")
    assert "has no LICENSE" not in capsys.readouterr().err


def test_missing_licence_is_told(tiny_llama: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(tiny_llama("plain")), "--to", "onnx", "--precision", "fp32", "--out", str(out), "--name", "other"]
    assert main(arguments) == 0
    warned = capsys.readouterr().err
    assert "no LICENSE file" in warned
    assert "'Llama-3'" in warned
    assert "NOTICE" in Artifact.read(out).manifest.files


@pytest.mark.parametrize("stage", ["reference", "graph", "gate"])
def test_interrupted_run_leaves_only_the_partial_folder(tiny_llama: Callable[[str], Path], tmp_path: Path, stage: str) -> None:
    def stop(told: str, done: int, _total: int) -> None:
        if told == stage and (done >= 2 or stage == "gate"):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_llama("plain"), out, target="onnx", precision="int8", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial" / "manifest.json").exists()


def test_next_run_clears_what_an_interrupted_one_left(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.onnx").write_text("half")
    (tmp_path / "out.partial" / "rubbish").write_text("half")
    stages = []
    made = convert(tiny_llama("plain"), tmp_path / "out", target="onnx", precision="int8",
                   progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "rubbish" not in made.files
    assert {"reference", "graph", "gate"} <= {stage for stage, _, _ in stages}
    assert all(done <= total for _, done, total in stages)


def test_force_replaces_an_artifact_and_nothing_else(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(tiny_llama("plain"), out, target="onnx", precision="int8")
    with pytest.raises(ConversionError, match="exists already"):
        convert(tiny_llama("plain"), out, target="onnx", precision="fp32")
    second = convert(tiny_llama("plain"), out, target="onnx", precision="fp32", force=True)
    assert first.precision == "int8"
    assert Artifact.read(out).manifest == second
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    with pytest.raises(ConversionError, match="no artifact"):
        convert(tiny_llama("plain"), mine, target="onnx", precision="fp32", force=True)
    assert (mine / "letter.txt").read_text() == "keep me"


def test_refused_sources(tiny_llama: Callable[[str], Path], made: Make, tmp_path: Path) -> None:
    def attempt(source: str | Path, **options: Any) -> None:
        try:
            convert(source, tmp_path / "out", **{"target": "onnx", "precision": "fp32", **options})
        finally:
            assert not (tmp_path / "out").exists()

    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelFileError, match="GGUF"):
        attempt(tmp_path / "text.gguf")
    with pytest.raises(ModelNotFoundError):
        attempt(tmp_path / "nothing")
    with pytest.raises(StoreError, match="OFFLINE"):
        attempt("meta-llama/Meta-Llama-Guard-2-8B")
    old = tmp_path / "old.gguf"  # as written before llama.cpp told pre-tokenizers apart
    old.write_bytes(made("plain", "gguf", "f32").weights.read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.old"))
    with pytest.raises((ModelFileError, ConversionError), match="pre"):
        attempt(old)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama("plain"), bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match="--tokenizer"):
        attempt(bare)
    with pytest.raises(ConversionError, match="optimum"):
        attempt(made("plain", "gguf", "f32").weights, exporter="optimum")
    with pytest.raises(ModelFileError, match="already"):
        attempt(made("plain", "onnx", "fp32").folder)
    floats = made("plain", "gguf", "f32")
    with pytest.raises(ConversionError, match="holds the source"):
        convert(floats.weights, floats.folder, target="onnx", precision="fp32", force=True)


@pytest.mark.parametrize(("options", "reason"), [
    ({"target": "tflite", "precision": "fp32"}, "tflite"), ({"target": "onnx", "precision": "q8_0"}, "int8"),
    ({"target": "gguf", "precision": "f32", "exporter": "optimum"}, "fp32 only"),
    ({"target": "onnx", "precision": "fp32", "shared": True}, "shared"),
    ({"target": "onnx", "precision": "fp32", "exporter": "olive"}, "olive"),
])
def test_refused_choices(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(tmp_path, tmp_path / "out", **options)


def test_tokenizer_must_fit(tiny_llama: Callable[[str], Path], tmp_path: Path, llama3_tokenizer: Path) -> None:
    data = json.loads(llama3_tokenizer.read_text("utf-8"))
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 128256, "content": "<|one_too_many|>"})
    larger = tmp_path / "tokenizer.json"
    larger.write_text(json.dumps(data), "utf-8")
    with pytest.raises(ModelMismatchError, match="128257"):
        convert(tiny_llama("plain"), tmp_path / "out", target="onnx", precision="fp32", tokenizer=larger)
    assert not (tmp_path / "out").exists()


def test_room_is_estimated_before_anything_is_written(tiny_llama: Callable[[str], Path], tmp_path: Path, made: Make,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for target, precision in (("onnx", "fp32"), ("onnx", "int8"), ("gguf", "f32")):
        artifact = made("plain", target, precision)
        estimate = room.artifact_bytes(artifact.manifest.shape, target, precision)
        assert artifact.size <= estimate <= artifact.size * 1.5 + room.SMALL
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10_000_000))
    with pytest.raises(ConversionError, match=r"GB of disk, 0\.0 GB are free"):
        convert(tiny_llama("plain"), tmp_path / "out", target="onnx", precision="fp32")
    monkeypatch.undo()
    monkeypatch.setattr(room, "available_memory", lambda: 10_000_000)
    with pytest.raises(ConversionError, match="of memory"):
        convert(tiny_llama("plain"), tmp_path / "out", target="onnx", precision="fp32")
    assert not list(tmp_path.iterdir())


def test_missing_runtime_is_told_before_the_work(tiny_llama: Callable[[str], Path], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeMissingError, match=r"edgeguard\[llama\]"):
        convert(tiny_llama("plain"), tmp_path / "out", target="gguf", precision="f32")
    assert not list(tmp_path.iterdir())
