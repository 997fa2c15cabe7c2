"""Memory that is gathered into huge pages holds what it held."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeguard.backends import background, huge_pages

LINES = """\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/program
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000200000-7f0040200000 rw-p 00000000 00:00 0
7f0050000000-7f0060000000 rw-p 00000000 08:02 173522 /models/model.onnx.data
7f0070000000-7f0080000000 r--p 00000000 00:00 0
7f0090000000-7f00a0000000 rw-p 00000000 00:00 0 [heap]
"""


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "maps").write_text(LINES)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(huge_pages, "MODE", tmp_path / "enabled")
    return tmp_path


def test_only_large_private_memory_counts(maps: Path) -> None:
    assert huge_pages.regions() == [(0x7F0000200000, 0x7F0040200000)]


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]"])
def test_what_the_system_decides_is_left_to_it(maps: Path, mode: str) -> None:
    (maps / "enabled").write_text(mode)
    assert huge_pages.regions() == []


def test_other_systems_are_left_alone(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.regions() == []


def test_little_memory_is_left_as_it_is(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_gather", lambda _: pytest.fail("gathered"))
    huge_pages.gather(huge_pages.regions())
    background.settled()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_what_was_written_is_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = huge_pages.regions()
    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.uint64)
    values[:] = np.arange(len(values))
    monkeypatch.setattr(huge_pages, "LEAST", 1 << 20)
    huge_pages.gather(before)
    values[:: 4096] += np.uint64(7)  # while it is gathered
    background.settled()
    wanted = np.arange(len(values), dtype=np.uint64)
    wanted[:: 4096] += np.uint64(7)
    np.testing.assert_array_equal(values, wanted)
