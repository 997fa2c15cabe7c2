"""Pages of a mapped file that are let go are not lost."""

from __future__ import annotations

import mmap
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from edgeguard.backends.file_pages import let_go

SIZE = 8 << 20


def test_read_pages_are_let_go_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (SIZE // 256))
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) >= 0
        before = _resident(tmp_path)
        let_go(tmp_path)
        if sys.platform == "linux":
            assert before == SIZE and _resident(tmp_path) == 0
        assert mapped[:256] == mapped[-256:] == bytes(range(256))


@pytest.mark.skipif(sys.platform != "linux", reason="does nothing elsewhere")
def test_what_was_written_to_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(SIZE))
    with ExitStack() as open_:
        own, other = (open_.enter_context((tmp_path / name / "weights").open("rb")) for name in ("own", "other"))
        changed = open_.enter_context(mmap.mmap(own.fileno(), SIZE, access=mmap.ACCESS_COPY))
        kept = open_.enter_context(mmap.mmap(other.fileno(), SIZE, access=mmap.ACCESS_READ))
        changed[:5] = b"mine!"
        assert sum(kept[::4096]) == 0
        let_go(tmp_path / "own")
        assert changed[:5] == b"mine!" and _resident(tmp_path / "other") == SIZE


def _resident(folder: Path) -> int:
    if sys.platform != "linux":
        return 0
    return sum(each.rss for each in psutil.Process().memory_maps(grouped=False) if Path(each.path).parent == folder)
