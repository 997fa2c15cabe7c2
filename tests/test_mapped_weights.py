"""Large weights that a kernel of our own multiplies as they lie in the file; a small model stands for a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import write_small_artifact, write_small_model

from edgeguard.backends import background, onnx
from edgeguard.backends.base import FloatArray, Run
from edgeguard.backends.kernels import kernel, own_kernel
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.errors import ModelFileError
from edgeguard.machine import cpu
from edgeguard.store import Artifact

HEAD = (1, 5, 70, 191)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
pytestmark = pytest.mark.skipif(own_kernel(cpu(), "int4") is None, reason="no such kernel for this processor, or it was not built")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("mapped") / "source")


@pytest.fixture(params=["int8", "int4"])
def artifact(request: pytest.FixtureRequest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(onnx, "LARGE", 0)
    return write_small_artifact(source, tmp_path / request.param, request.param, HEAD)


def answer(backend: OnnxBackend) -> FloatArray:
    (node,) = backend.extend([(backend.open(IDS, Run()), IDS)], Run())
    return node.logits


def test_it_answers_as_the_runtimes_kernel_does(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = OnnxBackend(artifact, device="cpu")
    monkeypatch.setattr(onnx, "LARGE", artifact.size + 1)  # what lies between products is the same for both
    runtimes = OnnxBackend(artifact, device="cpu")
    assert mine.info.kernel.startswith("edgeguard avx2") and not mine.info.fallbacks and runtimes.info.kernel != mine.info.kernel
    if artifact.manifest.precision == "int8":
        assert np.array_equal(answer(mine), answer(runtimes)), "whole numbers, scaled in the same order"
    else:
        assert answer(mine) == pytest.approx(answer(runtimes), abs=2e-3)


def test_nothing_of_our_own_is_used_if_so_wanted(artifact: Artifact) -> None:
    backend = OnnxBackend(artifact, device="cpu", own=False)
    assert backend.info.kernel == kernel(cpu(), artifact.manifest.precision).name and not backend.info.fallbacks


def test_nothing_is_packed_later(artifact: Artifact) -> None:
    backend = OnnxBackend(artifact, device="cpu")
    answer(backend)
    before = backend._running
    background.settled()
    assert backend._running is before and backend._packing is None


def test_small_weights_get_the_runtimes_kernel(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "LARGE", artifact.size + 1)
    assert "edgeguard" not in OnnxBackend(artifact, device="cpu").info.kernel


def test_a_graph_that_it_does_not_take_is_loaded_by_the_runtime(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx.Session

    def refusing(*args: Any, own: bool = False, **named: Any) -> Any:
        if own:
            raise ModelFileError("a zero point other than 128")
        return original(*args, **named)

    monkeypatch.setattr(onnx, "Session", refusing)
    backend = OnnxBackend(artifact, device="cpu")
    assert backend.info.fallbacks == (onnx.OWN_FAILED,) and "edgeguard" not in backend.info.kernel
    assert np.isfinite(answer(backend)).all()


def test_a_damaged_file_is_an_error_whatever_the_kernel(artifact: Artifact) -> None:
    (artifact.folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelFileError):
        OnnxBackend(artifact, device="cpu")


def test_another_graph_than_ours_keeps_the_runtimes_ways(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export may hold other products of bytes, which saturate unless the runtime is told to take them as unsigned."""
    monkeypatch.setattr(onnx, "is_guard_graph", lambda _session: False)
    with pytest.raises(ModelFileError, match="no export with past keys"):
        OnnxBackend(artifact, device="cpu")
    monkeypatch.setattr(onnx, "graph_of", lambda *_: None)
    assert OnnxBackend(artifact, device="cpu").info.fallbacks == (onnx.OWN_FAILED,)
