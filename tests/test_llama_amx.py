"""AMX in llama.cpp is used only where another process has survived it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeguard.backends import llama_amx


def built(tmp_path: Path, info: str = "AVX2 = 1 | AMX_INT8 = 1 |", content: bytes = b"code") -> Any:
    """A llama_cpp package that says this of its processor."""
    (tmp_path / "lib").mkdir(exist_ok=True)
    library = tmp_path / "lib" / "libggml-cpu.so"
    if not library.exists() or library.read_bytes() != content:
        library.write_bytes(content)
    return SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="0", llama_print_system_info=info.encode)


@pytest.fixture
def tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What the next tries end with; a try too many fails the test."""
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
    ends: list[int | None] = []
    monkeypatch.setattr(llama_amx, "_status", lambda: ends.pop(0))
    return ends


def test_without_amx_nothing_is_tried(tmp_path: Path, tries: list[int | None]) -> None:
    assert llama_amx.works(built(tmp_path, "AVX2 = 1 |"))
    assert tries == []


@pytest.mark.parametrize(("status", "works"), [(0, True), (-11, False), (1, False)])
def test_a_build_is_tried_once(tmp_path: Path, tries: list[int | None], status: int, works: bool) -> None:
    tries.append(status)
    assert llama_amx.works(built(tmp_path)) is works
    assert llama_amx.works(built(tmp_path)) is works  # a second try would find no end
    tries.append(0)
    assert llama_amx.works(built(tmp_path, content=b"compiled again"))


def test_a_try_that_says_nothing_is_not_kept(tmp_path: Path, tries: list[int | None]) -> None:
    tries += [None, 0]
    assert not llama_amx.works(built(tmp_path))
    assert llama_amx.works(built(tmp_path))


def test_a_damaged_record_is_none(tmp_path: Path, tries: list[int | None]) -> None:
    tries += [-11, 0]
    assert not llama_amx.works(built(tmp_path))
    for kept in (tmp_path / "home" / ".cache" / "llama-amx").iterdir():
        kept.write_bytes(b"\xff")
    assert llama_amx.works(built(tmp_path))


def test_a_program_without_its_own_python_goes_without(tmp_path: Path, tries: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not llama_amx.works(built(tmp_path))
    assert tries == []


def test_what_is_said_is_what_the_process_that_tries_came_to() -> None:
    llama = pytest.importorskip("llama_cpp")
    done = subprocess.run([sys.executable, "-m", "edgeguard.backends.llama_amx"], capture_output=True, timeout=120, check=False)
    assert llama_amx.works(llama) is (done.returncode == 0), done.stderr[-500:]
