"""The recipe in one command: its steps in their order, each once, taken up where they ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "recipe"))

import make


def test_steps_are_run_once_and_taken_up_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    failing = ["calibrate"]

    def run(command: list[str], *, check: bool) -> SimpleNamespace:
        step = Path(command[1]).stem if command[1] != "-m" else command[3]
        calls.append(step)
        if step in failing:
            return SimpleNamespace(returncode=2)
        if step == "calibrate":
            (Path(command[command.index("--model") + 1]) / "manifest.json").write_text(json.dumps({"calibration": {"slope": 1}}))
        else:
            made = Path(command[command.index("--out") + 1]) / ("final" if step == "train" else "")
            made.mkdir(parents=True, exist_ok=True)
            (made / {"build": "rows.jsonl.gz", "train": make.WRITTEN_LAST}.get(step, "manifest.json")).write_text("{}")
        if step == "train":
            assert str(tmp_path / "rows" / "rows.jsonl.gz") in command and command[-2:] == ["--epochs", "2"]
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(make.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path), "--epochs", "2"])
    with pytest.raises(SystemExit, match="status 2"):
        make.main()
    assert calls == ["build", "train", "convert", "convert", "calibrate"]
    calls.clear()
    failing.clear()
    make.main()
    assert calls == ["build", "calibrate", "calibrate"]
    calls.clear()
    make.main()
    assert calls == ["build"]
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        make.main()
    assert calls == ["build"], "other options are no continuation"
