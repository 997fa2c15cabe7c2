"""Manifests, what a name or path stands for, checks, downloads and removal; offline, in a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import SHAPE, make_artifact, own_home, own_mini
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeguard import store
from edgeguard.errors import ModelFileError, ModelNotFoundError, StoreError
from edgeguard.store import BareModel, FileRecord, Manifest, catalogue
from edgeguard.store.files import Seen, Unchanged, locked

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JUNK = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
HOLDER = """
import sys
from pathlib import Path
from edgeguard.store.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_mini(tmp_path, monkeypatch)


class TestManifest:
    def test_comes_back_as_written(self, tmp_path: Path) -> None:
        artifact = make_artifact(tmp_path / "a")
        assert Manifest.read(tmp_path / "a") == artifact.manifest
        assert artifact.manifest.prefix("user") == artifact.manifest.prefixes[0]
        assert artifact.manifest.prefix("assistant") is None
        assert (artifact.weights, artifact.tokenizer) == (tmp_path / "a" / "model.onnx", tmp_path / "a" / "tokenizer.json")
        assert artifact.size == 104 + 2 + 6
        assert not list((tmp_path / "a").glob("*.partial"))

    @pytest.mark.parametrize(("change", "says"), [
        ({"format": 2}, "format 2"), ({"format": None}, "format None"), ({"kind": "pt"}, "'kind'"), ({"name": " "}, "'name'"),
        ({"weights": "../model.onnx"}, "plain file name"), ({"weights": "/etc/passwd"}, "plain file name"),
        ({"weights": "manifest.json"}, "plain file name"), ({"weights": "other.onnx"}, "does not list other.onnx"),
        ({"files": {"..": {"sha256": "0" * 64, "size": 1}}}, "plain file name"), ({"files": []}, "'files'"),
        ({"files": {"model.onnx": {"sha256": "0" * 63, "size": 1}}}, "SHA-256"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size": -1}}}, "count"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size": True}}}, "count"),
        ({"head_ids": [3, 3]}, "ascend"), ({"head_ids": [1.5]}, "count"), ({"head_ids": [100]}, "beyond the vocabulary"),
        ({"shape": {"layers": 1}}, "'shape'"), ({"shape": {**SHAPE.to_dict(), "hidden": 0}}, "hidden is 0"),
        ({"shape": {**SHAPE.to_dict(), "rope_theta": float("nan")}}, "rope_theta"),
        ({"shape": {**SHAPE.to_dict(), "rms_eps": 0}}, "rms_eps"),
        ({"shape": {**SHAPE.to_dict(), "rope_theta": 10**400}}, "rope_theta"),
        ({"shape": {**SHAPE.to_dict(), "context": 10**12}}, "context"), ({"shape": {**SHAPE.to_dict(), "vocab": 2**63}}, "vocab"),
        ({"shape": {**SHAPE.to_dict(), "layers": 1025}}, "from 1 to 1024"), ({"shape": {**SHAPE.to_dict(), "tied": 1}}, "tied"),
        ({"shape": {**SHAPE.to_dict(), "heads": 3, "kv_heads": 2}}, "3 heads"),
        ({"shape": {**SHAPE.to_dict(), "rope_scaling": 8}}, "'shape'"),
        ({"format": True}, "format True"), ({"format": 1.0}, "format 1.0"), ({"name": "a\nb"}, "'name'"), ({"name": "a" * 129}, "'name'"),
        ({"precision": "int8\x1b[2J"}, "'precision'"),
        ({"prefixes": [{"role": "system"}]}, "'prefixes'"), ({"extra": 1}, "unknown fields 'extra'"), ({"types": 3}, "'types'"),
        ({"prefixes": [{"role": "user", "ids": [1], "file": "prefix-user.npz", "sha256": "0" * 64}]}, "different hashes"),
    ])
    def test_malformed_ones_are_refused_by_name(self, tmp_path: Path, change: dict[str, Any], says: str) -> None:
        artifact = make_artifact(tmp_path)
        (tmp_path / "manifest.json").write_text(json.dumps({**artifact.manifest.to_dict(), **change}))
        with pytest.raises(ModelFileError, match=says):
            Manifest.read(tmp_path)

    def test_a_key_that_stands_there_twice(self, tmp_path: Path) -> None:
        text = json.dumps(make_artifact(tmp_path).manifest.to_dict())
        (tmp_path / "manifest.json").write_text(text.replace('"kind"', '"name": "other", "kind"', 1))
        with pytest.raises(ModelFileError, match="'name' is given twice"):
            Manifest.read(tmp_path)

    @pytest.mark.parametrize("field", [name for name in Manifest.__dataclass_fields__ if name not in ("conversion", "calibration")])
    def test_every_field_is_needed(self, tmp_path: Path, field: str) -> None:
        plain = make_artifact(tmp_path).manifest.to_dict()
        del plain[field]
        with pytest.raises(ModelFileError, match=f"'{field}' is missing"):
            Manifest.from_dict(plain)

    @pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"format": 1'])
    def test_what_is_no_manifest(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "manifest.json").write_bytes(data)
        with pytest.raises(ModelFileError):
            Manifest.read(tmp_path)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(field=st.sampled_from(sorted(Manifest.__dataclass_fields__)), junk=JUNK)
    def test_no_value_anywhere_raises_anything_else(self, whole: dict[str, Any], field: str, junk: Any) -> None:
        with suppress(ModelFileError):
            assert Manifest.from_dict({**whole, field: junk})

    @pytest.fixture
    def whole(self, tmp_path: Path) -> dict[str, Any]:
        return make_artifact(tmp_path).manifest.to_dict()

    def test_a_wrong_one_is_not_written(self, tmp_path: Path) -> None:
        manifest = make_artifact(tmp_path).manifest
        before = (tmp_path / "manifest.json").read_bytes()
        with pytest.raises(ModelFileError):
            replace(manifest, weights="elsewhere.onnx").write(tmp_path)
        assert (tmp_path / "manifest.json").read_bytes() == before

    def test_path_gives_only_listed_files(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFileError, match=r"no file '\.\./x'"):
            make_artifact(tmp_path).path("../x")


class TestResolve:
    def test_none_and_its_name_are_the_built_in_model(self, mini: Path) -> None:
        assert store.resolve().weights == mini / "onnx" / "model.onnx"
        assert store.resolve("mini", ("gguf", "onnx")).weights == mini / "gguf" / "model.gguf"

    def test_the_real_package_holds_the_built_in_folder_or_says_so(self) -> None:
        try:
            assert store.built_in_folder().name == catalogue.BUILT_IN_FOLDER
        except ModelNotFoundError as error:
            assert "Install edgeguard again" in str(error)

    def test_built_in_name_wins_over_the_working_directory(self, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        here = mini.parents[1] / "here"
        make_artifact(here / "mini", name="impostor")
        monkeypatch.chdir(here)
        assert store.resolve("mini").name == "mini"
        assert store.resolve("./mini").name == "impostor"

    def test_artifact_folder_its_manifest_and_its_weights(self, tmp_path: Path) -> None:
        artifact = make_artifact(tmp_path / "a")
        for place in (tmp_path / "a", str(tmp_path / "a"), tmp_path / "a" / "manifest.json", tmp_path / "a" / "model.onnx"):
            assert store.resolve(place) == artifact

    def test_order_of_kinds_decides(self, tmp_path: Path) -> None:
        make_artifact(tmp_path / "x", "onnx")
        make_artifact(tmp_path / "y", "gguf")
        assert store.resolve(tmp_path, ("gguf", "onnx")).kind == "gguf"
        assert store.resolve(tmp_path, ("onnx", "gguf")).kind == "onnx"

    def test_two_that_fit_are_never_guessed(self, tmp_path: Path) -> None:
        for name in ("int4", "int8"):
            make_artifact(tmp_path / name)
        with pytest.raises(ModelNotFoundError, match=r"(?s)several onnx models.*int4.*int8"):
            store.resolve(tmp_path)

    def test_kind_that_is_not_there(self, tmp_path: Path) -> None:
        make_artifact(tmp_path)
        with pytest.raises(ModelNotFoundError, match="kind onnx, but gguf is needed"):
            store.resolve(tmp_path, ("gguf",))

    def test_bare_gguf_file_and_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "Llama-Guard-2 Q4_K_M.gguf"
        file.write_bytes(b"GGUF" + bytes(20))
        want = BareModel("gguf", tmp_path, file)
        assert store.resolve(file) == store.resolve(tmp_path) == want
        assert (want.name, want.tokenizer, want.size) == ("Llama-Guard-2 Q4_K_M", file, 24)

    def test_parts_of_a_split_gguf_are_one_model(self, tmp_path: Path) -> None:
        for part in (1, 2, 3):
            (tmp_path / f"m-0000{part}-of-00003.gguf").write_bytes(b"GGUF")
        assert store.resolve(tmp_path).weights.name == "m-00001-of-00003.gguf"

    def test_ordinary_onnx_export(self, tmp_path: Path) -> None:
        for name in ("model.onnx", "config.json"):
            (tmp_path / name).write_text("{}")
        assert store.resolve(tmp_path) == BareModel("onnx", tmp_path, tmp_path / "model.onnx")

    def test_hugging_face_folder(self, tmp_path: Path) -> None:
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
            (tmp_path / name).write_text("{}")
        assert store.resolve(tmp_path, ("hf",)) == BareModel("hf", tmp_path, tmp_path)
        with pytest.raises(ModelNotFoundError, match="kind hf"):
            store.resolve(tmp_path)

    @pytest.mark.parametrize(("name", "data"), [("x.gguf", b"PK\3\4"), ("x.gguf", b""), ("x.bin", b"GGUF"), ("x.onnx", b"..")])
    def test_file_that_is_not_a_model(self, tmp_path: Path, name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=name):
            store.resolve(tmp_path / name)

    def test_folder_that_is_not_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFileError, match="not a model"):
            store.resolve(tmp_path)

    @pytest.mark.parametrize("name", ["unknown", "./unknown", "org/unknown", "", "x" * 5000, "a\0b", "../..//nope"])
    def test_unknown_names_list_the_known(self, mini: Path, home: Path, name: str) -> None:
        make_artifact(home / "mine")
        with pytest.raises(ModelNotFoundError, match="Known: mini, mine"):
            store.resolve(name)

    def test_installed_by_name_and_by_hub_id(self, mini: Path, home: Path) -> None:
        artifact = make_artifact(home / "org--guard")
        assert store.resolve("org--guard") == store.resolve("org/guard") == artifact

    def test_damaged_model_is_listed_with_its_problem(self, mini: Path, home: Path) -> None:
        make_artifact(home / "good")
        (home / "bad").mkdir()
        (home / "half.partial").mkdir()
        (home / "bad" / "manifest.json").write_text("{")
        listed = {entry.name: entry for entry in store.models()}
        assert list(listed) == ["mini", "bad", "good"]
        assert "manifest.json" in listed["bad"].problem
        assert (listed["mini"].built_in, len(listed["mini"].models), listed["good"].problem) == (True, 2, "")


class TestChecks:
    def test_sizes_and_hashes_at_load(self, tmp_path: Path) -> None:
        artifact = make_artifact(tmp_path / "a")
        store.check_files(artifact)
        artifact.weights.write_bytes(b"GGUF" + bytes(99))
        with pytest.raises(ModelFileError, match="103 bytes instead of 104"):
            store.check_files(artifact)
        artifact.weights.write_bytes(b"GGUF" + bytes(99) + b"!")
        with pytest.raises(ModelFileError, match="SHA-256 differs"):
            store.check_files(artifact)
        artifact.weights.unlink()
        with pytest.raises(ModelFileError, match="missing"):
            store.check_files(artifact)

    def test_files_are_hashed_once(self, tmp_path: Path, home: Path) -> None:
        artifact = make_artifact(tmp_path / "a")
        first: list[str] = []
        store.check_files(artifact, lambda name, done, size: first.append(name))
        again: list[str] = []
        store.check_files(artifact, lambda name, done, size: again.append(name))
        assert (set(first), again) == (set(artifact.manifest.files), [])
        assert (home / ".seen.json").is_file()

    @pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"%s": [1]}'])
    def test_damaged_memory_only_costs_time(self, tmp_path: Path, data: bytes) -> None:
        memory, file = tmp_path / "seen.json", tmp_path / "file"
        file.write_bytes(b"abc")
        memory.write_bytes(data.replace(b"%s", str(file).encode()))
        assert Seen(memory).sha256(file) == store.sha256(file)
        assert str(file) in json.loads(memory.read_text())

    @pytest.mark.skipif(os.name == "nt", reason="no such files there")
    @pytest.mark.parametrize("kind", ["pipe", "device", "deep"])
    def test_memory_that_is_no_memory_is_not_read(self, tmp_path: Path, kind: str) -> None:
        memory, file = tmp_path / "seen.json", tmp_path / "file"
        file.write_bytes(b"abc")
        if kind == "pipe":
            os.mkfifo(memory)
        elif kind == "device":
            memory.symlink_to("/dev/zero")
        else:
            memory.write_bytes(b"[" * 100_000)
        assert Seen(memory).sha256(file) == store.sha256(file)
        assert str(file) in json.loads(memory.read_text()), "replaced by one that can be read"

    def test_memory_that_cannot_be_written_only_costs_time(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"abc")
        assert Seen(tmp_path / "file" / "seen.json").sha256(tmp_path / "file") == store.sha256(tmp_path / "file")

    def test_changed_file_is_hashed_anew(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"abc")
        Seen(tmp_path / "seen.json").sha256(file)
        file.write_bytes(b"abd")
        os.utime(file, ns=(1, 1))
        assert Seen(tmp_path / "seen.json").sha256(file) == store.sha256(file)

    @pytest.mark.skipif(os.name == "nt", reason="st_ctime is when the file was made there")
    def test_time_set_back_does_not_hide_a_change(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"abc")
        before = file.stat()
        Seen(tmp_path / "seen.json").sha256(file)
        while file.stat().st_ctime_ns == before.st_ctime_ns:  # clocks of file systems are coarse
            file.write_bytes(b"abd")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
        assert Seen(tmp_path / "seen.json").sha256(file) == store.sha256(file)

    def test_verify_names_missing_changed_and_extra(self, tmp_path: Path) -> None:
        artifact = make_artifact(tmp_path / "a")
        [(folder, found)] = store.verify(tmp_path / "a")
        assert (folder, found.ok, found.extra) == (tmp_path / "a", True, ())
        artifact.weights.write_bytes(b"GGUF" + bytes(99) + b"!")
        artifact.tokenizer.unlink()
        (tmp_path / "a" / "more.txt").write_text("x")
        [(_, found)] = store.verify(tmp_path / "a")
        assert not found.ok
        assert (found.changed, found.missing, found.extra) == (("model.onnx",), ("tokenizer.json",), ("more.txt",))

    def test_verify_looks_at_every_artifact_of_a_model(self, mini: Path) -> None:
        assert [(folder.name, found.ok) for folder, found in store.verify(mini)] == [("gguf", True), ("onnx", True)]

    def test_nothing_to_verify_against(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        with pytest.raises(StoreError, match="nothing to verify"):
            store.verify(tmp_path)

    def test_hash_of_an_unreadable_file(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="cannot be read"):
            store.sha256(tmp_path / "none")

    def test_write_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        with pytest.raises(StoreError, match="cannot be written"):
            store.write_text(tmp_path / "taken", "x")
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]

    def test_lock_of_another_process_is_told_and_dies_with_it(self, tmp_path: Path) -> None:
        lock = tmp_path / "some-model.lock"
        command = [sys.executable, "-c", HOLDER, str(lock)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(StoreError, match="working on some-model"), locked(lock, timeout=0):
                pass
            process.kill()
            process.wait()
        with locked(lock, timeout=5):
            pass


class TestSwitches:
    @pytest.mark.parametrize(("value", "means"), [
        ("1", True), ("true", True), ("0", False), ("", False), ("no", False), ("YES", True),
    ])
    @pytest.mark.parametrize("name", ["EDGEGUARD_OFFLINE", "HF_HUB_OFFLINE"])
    def test_offline(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, means: bool) -> None:
        monkeypatch.setenv(name, value)
        assert store.offline() is means

    def test_home_defaults_to_the_systems_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("EDGEGUARD_HOME")
        assert store.home().name == "edgeguard"


def test_records_leave_out_what_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / ".b").write_bytes(b"abc")
    want = FileRecord("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3)
    assert store.records(tmp_path) == {"a.txt": want}


def test_files_in_use_are_held_to_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    held = Unchanged([path])
    held.check()
    with path.open("ab") as file:
        file.write(b"6")
    with pytest.raises(ModelFileError, match="weights was written to"):
        held.check()
    with pytest.raises(ModelFileError, match="cannot be opened"):
        Unchanged([tmp_path / "missing"])
    other = Unchanged([path])
    ((_, handle, _),) = other._held
    del other
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(handle)


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="Set EDGEGUARD_HOME"), locked(tmp_path / "file" / "x.lock"):
        pass
    with pytest.raises(StoreError, match="shorter name"), locked(tmp_path / f"{'x' * 300}.lock"):
        pass
