"""Work that is taken up again: the journal, a file that grows by pieces, and a GGUF whose writer is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_gguf import SHAPE, RandomWeights
from tokenizers import Tokenizer
from vocabularies import write_smollm

from edgeguard.convert.gguf_file import write_gguf
from edgeguard.convert.journal import GrowingFile, Journal, journal_of, remove_journals
from edgeguard.errors import ModelFileError
from edgeguard.gguf_check import check_gguf
from edgeguard.weights import Rows, expected

IDENTITY = {"source": "abc", "precision": "q4_k_m"}
PIECES = {name: np.arange(100 * number, 100 * number + 50, dtype=np.int32) for number, name in enumerate("abcde")}


class TestJournal:
    def test_records_come_back_in_order(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j", IDENTITY)
        assert journal.finished("b") is None
        journal.finish("b", {"offset": 3, "text": "ü\n"})
        journal.finish("a", {})
        journal.close()
        again = Journal(tmp_path / "j", dict(reversed(IDENTITY.items())))
        assert list(again.records().items()) == [("b", {"offset": 3, "text": "ü\n"}), ("a", {})]
        assert again.finished("a") == {}
        again.close()

    def test_another_identity_begins_anew(self, tmp_path: Path) -> None:
        for identity in (IDENTITY, {**IDENTITY, "precision": "q8_0"}, IDENTITY):
            journal = Journal(tmp_path / "j", identity)
            assert journal.records() == {}
            journal.finish("a", {})
            journal.close()

    @pytest.mark.parametrize(("damage", "left"), [
        (lambda data: data[:-1], "ab"), (lambda data: data[:-9], "ab"), (lambda data: data + b"xyz", "abc"),
        (lambda data: data.replace(b'["b"', b'["q"'), "a"), (lambda data: data.replace(b'"abc"', b'"abd"'), ""),
        (lambda _: b"", ""), (lambda _: b"\xff\x00\n" * 9, ""),
        (lambda data: b"".join(data.splitlines(keepends=True)[::2]), ""),
    ])
    def test_what_follows_damage_is_unfinished(self, tmp_path: Path, damage: Callable[[bytes], bytes], left: str) -> None:
        journal = Journal(tmp_path / "j", IDENTITY)
        for name in "abc":
            journal.finish(name, {"offset": 1})
        journal.close()
        (tmp_path / "j").write_bytes(damage((tmp_path / "j").read_bytes()))
        for _ in range(2):  # what was taken up can be added to
            journal = Journal(tmp_path / "j", IDENTITY)
            assert "".join(journal.records()) == left
            left += str(len(left))
            journal.finish(left[-1], {})
            journal.close()


def grow(path: Path, identity: dict[str, str] | None = IDENTITY, until: str = "") -> list[str]:
    """Writes PIECES in two parts each, and gives the names of those that were not there yet; `until` fails half-way."""
    made = []
    with GrowingFile(path, identity) as file:
        for name, values in PIECES.items():
            if file.finished(name) is None:
                made.append(name)
                with file.piece(name, align=64, type="I32") as write:
                    write(values[:20])
                    if name == until:
                        raise RuntimeError("stopped")
                    write(values[20:])
            record = file.finished(name)
            assert record is not None and record["offset"] % 64 == 0 and record["length"] == values.nbytes and record["type"] == "I32"
        file.pad(64)
        assert file.complete(lambda written: written.stat().st_size) % 64 == 0
    return made


class TestGrowingFile:
    @pytest.fixture
    def wanted(self, tmp_path: Path) -> bytes:
        grow(tmp_path / "wanted", None)
        assert [path.name for path in tmp_path.iterdir()] == ["wanted"]
        return (tmp_path / "wanted").read_bytes()

    def stopped(self, path: Path, until: str = "d") -> None:
        with pytest.raises(RuntimeError, match="stopped"):
            grow(path, until=until)
        assert not path.exists()

    def test_finished_pieces_are_not_redone(self, tmp_path: Path, wanted: bytes) -> None:
        out = tmp_path / "out"
        self.stopped(out, "b")
        self.stopped(out, "d")
        assert grow(out) == ["d", "e"]
        assert out.read_bytes() == wanted
        assert grow(out) == []  # its journal still says that it is complete
        remove_journals(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]

    @pytest.mark.parametrize(("damage", "redone"), [
        (lambda data: data[:-60], "cde"),  # the last finished piece is cut
        (lambda data: data[:300] + b"\xff" + data[301:], "bcde"),
        (lambda data: data + b"half a piece", "de"),
        (lambda _: b"", "abcde"),
    ])
    def test_damaged_pieces_are_made_again(self, tmp_path: Path, wanted: bytes, damage: Callable[[bytes], bytes], redone: str) -> None:
        out, partial = tmp_path / "out", tmp_path / "out.partial"
        self.stopped(out)
        partial.write_bytes(damage(partial.read_bytes()))
        assert grow(out) == list(redone)
        assert out.read_bytes() == wanted

    def test_a_lost_file_or_journal_means_from_the_start(self, tmp_path: Path, wanted: bytes) -> None:
        out = tmp_path / "out"
        for lost in (tmp_path / "out.partial", journal_of(out)):
            self.stopped(out)
            lost.unlink()
            assert grow(out) == list("abcde")
            assert out.read_bytes() == wanted
            remove_journals(tmp_path)
            out.unlink()

    def test_another_identity_means_from_the_start(self, tmp_path: Path, wanted: bytes) -> None:
        out = tmp_path / "out"
        self.stopped(out)
        assert grow(out, {"source": "other"}) == list("abcde")
        assert grow(out) == list("abcde")
        assert out.read_bytes() == wanted

    def test_without_identity_nothing_stays(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="stopped"):
            grow(tmp_path / "out", None, until="d")
        assert not list(tmp_path.iterdir())

    def test_a_file_that_fails_its_check_gets_no_name(self, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def bad(_: Path) -> None:
            raise ModelFileError("bad")

        with pytest.raises(ModelFileError), GrowingFile(out, IDENTITY) as file:
            with file.piece("a") as write:
                write(PIECES["a"])
            file.complete(bad)
        assert not out.exists() and not (tmp_path / "out.partial").exists()
        assert grow(out) == list("abcde")


GGUF = replace(SHAPE, layers=4, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=256)
CHILD = """
import sys, time
from pathlib import Path
import test_journal
rows = test_journal.Counted.rows
def slow(self, name, index):
    time.sleep(0.02)
    return rows(self, name, index)
test_journal.Counted.rows = slow
test_journal.write(Path(sys.argv[1]))
"""


class Counted(RandomWeights):
    """Random weights that remember what they were asked for."""

    asked: list[str]

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        self.asked.append(name)
        return super().rows(name, index)


def write(folder: Path, name: str = "m", identity: dict[str, str] | None = IDENTITY) -> list[str]:
    """Writes `m.gguf`; gives the tensors that it asked the weights for."""
    tokenizer = folder / "tokenizer.json"
    weights = Counted(replace(GGUF, vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    weights.asked = []
    write_gguf(weights, tokenizer, folder / "m.gguf", type="q4_k_m", name=name, threads=1, identity=identity)
    return list(dict.fromkeys(weights.asked))


def kill_at(folder: Path, tensors: int) -> list[str]:
    """Starts a process that writes, kills it when so many tensors are finished, and gives their names."""
    journal = journal_of(folder / "m.gguf")
    with subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=Path(__file__).parent) as child:
        until = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") > tensors + 1):  # identity and header
            assert child.poll() is None, "it was too fast or failed"
            assert time.monotonic() < until
            time.sleep(0.005)
        child.kill()
    assert child.returncode != 0
    return [line.split(b'"')[1].decode() for line in journal.read_bytes().splitlines()[2:] if line.endswith(b"]")]


def test_a_killed_writing_is_taken_up(tmp_path: Path) -> None:
    write_smollm(tmp_path / "tokenizer.json")
    whole = list(expected(replace(GGUF, vocab=1)))
    assert write(tmp_path, identity=None) == whole
    wanted = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").unlink()
    before = 0
    for tensors in (2, 16):
        finished = kill_at(tmp_path, tensors)
        assert before < tensors <= len(finished) < len(whole)
        assert not (tmp_path / "m.gguf").exists()
        with pytest.raises(ModelFileError):
            check_gguf(tmp_path / "m.gguf.partial")
        before = len(finished)
    assert write(tmp_path) == whole[before:]
    assert (tmp_path / "m.gguf").read_bytes() == wanted
    assert write(tmp_path) == []
    assert write(tmp_path, name="other") == whole  # another header
    assert write(tmp_path, identity={**IDENTITY, "source": "other"}) == whole
