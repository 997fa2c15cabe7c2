"""Sources left out of training: how they are dealt out, and that each is measured by the model that did not see it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "recipe"))

import left_out
from measures import by_source
from row_file import write

SIZES = {"hate": 50, "chats": 40, "chats_long": 30, "code": 20, "news": 10}


def test_every_source_is_dealt_out_once_and_one_origin_stays_together() -> None:
    hands = left_out.dealt(SIZES, 3)
    assert sorted(name for hand in hands for name in hand) == sorted(SIZES)
    assert sum({"chats", "chats_long"} <= set(hand) for hand in hands) == 1
    assert sorted(sum(SIZES[name] for name in hand) for hand in hands) == [30, 50, 70]


def test_measures_of_known_rows() -> None:
    found = [{"source": source, "label": label, "score": score} for source, label, score in
             (("a", "unsafe", 0.9), ("a", "safe", 0.6), ("b", "unsafe", 0.2), ("b", "unsafe", 0.8), ("c", "safe", 0.1))]
    measured = by_source(found)
    assert list(measured) == ["all", "a", "b", "c"]
    assert (measured["all"]["rows"], measured["all"]["recall"], measured["all"]["fpr"]) == (5, 0.6667, 0.5)
    assert measured["b"] == {"rows": 2, "f1": 0.6667, "recall": 0.5, "auprc": 1.0, "ece": 0.5}
    assert set(measured["c"]) == {"rows", "fpr", "ece"}, "no F1 without anything unsafe"


def test_a_row_is_scored_by_the_fold_that_left_its_source_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[dict[str, Any]] = [{"id": f"{source}-{index}", "source": source, "label": "unsafe", "license": "MIT"}
                                  for source in ("one", "two") for index in range(2)]
    write(tmp_path / "val.jsonl.gz", held)
    calls: list[list[str]] = []

    def train(command: list[str], *, check: bool) -> None:
        """Scores high what it was trained on, low what was left out."""
        calls.append(command)
        out, left = Path(command[command.index("--out") + 1]), command[command.index("--left-out") + 1 :]
        write(out / left_out.SCORES, ({**row, "score": 0.1 if row["source"] in left else 0.9} for row in held))

    monkeypatch.setattr(left_out.subprocess, "run", train)
    given = ["--corpus", str(tmp_path), "--out", str(tmp_path / "out"), "--folds", "2", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["left_out.py", *given])
    left_out.main()
    assert len(calls) == 2 and all(call[call.index("--epochs") + 1] == "1" for call in calls)
    measured = json.loads((tmp_path / "out" / "left-out.json").read_text(encoding="utf-8"))
    assert measured["all"]["recall"] == 0 and measured["one"]["rows"] == 2
    assert "| all | 4 |" in capsys.readouterr().out
    left_out.main()
    assert len(calls) == 2, "a fold that is done is not trained again"
    monkeypatch.setattr(sys, "argv", ["left_out.py", *given[:-1], "2"])
    with pytest.raises(SystemExit):
        left_out.main()
    assert "fold-0 was begun with other options" in capsys.readouterr().err
    (tmp_path / "out" / "fold-0" / left_out.OPTIONS).unlink()
    with pytest.raises(SystemExit):
        left_out.main()
    assert "does not say with which options" in capsys.readouterr().err and len(calls) == 2
