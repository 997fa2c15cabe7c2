from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_model import write_small_artifact, write_small_model

from edgeguard.backends import onnx, prepacked
from edgeguard.backends.base import Run
from edgeguard.backends.onnx import OnnxBackend, make_prepacked
from edgeguard.backends.onnx_session import build
from edgeguard.errors import StoreError
from edgeguard.store import Artifact

HEAD = (1, 5, 70, 191)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    root = tmp_path_factory.mktemp("packed")
    source = write_small_model(root / "source")

    def made(precision: str) -> Artifact:
        folder = root / precision
        return Artifact.read(folder) if folder.exists() else write_small_artifact(source, folder, precision, HEAD)

    return made


@pytest.fixture
def form(artifacts: Callable[[str], Artifact], tmp_path: Path) -> Path:
    """The folder of a form of the int8 artifact."""
    return make_prepacked(artifacts("int8"), tmp_path / "forms")


def opened(artifact: Artifact, folder: Path | None) -> OnnxBackend:
    return OnnxBackend(artifact, device="cpu", threads=1, prepacked=folder)


def mapped(backend: OnnxBackend) -> bool:
    return "mapped" in backend.info.kernel


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_the_packed_form_gives_the_same_bits(precision: str, artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = artifacts(precision)
    place = make_prepacked(artifact, tmp_path / "forms")
    assert place.parent == tmp_path / "forms" and sorted(each.name for each in tmp_path.joinpath("forms").iterdir()) == [place.name]
    plain, packed = opened(artifact, None), opened(artifact, tmp_path / "forms")
    assert (mapped(plain), mapped(packed)) == (False, True)
    np.testing.assert_array_equal(packed.open(IDS, Run()).logits, plain.open(IDS, Run()).logits)


def test_packed_weights_are_in_the_file(form: Path, artifacts: Callable[[str], Artifact]) -> None:
    """What the runtime would else compute at each load: the file holds more than the weights."""
    assert (form / "model.onnx.data").stat().st_size > 1.4 * (artifacts("int8").folder / "model.onnx.data").stat().st_size
    assert b"prepacked" in (form / "model.onnx").read_bytes()


def test_forms_for_another_build_of_the_runtime_are_removed(form: Path, artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    old, other = form.with_name("old"), form.with_name("other")
    for copy, changed in ((old, {"runtime": "onnxruntime 1.0"}), (other, {"runtime": "onnxruntime 1.0", "processor": "another"})):
        shutil.copytree(form, copy)
        told = json.loads((copy / "form.json").read_text())
        (copy / "form.json").write_text(json.dumps({**told, "key": {**told["key"], **changed}}))
    make_prepacked(artifacts("int8"), tmp_path / "forms")
    assert sorted(each.name for each in form.parent.iterdir()) == sorted([form.name, "other"])


def test_nothing_is_made_unless_asked(artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    assert not mapped(opened(artifacts("int8"), tmp_path / "none")) and not (tmp_path / "none").exists()


def test_another_artifact_processor_or_runtime_is_a_miss(form: Path, artifacts: Callable[[str], Artifact],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepacked.find(artifacts("int8"), form.parent, build()) == form
    assert prepacked.find(artifacts("int4"), form.parent, build()) is None
    assert prepacked.find(artifacts("int8"), form.parent, build() + "x") is None
    other = prepacked.cpu()
    monkeypatch.setattr(prepacked, "cpu", lambda: type(other)(other.vendor, other.model, other.arch, frozenset({"sve"})))
    assert prepacked.find(artifacts("int8"), form.parent, build()) is None
    assert not mapped(opened(artifacts("int8"), form.parent))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 64]))


def damage(form: Path, what: str) -> None:
    if what == "cut":
        with (form / "model.onnx.data").open("r+b") as file:
            file.truncate(1000)
    elif what == "missing":
        (form / "model.onnx.data").unlink()
    elif what == "no json":
        (form / "form.json").write_text("{")
    elif what == "another key":
        record = json.loads((form / "form.json").read_text())
        (form / "form.json").write_text(json.dumps({**record, "key": {**record["key"], "model": "0"}}))
    else:
        flip(form / ("model.onnx" if what == "graph" else "model.onnx.data"), 200_000 if what == "data" else 300)


@pytest.mark.parametrize("what", ["data", "graph", "cut", "missing", "no json", "another key"])
def test_damage_is_a_miss(what: str, form: Path, artifacts: Callable[[str], Artifact]) -> None:
    wanted = opened(artifacts("int8"), None).open(IDS, Run()).logits
    damage(form, what)
    backend = opened(artifacts("int8"), form.parent)
    assert not mapped(backend)
    np.testing.assert_array_equal(backend.open(IDS, Run()).logits, wanted)
    make_prepacked(artifacts("int8"), form.parent)
    assert mapped(opened(artifacts("int8"), form.parent))


def test_a_form_that_answers_otherwise_is_removed(form: Path, artifacts: Callable[[str], Artifact]) -> None:
    """Files as they were written, and yet other numbers: another kernel than when it was made."""
    record = json.loads((form / "form.json").read_text())
    (form / "form.json").write_text(json.dumps({**record, "answer": "0" * 64}))
    assert not mapped(opened(artifacts("int8"), form.parent)) and not form.exists()


def test_what_answers_otherwise_at_once_is_not_kept(artifacts: Callable[[str], Artifact], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeguard.errors import InferenceError

    answers = iter([1.0, 2.0])
    monkeypatch.setattr(onnx, "probe", lambda *_: np.full(4, next(answers), np.float32))
    with pytest.raises(InferenceError, match="other results"):
        make_prepacked(artifacts("int8"), tmp_path / "forms")
    assert list((tmp_path / "forms").iterdir()) == []


def test_room_is_checked_first(artifacts: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"GiB free"):
        make_prepacked(artifacts("int8"), tmp_path / "forms")
    assert not (tmp_path / "forms").exists()


def test_a_folder_that_cannot_be_written_is_an_error(artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    (tmp_path / "forms").write_text("a file")
    with pytest.raises(StoreError, match="could not be written"):
        make_prepacked(artifacts("int8"), tmp_path / "forms" / "deeper")
