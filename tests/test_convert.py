"""Conversions of small random models, end to end: what is written, that it answers like its source, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_model import write_small_model

from edgeguard.answers import Answers
from edgeguard.architecture import Shape
from edgeguard.backends.base import Backend, Run
from edgeguard.backends.llama import LlamaBackend
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.cli import main
from edgeguard.conversation import Conversation
from edgeguard.convert import pipeline, resume, room
from edgeguard.convert.cli import STAGES, plain_stages, span
from edgeguard.convert.gguf_source import GgufWeights
from edgeguard.convert.pipeline import convert
from edgeguard.convert.questions import questions_of
from edgeguard.convert.source import open_source
from edgeguard.errors import (
    ConversionError,
    ModelFileError,
    ModelMismatchError,
    ModelNotFoundError,
    RuntimeMissingError,
    StoreError,
)
from edgeguard.guard import Guard
from edgeguard.prefix import role_prefixes
from edgeguard.profiles import get
from edgeguard.prompt import render
from edgeguard.store import Artifact, verify
from edgeguard.store.files import locked
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.weights import SafetensorsWeights

PROFILE = get("llama-guard-2")
LLAMA_GUARD_2 = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, context=8192,
                      rope_theta=500000.0, rms_eps=1e-5, tied=False)
TEXT = "How do I bake bread without an oven?"
Make = Callable[..., Artifact]


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks go to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEGUARD_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a vocabulary of a thousand tokens."""
    return write_small_model(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="session")
def sources(small: Path, tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by name: the small one, the same with a tied head, and tiny ones with the vocabulary of Llama 3."""
    tied = write_small_model(tmp_path_factory.mktemp("source") / "tied", 1, tied=True)
    return lambda name: {"small": small, "tied": tied}.get(name) or tiny_llama(name)


@pytest.fixture(scope="session")
def made(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(source, target, precision, ...)` is the artifact, converted once."""
    root = tmp_path_factory.mktemp("made")

    def make(source: str, target: str, precision: str, **options: Any) -> Artifact:
        out = root / "-".join([source, target, precision, *(f"{key}-{value}" for key, value in options.items())])
        if not out.exists():
            convert(sources(source), out, target=target, precision=precision, threads=1, **options)
        return Artifact.read(out)

    return make


class Asked:
    """A prompt that is not among those of the gate, and what is compared."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = JsonTokenizer.load(tokenizer)
        self.ids = self.tokenizer.encode(render(PROFILE, Conversation.of(TEXT)).segments)
        self.prefix = len(role_prefixes(PROFILE, self.tokenizer)["user"])
        self.columns = Answers.build(PROFILE, [each.code for each in PROFILE.taxonomy], self.tokenizer).ids

    def logits(self, backend: Backend) -> np.ndarray:
        """Of the answers after the prompt, its prefix evaluated first."""
        try:
            root = backend.open(self.ids[: self.prefix], Run())
            node = backend.extend([(root, self.ids[self.prefix :])], Run())[0]
            return np.array(node.logits[np.searchsorted(backend.info.head_ids, self.columns)])
        finally:
            backend.shutdown()

    def wanted(self, folder: Path) -> np.ndarray:
        """By the reference."""
        return self.logits(ReferenceBackend(SafetensorsWeights(folder)))


@pytest.fixture(scope="session")
def asked(sources: Callable[[str], Path]) -> Callable[[str], Asked]:
    """By the name of the source."""
    return functools.cache(lambda name: Asked(sources(name) / "tokenizer.json"))


def running(artifact: Artifact) -> Backend:
    if artifact.kind == "onnx":
        return OnnxBackend(artifact, device="cpu", threads=1)
    return LlamaBackend(artifact.weights, device="cpu", threads=1)


@pytest.mark.parametrize(("source", "target", "precision", "tolerance"), [
    ("plain", "onnx", "fp32", 1e-4), ("tied", "onnx", "fp32", 1e-4), ("small", "onnx", "fp16", 0.02), ("small", "onnx", "int8", 0.2),
    ("tied", "onnx", "int4", 1.0), ("plain", "gguf", "f32", 1e-3), ("small", "gguf", "f16", 0.05), ("tied", "gguf", "bf16", 0.2),
])
def test_artifact_answers_like_its_source(made: Make, sources: Callable[[str], Path], asked: Callable[[str], Asked], source: str,
                                          target: str, precision: str, tolerance: float) -> None:
    artifact = made(source, target, precision)
    found = asked(source).logits(running(artifact))
    np.testing.assert_allclose(found, asked(source).wanted(sources(source)), atol=tolerance)
    assert artifact.manifest.precision == precision
    assert artifact.manifest.gate["prompts"] == 24
    assert sum(artifact.manifest.types.values()) >= 9 * artifact.manifest.shape.layers + 2


def test_manifest_names_all_that_is_there(made: Make, asked: Callable[[str], Asked]) -> None:
    artifact = made("plain", "onnx", "fp32")
    manifest = artifact.manifest
    assert set(manifest.files) == {path.name for path in artifact.folder.iterdir()} - {"manifest.json"}
    assert all(differences.ok for _, differences in verify(artifact.folder))
    numbers = {asked("plain").tokenizer.encode_text(f"{number}")[0] for number in range(1, 51)}
    assert set(manifest.head_ids) >= {*asked("plain").columns, *numbers}
    assert len(manifest.head_ids) > 256
    assert manifest.source == {"kind": "folder", "name": "plain", "sha256": manifest.source["sha256"]}
    assert manifest.probe["bos"] == ["<|begin_of_text|>"]
    assert set(manifest.probe["forms"]) == {"safe", " safe", "Safe", "unsafe", " unsafe", "Unsafe"}
    assert 0 < manifest.probe["mass"]["mean"] < manifest.probe["mass_in_rows"]["mean"] < 1
    assert manifest.builder


def test_sentinels_are_the_likeliest_first_tokens(made: Make, sources: Callable[[str], Path], asked: Callable[[str], Asked]) -> None:
    head = made("plain", "onnx", "fp32").manifest.head_ids
    backend = ReferenceBackend(SafetensorsWeights(sources("plain")))
    likeliest = np.argsort(-backend.open(asked("plain").ids, Run()).logits)[:50]
    assert np.isin(likeliest, head).mean() > 0.9


def test_prefixes_are_those_of_the_source(made: Make, sources: Callable[[str], Path], asked: Callable[[str], Asked]) -> None:
    artifact = made("tied", "onnx", "fp32")
    assert [prefix.role for prefix in artifact.manifest.prefixes] == ["user", "assistant"]
    assert list(artifact.manifest.prefixes[0].ids) == asked("tied").ids[: asked("tied").prefix]
    backend = ReferenceBackend(SafetensorsWeights(sources("tied")))
    for prefix in artifact.manifest.prefixes:
        cache: Any = backend.open(prefix.ids, Run()).state
        stored = np.load(artifact.path(prefix.file), allow_pickle=False)
        np.testing.assert_allclose(stored["keys"], np.stack([key.swapaxes(0, 1) for key, _ in cache]), atol=1e-5)
        np.testing.assert_allclose(stored["values"], np.stack([value.swapaxes(0, 1) for _, value in cache]), atol=1e-5)


def test_guard_judges_by_a_converted_model(made: Make) -> None:
    for target, precision in (("onnx", "int8"), ("gguf", "f16")):
        with Guard.load(made("small", target, precision).folder, threads=1) as guard:
            both = [guard.check(TEXT), guard.check([{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Use a pan."}])]
        assert [verdict.role for verdict in both] == ["user", "assistant"]
        assert all(0 < verdict.score < 1 for verdict in both)


def test_from_the_command_line_through_gguf_to_the_rest(small: Path, tmp_path: Path, asked: Callable[[str], Asked],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    def run(source: Path, target: str, precision: str, *rest: str) -> str:
        arguments = ["convert", str(source), "--to", target, "--precision", precision, "--out", str(tmp_path / precision)]
        assert main([*arguments, "--threads", "1", *rest]) == 0
        return capsys.readouterr().out

    wanted = asked("small").wanted(small)
    summary = run(small, "gguf", "f32")
    assert "21 F32" in summary
    assert "Built with Meta Llama 3" in summary
    for target, precision, limit in (("gguf", "q4_k_m", 1.0), ("gguf", "q8_0", 0.2), ("onnx", "int8", 0.2)):
        manifest = json.loads(run(tmp_path / "f32" / "model.gguf", target, precision, "--json"))
        out = tmp_path / precision
        assert manifest == json.loads((out / "manifest.json").read_text())
        assert manifest["source"]["kind"] == "gguf"
        assert np.abs(asked("small").logits(running(Artifact.read(out))) - wanted).max() < limit
        assert {path.name for path in out.iterdir()} == {"manifest.json", *manifest["files"]}
    assert Artifact.read(tmp_path / "q4_k_m").manifest.types["Q4_K"] > 5


def test_command_in_a_process_of_its_own(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeguard", "convert", str(small), "--to", "onnx", "--precision", "int8",
               "--out", str(tmp_path / "made with spaces"), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdicts agree" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no bars where there is no terminal
    for stage in STAGES["reference"], STAGES["graph"], STAGES["gate"]:
        assert done.stderr.count(f"edgeguard: {stage}\n") == 1
    assert Artifact.read(tmp_path / "made with spaces").name == "Llama-3-small-int8"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(("source", "in_onnx", "in_gguf"), [("small", "int8", "q8_0"), ("tied", "int4", "q4_0")])
def test_shared_weights_are_the_same_in_both_formats(made: Make, asked: Callable[[str], Asked], source: str, in_onnx: str,
                                                     in_gguf: str) -> None:
    import onnx

    one, other = made(source, "onnx", in_onnx, shared=True), made(source, "gguf", in_gguf, shared=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(one.weights).graph.initializer}
    weights = GgufWeights(other.weights)
    head = weights.tensor("model.embed_tokens.weight" if source == "tied" else "lm_head.weight")[list(one.manifest.head_ids)]
    np.testing.assert_array_equal(tensors["lm_head.weight"], head)
    down = "model.layers.1.mlp.down_proj.weight"
    if in_onnx == "int8":
        columns = [tensor for name, tensor in tensors.items() if name.startswith(f"{down}.") and tensor.dtype == np.int8]
        stored = (np.concatenate(columns) * tensors[f"{down}.scale"]).T
    else:
        halves = np.stack([tensors[down] & 15, tensors[down] >> 4], -1).reshape(*tensors[down].shape[:2], 32)
        stored = ((halves.astype(np.float32) - 8) * tensors[f"{down}.scale"][:, :, None]).reshape(len(halves), -1)
    np.testing.assert_array_equal(weights.tensor(down), stored)
    # the embedding has 16 bits in one and 8 in the other, activations are rounded by token in one and by block in the other
    np.testing.assert_allclose(asked(source).logits(running(one)), asked(source).logits(running(other)), atol=0.4)


def test_optimum_export_equals_the_guard_graph(made: Make, asked: Callable[[str], Asked]) -> None:
    independent, guard = made("small", "onnx", "fp32", exporter="optimum"), made("small", "onnx", "fp32")
    assert independent.manifest.head_ids == ()
    np.testing.assert_allclose(asked("small").logits(running(independent)), asked("small").logits(running(guard)), atol=1e-3)


def test_licence_texts_go_with_the_weights(small: Path, tmp_path: Path, made: Make,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "Meta-Llama-Guard-2-tiny"
    shutil.copytree(small, source)
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


def test_missing_licence_is_told(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(small), "--to", "onnx", "--precision", "fp32", "--out", str(out), "--name", "other"]
    assert main(arguments) == 0
    warned = capsys.readouterr().err
    assert "no LICENSE file" in warned
    assert "'Llama-3'" in warned
    assert "NOTICE" in Artifact.read(out).manifest.files


@pytest.mark.parametrize("stage", ["reference", "graph", "gate"])
def test_interrupted_run_leaves_only_the_partial_folder(small: Path, tmp_path: Path, stage: str) -> None:
    def stop(told: str, done: int, _total: int) -> None:
        if told == stage and (done >= 2 or stage == "gate"):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(small, out, target="onnx", precision="int8", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial" / "manifest.json").exists()


def test_next_run_clears_what_an_interrupted_one_left(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.onnx").write_text("half")
    (tmp_path / "out.partial" / "rubbish").mkdir()
    (tmp_path / "out.partial" / resume.STAGES).write_text("half")
    stages = []
    made = convert(small, tmp_path / "out", target="onnx", precision="int8",
                   progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "rubbish" not in made.files
    assert {"reference", "graph", "gate"} <= {stage for stage, _, _ in stages}
    assert all(done <= total for _, done, total in stages)


def test_force_replaces_an_artifact_and_nothing_else(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(small, out, target="onnx", precision="int8")
    with pytest.raises(ConversionError, match="exists already"):
        convert(small, out, target="onnx", precision="fp32")
    second = convert(small, out, target="onnx", precision="fp32", force=True)
    assert first.precision == "int8"
    assert Artifact.read(out).manifest == second
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    with pytest.raises(ConversionError, match="no artifact"):
        convert(small, mine, target="onnx", precision="fp32", force=True)
    assert (mine / "letter.txt").read_text() == "keep me"


def test_refused_sources(small: Path, made: Make, tmp_path: Path) -> None:
    def attempt(source: str | Path, **options: Any) -> None:
        try:
            convert(source, tmp_path / "out", **{"target": "onnx", "precision": "fp32", **options})
        finally:
            assert not (tmp_path / "out").exists()

    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelFileError, match="GGUF"):
        attempt(tmp_path / "text.gguf")
    for nothing in (tmp_path / "nothing", "nothing", ""):
        with pytest.raises(ModelNotFoundError, match="to convert"):
            attempt(nothing)
    with pytest.raises(StoreError, match="OFFLINE"):
        attempt("meta-llama/Meta-Llama-Guard-2-8B")
    old = tmp_path / "old.gguf"  # as written before llama.cpp told pre-tokenizers apart
    old.write_bytes(made("small", "gguf", "f32").weights.read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.old"))
    with pytest.raises((ModelFileError, ConversionError), match="pre"):
        attempt(old)
    bare = tmp_path / "bare"
    shutil.copytree(small, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match="--tokenizer"):
        attempt(bare)
    with pytest.raises(ConversionError, match="optimum"):
        attempt(made("small", "gguf", "f32").weights, exporter="optimum")
    with pytest.raises(ModelNotFoundError, match="kind onnx"):
        attempt(made("small", "onnx", "fp32").folder)
    floats = made("small", "gguf", "f32")
    with pytest.raises(ConversionError, match="holds the source"):
        convert(floats.weights, floats.folder, target="onnx", precision="fp32", force=True)


@pytest.mark.parametrize(("options", "reason"), [
    ({"target": "tflite", "precision": "fp32"}, "tflite"), ({"target": "onnx", "precision": "q8_0"}, "int8"),
    ({"target": "gguf", "precision": "f32", "exporter": "optimum"}, "fp32 only"),
    ({"target": "onnx", "precision": "fp32", "shared": True}, "shared"),
    ({"target": "onnx", "precision": "fp32", "exporter": "olive"}, "olive"),
    *(({"target": "onnx", "precision": "fp32", "name": name}, "not a name") for name in ("../x", "", "a b", "a\n", "x" * 129)),
])
def test_refused_choices(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_target_must_be_a_folder_of_its_own(tmp_path: Path, out: str) -> None:
    with pytest.raises(ConversionError, match="new folder"):
        convert(tmp_path, out, target="onnx", precision="fp32", force=True)


def test_target_is_no_link_and_nothing_of_others_is_removed(small: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    with pytest.raises(ConversionError, match="is a link"):
        convert(small, tmp_path / "link", target="onnx", precision="fp32", force=True)
    for name in ("out.partial", "out.replaced.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary.txt").write_text("mine")
        with pytest.raises(ConversionError, match=rf"{name} is in the way"):
            convert(small, tmp_path / "out", target="onnx", precision="fp32", force=True)
        assert (tmp_path / name / "diary.txt").read_text() == "mine"
        (tmp_path / name).rename(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "elsewhere")


def test_target_that_another_process_makes_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(pipeline._lock(out)), pytest.raises(StoreError, match=re.escape(f"working on {out};")):
        convert(tmp_path, out, target="onnx", precision="fp32")


def test_tokenizer_must_fit(small: Path, tmp_path: Path, llama3_tokenizer: Path) -> None:
    with pytest.raises(ModelMismatchError, match="128256"):
        convert(small, tmp_path / "out", target="onnx", precision="fp32", tokenizer=llama3_tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "target", "precision", "options"), [
    ("plain", "onnx", "fp32", {}), ("small", "onnx", "int8", {}), ("tied", "onnx", "int4", {}), ("plain", "gguf", "f32", {}),
    ("small", "gguf", "f16", {}), ("tied", "gguf", "q4_0", {"shared": True}),
])
def test_disk_need_is_the_size_of_the_artifact(made: Make, sources: Callable[[str], Path], source: str, target: str, precision: str,
                                               options: dict[str, Any]) -> None:
    artifact = made(source, target, precision, **options)
    plan = pipeline.Plan(open_source(sources(source)), artifact.folder, artifact.kind, precision, PROFILE, artifact.name,
                         "guard", options.get("shared", False), 1)
    needed = pipeline.needs(plan, questions_of(plan.source, plan.kind, plan.profile))
    found = sum(path.stat().st_size for path in artifact.folder.iterdir())
    assert needed.artifact == pytest.approx(found, rel=0.02)
    assert needed.disk >= needed.artifact


@pytest.mark.parametrize(("target", "precision", "strength"), [
    ("onnx", "int8", 0.55), ("gguf", "q8_0", 0.55), ("gguf", "q4_k_m", 0.55), ("onnx", "int4", 0.4), ("gguf", "q4_0", 0.4),
])
def test_how_much_of_the_outliers_weights_take_over(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str,
                                                    precision: str, strength: float) -> None:
    def stop(_weights: object, _observed: object, given: float) -> None:
        raise ConversionError(f"smoothed with {given}")

    monkeypatch.setattr(pipeline, "SmoothedWeights", stop)
    with pytest.raises(ConversionError, match=f"smoothed with {strength}$"):
        convert(small, tmp_path / "out", target=target, precision=precision)


def test_room_is_checked_before_anything_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    stages: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ConversionError, match=r"needs about \d+ MB of disk, 1 MB are free at .*: \d+ MB are missing"):
        convert(small, tmp_path / "out", target="onnx", precision="fp32", tell=told.append)
    monkeypatch.undo()
    monkeypatch.setattr(room, "available_memory", lambda: 10_000_000)
    with pytest.raises(ConversionError, match=r"of memory, 10 MB are free"):
        convert(small, tmp_path / "out", target="onnx", precision="fp32", tell=told.append)
    assert not list(tmp_path.iterdir())
    assert not told
    monkeypatch.undo()
    convert(small, tmp_path / "out", target="onnx", precision="fp32", progress=lambda stage, *_: stages.append(stage),
            tell=lambda sentence: told.append(sentence) or stages.append("told"))  # type: ignore[func-returns-value]
    assert stages[0] == "told"
    assert re.search(r"needs \d+ MB of disk at .* free\) and about \d+ MB of memory", told[0])


def test_8b_is_converted_in_less_than_4_gib() -> None:
    for kind, precision in (("onnx", "int8"), ("onnx", "int4"), ("onnx", "fp16"), ("onnx", "fp32"), ("gguf", "q4_k_m"), ("gguf", "bf16")):
        assert room.needs(LLAMA_GUARD_2, kind, precision, room.Contents(), tokens=4000).memory < 4 << 30


def test_long_stages_tell_share_and_time_left() -> None:
    stream, clock = io.StringIO(), iter([0.0, 5.0, 30.0, 40.0, 100.0, 101.0])
    report = plain_stages(stream, lambda: next(clock))
    for done in (10, 20, 40, 50, 90, 100):  # ten were done by an earlier run
        report("reference", done, 100)
    assert stream.getvalue().splitlines() == [
        f"edgeguard: {STAGES['reference']}", f"edgeguard: {STAGES['reference']}: 40%, about 60 s left",
        f"edgeguard: {STAGES['reference']}: 90%, about 12 s left",
    ]
    assert [span(seconds) for seconds in (5, 99, 100, 5000, 7200)] == ["5 s", "99 s", "2 min", "83 min", "2.0 h"]


def test_missing_runtime_is_told_before_the_work(small: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeMissingError, match=r"edgeguard\[llama\]"):
        convert(small, tmp_path / "out", target="gguf", precision="f32")
    assert not list(tmp_path.iterdir())


def test_an_artifact_converted_further_keeps_one_licence_prefix() -> None:
    from edgeguard.convert.notices import artifact_name

    assert artifact_name("llama-guard-2", "Llama-3-Guard-2-8B", "int8") == "Llama-3-Guard-2-8B-int8"
    assert artifact_name("llama-guard-2", "meta-llama/Meta-Llama-Guard-2-8B", "int8") == "Llama-3-Guard-2-8B-int8"
