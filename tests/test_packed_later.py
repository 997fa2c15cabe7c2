"""Large int8 weights are used as they are first, and packed behind the first message; the built-in model stands for a large one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeguard import Guard, store
from edgeguard.backends import background, kernels, onnx, onnx_session
from edgeguard.backends.base import Run
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.errors import CancelledError, DeadlineError, ModelFileError, ModelMemoryError
from edgeguard.machine import cpu
from edgeguard.store import Artifact

IDS = [3, 40, 500, 6000]
FUSED = ", fused"  # where what lies between products has kernels of our own
pytestmark = pytest.mark.skipif(bool(kernels.kernel(cpu(), "int8").entries), reason="this processor's weights are converted at load")


@pytest.fixture
def artifact(monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(onnx, "LARGE", 0)
    found = store.resolve(None, ("onnx",))
    assert isinstance(found, Artifact)
    return replace(found, manifest=replace(found.manifest, prefixes=()))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The entries that each session was loaded with."""
    seen: list[Any] = []
    original = onnx_session.Session

    class Recorded(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **named: Any) -> None:
            seen.append(named.get("entries"))
            super().__init__(*args, **named)

    monkeypatch.setattr(onnx, "Session", Recorded)
    return seen


def test_the_first_pass_is_unpacked_and_later_ones_agree(artifact: Artifact, loads: list[Any]) -> None:
    backend = OnnxBackend(artifact)
    root = backend.open(IDS, Run())
    background.settled()
    assert loads == [onnx.UNPACKED], "a message waits for its prefix: nothing is packed before it is judged"
    (first,) = backend.extend([(root, IDS)], Run())
    background.settled()
    assert loads == [onnx.UNPACKED, None]
    (later,) = backend.extend([(root, IDS)], Run())
    assert first.logits == pytest.approx(later.logits, abs=1e-3)
    background.settled()
    assert len(loads) == 2, "packed once"


def test_a_prefix_is_kept_apart_for_both_forms(artifact: Artifact, tmp_path: Path) -> None:
    backend = OnnxBackend(artifact, cache=store.PrefixCache(tmp_path, {"model": "mini"}))
    before = backend._running[1]["kernel"]
    backend.extend([(backend.open(IDS, Run()), IDS)], Run())
    background.settled()
    after = backend._running[1]["kernel"]
    assert before.endswith(", unpacked") and not after.endswith("unpacked")
    assert backend.info.kernel == after, "what is told is what runs"
    best = kernels.own_kernel(cpu(), "int8") or kernels.kernel(cpu(), "int8")
    assert after.removesuffix(FUSED) == best.name


@pytest.mark.skipif(kernels.own_kernel(cpu(), "int8") is None, reason="no own kernel for this processor, or it was not built")
def test_a_graph_that_our_own_kernel_does_not_take_is_packed_by_the_runtime(artifact: Artifact, loads: list[Any],
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ModelFileError("a zero point other than 128")

    monkeypatch.setattr(onnx, "probe", refused)
    backend = OnnxBackend(artifact)
    backend.extend([(backend.open(IDS, Run()), IDS)], Run())
    background.settled()
    assert loads == [onnx.UNPACKED, None, None]
    assert backend.info.kernel.removesuffix(FUSED) == kernels.kernel(cpu(), "int8").name and onnx.OWN_FAILED in backend.info.fallbacks


def test_small_and_other_artifacts_are_packed_at_load(loads: list[Any]) -> None:
    found = store.resolve(None, ("onnx",))
    assert isinstance(found, Artifact)
    backend = OnnxBackend(found)
    backend.extend([(backend.open(IDS, Run()), IDS)], Run())
    background.settled()
    assert loads == [None]


@pytest.mark.parametrize("entries", [{}, kernels.EXACT_X86])
def test_weights_that_are_converted_at_load_are_packed_at_once(
    artifact: Artifact, entries: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "kernel", lambda *_: kernels.Kernel("any", entries))
    assert onnx.packed_later(artifact, "cpu") is not bool(entries)
    assert not onnx.packed_later(artifact, "cuda")
    assert not onnx.packed_later(replace(artifact, manifest=replace(artifact.manifest, precision="int4")), "cpu")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Packing has begun; it may go on."""
    begun, go = threading.Event(), threading.Event()
    original: Callable[..., Any] = onnx_session._granted

    def granted(ort: Any, model: Path, devices: Any, options: Any, run: Run) -> Any:
        if threading.current_thread().name.startswith("edgeguard-packing"):
            begun.set()
            assert go.wait(30)
            run.check()
        return original(ort, model, devices, options, run)

    monkeypatch.setattr(onnx_session, "_granted", granted)
    return begun, go


def test_verdicts_go_on_while_it_packs_and_shutdown_stops_it(artifact: Artifact, held: tuple[threading.Event, threading.Event]) -> None:
    begun, go = held
    backend = OnnxBackend(artifact)
    root = backend.open(IDS, Run())
    (first,) = backend.extend([(root, IDS)], Run())
    assert begun.wait(30)
    (second,) = backend.extend([(root, IDS)], Run())
    assert first.logits.tolist() == second.logits.tolist()
    threading.Timer(0.3, go.set).start()
    backend.shutdown()
    assert go.is_set(), "shutdown waits until memory and file are free"
    assert backend._state is None, "what was loaded after the end is not kept"


def test_loading_can_be_stopped(artifact: Artifact) -> None:
    stopped = Run()
    stopped.cancel()
    with pytest.raises(CancelledError):
        onnx_session.Session(artifact.path(artifact.manifest.weights), "int8", "cpu", None, loading=stopped)


def test_without_memory_for_the_packed_form_verdicts_go_on(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxBackend(artifact)
    root = backend.open(IDS, Run())
    monkeypatch.setattr(backend, "_load", lambda **_: (_ for _ in ()).throw(ModelMemoryError("full")))
    (first,) = backend.extend([(root, IDS)], Run())
    background.settled()
    (second,) = backend.extend([(root, IDS)], Run())
    assert first.logits.tolist() == second.logits.tolist()


@pytest.mark.parametrize("failing", ["memory", "file"])
def test_it_is_packed_only_if_there_is_room_and_the_files_are_the_same(
    artifact: Artifact, loads: list[Any], failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artifact.folder, tmp_path / "copy")
    copied = Artifact.read(tmp_path / "copy")
    backend = OnnxBackend(copied)
    if failing == "memory":
        monkeypatch.setattr(onnx, "available_memory", lambda: copied.size)
    else:
        path = copied.path("tokenizer.json")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    backend.extend([(backend.open(IDS, Run()), IDS)], Run())
    background.settled()
    assert loads == [onnx.UNPACKED]
    backend.extend([(backend.open(IDS, Run()), IDS)], Run())


def test_a_pass_that_runs_out_of_time_is_followed_by_packing_too(artifact: Artifact, loads: list[Any]) -> None:
    backend = OnnxBackend(artifact)
    with pytest.raises(DeadlineError):
        backend.open(IDS, Run.within(0))
    background.settled()
    assert loads == [onnx.UNPACKED, None]


def test_who_only_opens_prefixes_has_them_packed_too(artifact: Artifact, loads: list[Any]) -> None:
    backend = OnnxBackend(artifact)
    for packed in (False, True):
        backend.open(IDS, Run())
        background.settled()
        assert loads == [onnx.UNPACKED, None][: 1 + packed]


def test_warmup_waits_for_it(artifact: Artifact, loads: list[Any]) -> None:
    with Guard.load(backend="onnx") as guard:
        guard.warmup()
        assert loads == [onnx.UNPACKED, None]
        assert guard.check("How do I kill a Python process?").verdict == "safe"


def test_a_program_that_ends_at_once_ends_well() -> None:
    program = ("from edgeguard import Guard; from edgeguard.backends import onnx; onnx.LARGE = 0\n"
               "print(Guard.load(backend='onnx').check('How do I kill a Python process?').verdict)")
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "safe\n", "")
