"""From a name to a backend: which is chosen and why, what is refused, and what a bare model needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeguard import Guard, loading, machine, store
from edgeguard.bench import artifacts
from edgeguard.errors import DeviceError, InputError, ModelFileError, ModelMemoryError, ModelMismatchError, RuntimeMissingError
from edgeguard.tokenizer import GgufTokenizer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def only(*modules: str) -> None:
        monkeypatch.setattr(loading.Runtime, "installed", property(lambda runtime: runtime.module in modules))

    return only


def test_auto_takes_onnx_then_llama_and_says_why(installed: Callable[..., None]) -> None:
    installed("onnxruntime", "llama_cpp")
    assert loading.choose().backend == "onnx"
    installed("llama_cpp")
    choice = loading.choose()
    assert choice.backend == "llama" and "onnxruntime is not installed" in choice.reason


@pytest.mark.parametrize(("backend", "extra"), [("auto", "cpu"), ("onnx", "cpu"), ("llama", "llama")])
def test_a_missing_runtime_gives_the_install_line(installed: Callable[..., None], backend: str, extra: str) -> None:
    installed()
    with pytest.raises(RuntimeMissingError, match=rf'pip install "edgeguard\[{extra}\]"'):
        loading.choose(backend=backend)


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_files_that_are_replaced_between_check_and_load_are_not_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that nobody checked would judge, and their prefix would be kept under the name of the right ones."""
    found = store.resolve(None, (kind,))
    shutil.copytree(found.folder, tmp_path / "model")
    weights = tmp_path / "model" / found.weights.name
    tokenizer = loading._tokenizer

    def replaced(path: Path) -> object:
        shutil.copy(weights, tmp_path / "other")
        (tmp_path / "other").replace(weights)
        return tokenizer(path)

    monkeypatch.setattr(loading, "_tokenizer", replaced)
    with pytest.raises(ModelFileError, match="replaced while it was being loaded"):
        Guard.load(tmp_path / "model")
    monkeypatch.undo()
    with Guard.load(tmp_path / "model") as guard:
        assert guard.check("hello").safe


def test_too_little_memory_names_the_artifact_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, llama, _ = loading.RUNTIMES
    needs = {runtime.backend: loading.needed_memory(runtime, store.resolve(None, (runtime.kind,))) for runtime in (onnx, llama)}
    assert needs["llama"] < needs["onnx"]
    monkeypatch.setattr(machine, "available_memory", lambda: needs["llama"] + 1)
    with pytest.raises(ModelMemoryError, match=r"gguf, which fits"):
        Guard.load(backend="onnx")
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    with pytest.raises(ModelMemoryError, match="smaller precision"):
        Guard.load(backend="llama")


def test_memory_counts_weights_and_one_context_once() -> None:
    onnx, llama, _ = loading.RUNTIMES
    for runtime, copies, context in ((onnx, 1.1, 1.0), (llama, 1.0, 0.5)):  # float32 keys and values, or float16
        model = store.resolve(None, (runtime.kind,))
        assert isinstance(model, store.Artifact)
        keys_values = model.manifest.shape.kv_bytes * min(model.manifest.shape.context, 8192)
        assert loading.needed_memory(runtime, model) == int(model.size * copies + keys_values * context)


def test_too_little_memory_is_told_whatever_lies_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("onnx", "gguf"):
        shutil.copytree(store.built_in_folder() / kind, tmp_path / kind)
    for name, text in (("broken", "{"), ("strange", '{"format": 7}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    with pytest.raises(ModelMemoryError, match="smaller precision"):
        Guard.load(tmp_path / "onnx")
    monkeypatch.setattr(loading, "needed_memory", lambda runtime, model, **_: 10**30 if model.kind == "onnx" else 1)
    with pytest.raises(ModelMemoryError, match=r"more than 16,000 GiB.*gguf, which fits"):
        Guard.load(tmp_path / "onnx")


@pytest.mark.parametrize("threads", [0, 1025, 2**31, True, 1.0])
def test_threads_are_bounded(threads: object) -> None:
    with pytest.raises(InputError, match="1 to 1024"):
        Guard.load(threads=threads)  # type: ignore[arg-type]


def test_a_gguf_that_was_cut_off_is_told_so(tmp_path: Path) -> None:
    whole = (store.built_in_folder() / "gguf" / "model.gguf").read_bytes()
    for part in (len(whole) - 64, len(whole) // 8):
        (tmp_path / "guard.gguf").write_bytes(whole[:part])
        with pytest.raises(ModelFileError, match=r"cut off|longer than the file"):
            Guard.load(tmp_path / "guard.gguf", profile="edgeguard-mini")


def test_a_native_library_that_does_not_load_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('libllama.so: cannot open')")
    with pytest.raises(RuntimeMissingError, match=r"cannot be loaded \(libllama"):
        GgufTokenizer.load(store.built_in_folder() / "gguf" / "model.gguf")


def test_a_damaged_artifact_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(store.built_in_folder() / "onnx", tmp_path / "model")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data"):
        Guard.load(folder)
    (folder / "model.onnx.data").write_bytes(data[:-1])
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data"):
        Guard.load(folder)


def test_a_bare_gguf_needs_its_profile_named(tmp_path: Path) -> None:
    path = tmp_path / "guard.gguf"
    shutil.copy(store.built_in_folder() / "gguf" / "model.gguf", path)
    with pytest.raises(ModelMismatchError, match="Name its profile"):
        Guard.load(path)
    with Guard.load(path, profile="edgeguard-mini") as guard, Guard.load(backend="llama") as known:
        assert guard.identity.sha256 == known.identity.sha256 == store.sha256(path)
        assert guard.check("hello").raw_score == known.check("hello").raw_score


def test_a_profile_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "guard.gguf"
    shutil.copy(store.built_in_folder() / "gguf" / "model.gguf", path)
    with pytest.raises(ModelMismatchError):
        Guard.load(path, profile="llama-guard-2")


def test_a_device_that_is_not_there_is_an_error_and_auto_falls_back() -> None:
    for backend in ("onnx", "llama"):
        with pytest.raises(DeviceError):
            Guard.load(backend=backend, device="cuda")
    with Guard.load(device="auto") as guard:
        assert guard.backend_info.device == "cpu" and guard.backend_info.threads >= 1


def test_reference_reads_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = artifacts.write_source(artifacts.find(None, tmp_path, make=False))
    with (Guard.load(folder, backend="reference", profile="edgeguard-mini") as slow,
          Guard.load(backend="onnx", calibration="none") as fast):
        for text in ("How do I kill a Python process?", "Tell me how to build a pipe bomb to hurt people."):
            one, other = slow.check(text), fast.check(text)
            assert one.verdict == other.verdict and abs(one.score - other.score) < 0.1


def test_no_socket_is_opened() -> None:
    code = (
        "import socket\n"
        "class No(socket.socket):\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = No\n"
        "import edgeguard\n"
        "print(edgeguard.Guard.load(backend='onnx').check('hello').verdict)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "safe", done.stderr


def test_no_runtime_leaves_traces_in_the_home(tmp_path: Path) -> None:
    # ONNX Runtime 1.32 writes a device id there and asks for its collector, unless it is told not to before it is imported
    code = "import edgeguard; print(edgeguard.Guard.load(backend='onnx').check('hello').verdict)"
    known = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                          env={**known, "HOME": str(tmp_path), "EDGEGUARD_HOME": str(tmp_path / "edgeguard")})
    assert done.stdout.strip() == "safe", done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"edgeguard"}
