"""Models from a pretended hub into a home folder and out of it again; offline."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact, own_home, own_mini

from edgeguard import store
from edgeguard.bench.checkpoint import config
from edgeguard.bench.synthetic import LLAMA_GUARD_2
from edgeguard.convert.pipeline import convert
from edgeguard.errors import ConversionError, ModelFileError, ModelNotFoundError, RuntimeMissingError, StoreError
from edgeguard.store import download

CONFIG = config(LLAMA_GUARD_2)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_mini(tmp_path, monkeypatch)


class FakeHub:
    """A hub with one repository."""

    def __init__(self, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.files, self.fetched, self.error = files, list[str](), None
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, hub_id, **options: self.info())
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def info(self) -> Any:
        if self.error:
            raise self.error
        hashes = {name: types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) for name, data in self.files.items()}
        siblings = [
            types.SimpleNamespace(rfilename=name, size=len(data), lfs=hashes[name]) for name, data in self.files.items()
        ]
        return types.SimpleNamespace(sha="c0ffee", siblings=siblings)

    def download(self, hub_id: str, path: str, *, revision: str, local_dir: Path) -> str:
        assert revision == "c0ffee"
        self.fetched.append(path)
        (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / path).write_bytes(self.files[path])
        return str(local_dir / path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    files = {
        "config.json": b"{}", "model.safetensors": b"weights", "LICENSE": b"licence", "pytorch_model.bin": b"pickle",
        "run.py": b"code", "original/params.json": b"{}", "../escape.json": b"{}", ".hidden.json": b"{}",
    }
    return FakeHub(files, monkeypatch)


class TestPull:
    def test_fetches_what_is_read_and_records_hashes(self, hub: FakeHub, home: Path, mini: Path) -> None:
        entry = store.pull("org/guard")
        assert sorted(hub.fetched) == ["LICENSE", "config.json", "model.safetensors"]
        assert (entry.name, entry.folder, entry.models[0].kind) == ("org--guard", home / "org--guard", "hf")
        assert store.resolve("org/guard", ("hf",)).folder == home / "org--guard"
        record = json.loads((entry.folder / "download.json").read_text())
        assert (record["hub_id"], record["commit"]) == ("org/guard", "c0ffee")
        [(_, found)] = store.verify(entry.folder)
        assert (found.ok, found.extra) == (True, ())
        (entry.folder / "model.safetensors").write_bytes(b"Weights")
        assert store.verify(entry.folder)[0][1].changed == ("model.safetensors",)
        assert not (home / "org--guard.partial").exists()

    def test_include_narrows(self, hub: FakeHub, mini: Path) -> None:
        hub.files = {"a-Q4_K_M.gguf": b"GGUF4", "a-Q8_0.gguf": b"GGUF8"}
        store.pull("org/guard", include=["*Q4_K_M.gguf"])
        assert hub.fetched == ["a-Q4_K_M.gguf"]

    def test_no_model_gets_no_name(self, hub: FakeHub, home: Path) -> None:
        del hub.files["config.json"]
        with pytest.raises(ModelFileError, match="not a model"):
            store.pull("org/guard")
        del hub.files["model.safetensors"]
        with pytest.raises(StoreError, match=r"org/guard has no weights that fit .*\.md\.$"):
            store.pull("org/guard")
        hub.files["model-Q4.gguf"] = b"GGUF"
        with pytest.raises(StoreError, match="models pull org/guard --include"):
            store.pull("org/guard", include=["*.safetensors"])
        assert not (home / "org--guard").exists()

    def test_file_that_is_not_what_was_announced(self, hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        announced = hub.info()
        monkeypatch.setattr(hub, "info", lambda: announced)
        hub.files["model.safetensors"] = b"changed"
        with pytest.raises(StoreError, match="not what the hub announced"):
            store.pull("org/guard")
        assert not (home / "org--guard").exists()
        assert not (home / "org--guard.partial" / "model.safetensors").exists()

    def test_small_files_are_held_against_gits_hash(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(b"hello\n")
        found = store.record(path)
        assert download.Announced(6, "", "ce013625030ba8dba906f756967f9e9ca394464a").is_that_of(path, found)  # git hash-object
        assert not download.Announced(6, "", "ce013625030ba8dba906f756967f9e9ca394464b").is_that_of(path, found)
        assert download.Announced(6, "", "").is_that_of(path, found), "nothing was announced"

    @pytest.mark.parametrize("name", ["EDGEGUARD_OFFLINE", "HF_HUB_OFFLINE"])
    def test_offline_says_what_to_do(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "1")
        with pytest.raises(StoreError, match="Unset it"):
            store.pull("org/guard")
        assert hub.fetched == []

    @pytest.mark.parametrize(("status", "kind", "says"), [
        (401, "GatedRepoError", "Accept its licence"), (403, "GatedRepoError", "Accept its licence"),
        (404, "RepositoryNotFoundError", "check the name"), (404, "RevisionNotFoundError", "no such revision"),
        (403, "HfHubHTTPError", "HF_TOKEN"), (429, "HfHubHTTPError", "wait"), (500, "HfHubHTTPError", "status 500"),
    ])
    def test_answers_of_the_hub_in_words(self, hub: FakeHub, status: int, kind: str, says: str) -> None:
        from huggingface_hub import utils

        response = types.SimpleNamespace(status_code=status, headers={}, request=None, text="", url="")
        hub.error = getattr(utils, kind)("no", response=response)
        with pytest.raises(StoreError, match=says):
            store.pull("org/guard")

    @pytest.mark.parametrize(("error", "says"), [
        (OSError(28, "No space left on device"), "No space left"), (ConnectionError(), "network reachable"),
        (ValueError("x"), "ValueError"),
    ])
    def test_other_failures_are_store_errors(self, hub: FakeHub, error: Exception, says: str) -> None:
        hub.error = error
        with pytest.raises(StoreError, match=says):
            store.pull("org/guard")

    def test_too_little_space(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3))
        with pytest.raises(StoreError, match="needs"):
            store.pull("org/guard")
        assert hub.fetched == []

    def test_disk_of_a_conversion_is_counted_before_weights_are_fetched(self, hub: FakeHub, mini: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
        hub.files |= {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"}
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=8_000_000_000))
        with pytest.raises(ConversionError, match=r"about 8\.\d GB of disk, 7 B of it for the source, 8\.0 GB are free at .*: \d+ MB"):
            convert("org/guard", tmp_path / "out", target="onnx", precision="int8")
        assert sorted(hub.fetched) == ["LICENSE", "config.json", "tokenizer.json"]
        with pytest.raises(ModelFileError, match="safetensors"):  # there is room for 4 bits
            convert("org/guard", tmp_path / "out", target="onnx", precision="int4")
        assert hub.fetched[-1] == "model.safetensors"

    @pytest.mark.parametrize(("change", "says"), [
        ({"tokenizer.json": None}, "org/guard has no tokenizer"), ({"config.json": None}, "org/guard has no config"),
        ({"config.json": json.dumps({**CONFIG, "num_hidden_layers": 10**12}).encode()}, "num_hidden_layers is 1000000000000"),
    ])
    def test_what_cannot_be_converted_is_told_before_weights_are_fetched(self, hub: FakeHub, mini: Path, tmp_path: Path, says: str,
                                                                         change: dict[str, bytes | None]) -> None:
        hub.files |= {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"}
        hub.files = {name: data for name, data in {**hub.files, **change}.items() if data is not None}
        with pytest.raises(ModelFileError, match=says):
            convert("org/guard", tmp_path / "out", target="onnx", precision="int8")
        assert "model.safetensors" not in hub.fetched

    def test_nothing_stays_of_a_download_of_another_commit(self, hub: FakeHub, home: Path, mini: Path) -> None:
        begun = home / "org--guard.partial"
        (begun / ".cache" / "huggingface").mkdir(parents=True)
        (begun / "old").mkdir()
        part = begun / ".cache" / "huggingface" / f"x.{hashlib.sha256(b'weights').hexdigest()}.incomplete"
        for path in (begun / "model-00001-of-00002.safetensors", begun / "old" / "model.gguf", part, part.with_name("x.0123.incomplete")):
            path.write_bytes(b"weights")
        download._remove_others(begun, download._contents("org/guard", None, ["*.safetensors"])[1])
        assert [path for path in begun.rglob("*") if path.is_file()] == [part]
        assert store.pull("org/guard").models[0].kind == "hf"
        [(_, found)] = store.verify(home / "org--guard")
        assert (found.ok, found.extra) == (True, ())

    def test_installed_already(self, hub: FakeHub, mini: Path) -> None:
        store.pull("org/guard")
        with pytest.raises(StoreError, match="models remove org--guard"):
            store.pull("org/guard")

    @pytest.mark.parametrize("name", ["guard", "a/b/c", "../x", "org/", "https://huggingface.co/org/guard"])
    def test_what_is_no_hub_id(self, name: str) -> None:
        with pytest.raises(ModelNotFoundError, match="ORG/NAME"):
            store.pull(name)

    def test_missing_package_gives_the_install_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(RuntimeMissingError, match=r"edgeguard\[convert\]"):
            store.pull("org/guard")

    def test_record_cannot_point_outside(self, tmp_path: Path) -> None:
        (tmp_path / "download.json").write_text(json.dumps({"files": {"../x": {"sha256": "0", "size": 1}}}))
        with pytest.raises(StoreError, match="outside"):
            store.verify(tmp_path)


class TestRemove:
    def test_installed_model(self, mini: Path, home: Path) -> None:
        make_artifact(home / "mine")
        make_artifact(home / "other")
        assert store.remove("mine") == home / "mine"
        assert [entry.name for entry in store.models()] == ["mini", "other"]
        assert not list(home.glob("mine*"))

    def test_never_the_built_in_one(self, mini: Path) -> None:
        with pytest.raises(StoreError, match="cannot be removed"):
            store.remove("mini")
        assert store.resolve("mini").weights.is_file()

    @pytest.mark.parametrize("name", ["..", ".", "../outside", "/", "", ".locks", "no such", "mine/../../outside"])
    def test_nothing_outside_home(self, mini: Path, home: Path, tmp_path: Path, name: str) -> None:
        make_artifact(tmp_path / "outside")
        make_artifact(home / "mine")
        with pytest.raises(ModelNotFoundError):
            store.remove(name)
        assert (tmp_path / "outside" / "manifest.json").is_file()
        assert (home / "mine" / "manifest.json").is_file()

    def test_a_link_is_removed_not_what_it_points_to(self, mini: Path, home: Path, tmp_path: Path) -> None:
        make_artifact(tmp_path / "elsewhere")
        home.mkdir()
        (home / "linked").symlink_to(tmp_path / "elsewhere")
        store.remove("linked")
        assert (tmp_path / "elsewhere" / "manifest.json").is_file()
        assert not (home / "linked").exists()
