"""A guard graph run piece by piece answers with the bits of the whole graph, one session at a time, and leaves nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import write_small_model

from edgeguard.backends.base import Run
from edgeguard.backends.keys_values import keys_and_values
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.convert import gate, gate_pieces, pipeline, room
from edgeguard.convert.questions import Questions
from edgeguard.errors import ModelFileError
from edgeguard.store import Artifact, Manifest

PRECISIONS = ("fp32", "fp16", "int8", "int4")
Converted = Callable[[str], tuple[Artifact, Questions]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The artifact of a precision, and what its gate asks."""
    root = tmp_path_factory.mktemp("pieces")
    source, made = write_small_model(root / "source"), dict[str, tuple[Artifact, Questions]]()

    def of(precision: str) -> tuple[Artifact, Questions]:
        if precision not in made:
            asked: list[Questions] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("EDGEGUARD_HOME", str(root / "home"))
                questions_of = pipeline.questions_of
                patch.setattr(pipeline, "questions_of", lambda *given: asked.append(questions_of(*given)) or asked[0])
                pipeline.convert(source, root / precision, target="onnx", precision=precision, threads=1)
            made[precision] = Artifact.read(root / precision), asked[0]
        return made[precision]

    return of


def whole(artifact: Artifact, questions: Questions) -> np.ndarray:
    backend = OnnxBackend(artifact, device="cpu", threads=1)
    return gate.answers_of(backend, questions.prefixes, questions.entries, artifact.manifest.head_ids)


class Counted(gate_pieces.Session):
    """Sessions that refuse to be loaded while another one lives."""

    loaded: list[weakref.ref[Any]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        assert not [ref for ref in self.loaded if ref() is not None]
        super().__init__(*arguments, **options)
        self.loaded.append(weakref.ref(self))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    loaded: list[weakref.ref[Any]] = []
    monkeypatch.setattr(Counted, "loaded", loaded, raising=False)
    monkeypatch.setattr(gate_pieces, "Session", Counted)
    return loaded


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("weights", "least"), [(1, 14), (300_000, 3)])
def test_pieces_give_the_bits_of_the_whole(precision: str, weights: int, least: int, converted: Converted, monkeypatch: pytest.MonkeyPatch,
                                           sessions: list[weakref.ref[Any]]) -> None:
    """Cut before every tensor, and after some."""
    artifact, questions = converted(precision)
    evaluate, told = gate_pieces.evaluate, list[tuple[str, int, int]]()
    monkeypatch.setattr(gate_pieces, "evaluate", lambda *given: evaluate(*given, weights=weights))
    rows = artifact.manifest.head_ids
    found = gate_pieces.answers_of(artifact, questions.entries, rows, 1, lambda *each: told.append(each))
    np.testing.assert_array_equal(found, whole(artifact, questions))
    assert len(sessions) >= least
    assert told == [("gate", done + 1, len(sessions)) for done in range(len(sessions))]
    assert not (artifact.folder / gate_pieces.MODEL).exists()
    few = gate_pieces.answers_of(artifact, questions.entries[:2], rows[3:9:2], 1)
    np.testing.assert_array_equal(few, found[:2, 3:9:2])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_whole_prompts_and_prefixes_in_pieces(precision: str, converted: Converted) -> None:
    artifact, questions = converted(precision)
    backend, ids = OnnxBackend(artifact, device="cpu", threads=1), [*range(40, 100), *range(7)]
    node = backend.open(ids, Run())
    found = gate_pieces.answers_of(artifact, [gate_pieces.Entry(None, tuple(ids)), *questions.entries[:1]], artifact.manifest.head_ids, 1)
    np.testing.assert_array_equal(found[0], node.logits)
    for mine, wanted in zip(gate_pieces.keys_and_values(artifact, ids, 1), keys_and_values(node), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_pieces_hold_no_more_than_they_may(converted: Converted) -> None:
    import onnx

    artifact, _ = converted("int8")
    graph = onnx.load(str(artifact.weights), load_external_data=False).graph
    sizes = {tensor.name: sum(int(each.value) for each in tensor.external_data if each.key == "length") for tensor in graph.initializer}
    pieces = list(gate_pieces.cut(graph, ["logits"], 300_000))
    for piece in pieces:
        held = [sizes[name] for name in {name for node in piece.nodes for name in node.input} if sizes.get(name)]
        assert sum(held) <= 300_000 or len([size for size in held if size > 100_000]) == 1
    assert [node.name for piece in pieces for node in piece.nodes] == [node.name for node in graph.node]


def test_errors_are_ours_and_leave_nothing(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, questions = converted("int8")
    monkeypatch.setattr(gate_pieces, "_model", lambda *_: b"\x08\x0a")
    with pytest.raises(ModelFileError, match="cannot load"):
        gate_pieces.answers_of(artifact, questions.entries[:1], artifact.manifest.head_ids, 1)
    assert not (artifact.folder / gate_pieces.MODEL).exists()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_large_artifacts_pass_the_gate_in_pieces(precision: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 sessions: list[weakref.ref[Any]]) -> None:
    artifact, _ = converted(precision)
    monkeypatch.setattr(room, "PREPACKED", 1000)
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
    stopped = (artifact.folder.parent / "source", tmp_path / "out")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate_pieces, "_run", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill leaves the piece's file
        with pytest.raises(KeyboardInterrupt):
            pipeline.convert(*stopped, target="onnx", precision=precision, threads=1)
    assert (tmp_path / "out.partial" / gate_pieces.MODEL).exists()
    made: Manifest = pipeline.convert(*stopped, target="onnx", precision=precision, threads=1)
    assert sessions
    assert (made.gate, made.files) == (artifact.manifest.gate, artifact.manifest.files)
    assert not list((tmp_path / "out").glob(".*"))
