"""`edgeguard calibrate`: what it measures, where it is kept, and whose calibration a guard follows. No model runs here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import make_artifact, own_home

from edgeguard import Guard, loading, profiles, store
from edgeguard.answers import Answers
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.calibration import Calibration
from edgeguard.cli import main
from edgeguard.errors import InputError, ModelFileError, StoreError
from edgeguard.store import Artifact, Manifest
from edgeguard.tokenizer import JsonTokenizer

TOKENIZER = store.built_in_folder() / "onnx" / "tokenizer.json"
SHIPPED = Calibration(0.5, 0.25, 0.375, "cd" * 32, 900)
PROFILE = "edgeguard-mini"
SECRET = "xyzzy-secret"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An artifact that judges by the number in a text: its logit."""
    folder = tmp_path / "model"
    made = make_artifact(folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    files = {**made.manifest.files, "tokenizer.json": store.record(folder / "tokenizer.json")}
    replace(made.manifest, files=files).write(folder)
    return folder


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models were loaded."""
    profile, tokenizer = profiles.get(PROFILE), JsonTokenizer.load(TOKENIZER)
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
    rows = {id_: row for row, id_ in enumerate(answers.ids)}
    seen: list[str] = []

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        row = np.full(len(rows), -60.0)
        said = re.search(r"z = (-?[\d.]+)", tokenizer.decode(ids))
        row[rows[answers.safe[0][0]]], row[rows[answers.unsafe[0][0]]] = 0.0, float(said[1]) if said else 0.0
        return row

    def opener(choice: loading.Choice, *_: Any) -> ScriptedBackend:
        seen.append(choice.model.name)
        return ScriptedBackend(logits, answers.ids)

    monkeypatch.setitem(loading._OPEN, "onnx", opener)
    monkeypatch.setattr(loading.Runtime, "installed", True)
    return seen


def write_rows(path: Path, rows: int = 240, slope: float = 0.4, offset: float = -1.0, unsafe: int | None = None) -> Path:
    """Rows whose labels follow sigmoid(slope * logit + offset)."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, rows).round(3)
    labels = generator.random(rows) < 1 / (1 + np.exp(-(slope * logits + offset)))
    if unsafe is not None:
        labels = np.arange(rows) < unsafe
    lines = [
        json.dumps({
            "messages": [{"role": "user", "content": f"{SECRET} {number}: z = {logit}"}], "role": "user",
            "label": "unsafe" if label else "safe", "categories": [], "categories_known": not label, "source": "own",
        })
        for number, (logit, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True))
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def run(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert main(["calibrate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def kept(home: Path) -> list[Path]:
    return sorted((home / ".config" / "calibrated").glob("*.json"))


def ship(folder: Path, calibration: Calibration | None = SHIPPED) -> None:
    replace(Manifest.read(folder), calibration=calibration).write(folder)


class TestCommand:
    def test_labels_that_the_scores_say_nothing_of_are_refused(self, model: Path, tmp_path: Path, home: Path, capsys: Any) -> None:
        blind = write_rows(tmp_path / "blind.jsonl", slope=0.08, offset=-1.5)
        assert main(["calibrate", str(blind), "--model", str(model)]) == 2
        assert "Are the labels right?" in capsys.readouterr().err and not kept(home)
        assert main(["calibrate", str(blind), "--model", str(model), "--dry-run"]) == 0

    def test_what_cannot_be_stored_is_not_measured(self, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: Any) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(loading, "open_choice", lambda *_, **__: pytest.fail("loaded"))
        assert main(["calibrate", str(rows), "--model", str(model)]) == 2
        assert "EDGEGUARD_HOME" in capsys.readouterr().err

    def test_a_gguf_whose_hash_cannot_be_remembered_keeps_its_calibration(self, tmp_path: Path, home: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
        weights = tmp_path / "some.gguf"
        weights.write_bytes(b"weights")
        bare = store.BareModel("gguf", tmp_path, weights)
        profile = profiles.get(PROFILE)
        own = Calibration(2.0, 0.5, 0.3, "0" * 64, 60)
        store.write_calibration(store.sha256(weights), profile.name, own)
        monkeypatch.setattr(store, "digest", lambda *_, **__: "")
        assert loading.calibration_of(bare, profile) == (own, "user")

    def test_what_is_fitted_is_kept_and_followed(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        result = run(capsys, rows, "--model", model, "--fpr", "0.1")
        (path,) = kept(home)
        assert result["stored"] == str(path)
        assert sorted(each.name for each in path.parent.iterdir() if each != path) in ([], [".lock"]), "nothing unfinished is left"
        fitted = Calibration.from_dict(result["calibration"])
        assert (fitted.slope, fitted.offset) == (pytest.approx(0.4, abs=0.15), pytest.approx(-1.0, abs=0.5))
        assert fitted.rows == 240 and fitted.data_sha256 == store.sha256(rows)
        with Guard.load(model) as guard:
            verdict = guard.check("z = 1.5", verdict_only=True)
            assert (verdict.threshold, verdict.score) == (fitted.threshold, fitted(verdict.raw_score))
            assert guard.check("z = 1.5", threshold=0.0).verdict == "unsafe", "a threshold that is given wins"
        with Guard.load(model, calibration="artifact") as guard:
            verdict = guard.check("z = 1.5")
            assert (verdict.threshold, verdict.score) == (0.5, verdict.raw_score)

    def test_it_gets_better_on_rows_that_were_not_fitted_on(self, model: Path, rows: Path, capsys: Any) -> None:
        before, after = (run(capsys, rows, "--model", model, "--dry-run")[name] for name in ("before", "after"))
        assert after["ece"] < before["ece"] / 2
        assert (before["threshold"], after["threshold"]) == (0.5, 0.5)
        assert before["tp"] + before["fp"] + before["fn"] + before["tn"] == after["tp"] + after["fp"] + after["fn"] + after["tn"] == 240
        for name in ("f1", "fpr", "recall"):
            low, high = after[f"{name}_95"]
            assert low < after[name] < high

    @pytest.mark.parametrize(("option", "value"), [("--fpr", 0.05), ("--fpr", 0.2), ("--recall", 0.8), ("--recall", 0.95)])
    def test_wishes(self, model: Path, rows: Path, capsys: Any, option: str, value: float) -> None:
        after, rate = run(capsys, rows, "--model", model, option, value, "--dry-run")["after"], option.strip("-")
        assert after[rate] == pytest.approx(value, abs=0.06)
        low, high = after[f"{rate}_95"]
        assert low <= value <= high

    def test_before_is_without_the_users_own(self, model: Path, rows: Path, capsys: Any) -> None:
        ship(model)
        first = run(capsys, rows, "--model", model, "--recall", "0.9")
        again = run(capsys, rows, "--model", model, "--recall", "0.9")
        assert first["before"] == again["before"]
        assert first["before"]["threshold"] == 0.375
        assert first["calibration"] == again["calibration"], "it is fitted on raw scores, whatever is in force"

    def test_report_for_people(self, model: Path, rows: Path, capsys: Any, home: Path) -> None:
        assert main(["calibrate", str(rows), "--model", str(model), "--dry-run"]) == 0
        out = capsys.readouterr().out
        for expected in ("240 of rows.jsonl", "sigmoid(0.", "on rows that were not fitted on (5 folds)", "threshold  0.500", "FPR ",
                         "dry run  nothing was stored"):
            assert expected in out
        assert SECRET not in out
        assert not kept(home)
        assert main(["calibrate", str(rows), "--model", str(model)]) == 0
        assert f"stored  {kept(home)[0]}" in capsys.readouterr().out

    @pytest.mark.parametrize(("size", "unsafe", "options", "says"), [
        (49, 20, [], "49 rows"), (100, 9, [], "9 of them unsafe"), (100, 95, [], "10 of each"),
        (100, 50, ["--fpr", "0.02"], "at least 63 safe rows; there are 50"), (100, 50, ["--fpr", "0"], "between 0 and 1"),
        (100, 50, ["--recall", "nan"], "between 0 and 1"),
    ])
    def test_rows_that_do_not_suffice(self, model: Path, tmp_path: Path, home: Path, opened: list[str], capsys: Any, size: int,
                                      unsafe: int, options: list[str], says: str) -> None:
        path = write_rows(tmp_path / "few.jsonl", size, unsafe=unsafe)
        assert main(["calibrate", str(path), "--model", str(model), *options]) == 2
        out, err = capsys.readouterr()
        assert (out, says in err) == ("", True), err
        assert not kept(home)
        assert not opened, "seen before anything is loaded"

    def test_labels_the_wrong_way_round(self, model: Path, tmp_path: Path, capsys: Any, home: Path) -> None:
        path = write_rows(tmp_path / "wrong.jsonl", slope=-1.0)
        assert main(["calibrate", str(path), "--model", str(model)]) == 2
        assert "Are the labels right?" in capsys.readouterr().err
        assert not kept(home)

    @pytest.mark.parametrize("arguments", [
        [], ["--fpr", "0.1"], ["rows.jsonl", "--fpr", "0.1", "--recall", "0.9"], ["rows.jsonl", "--forget"], ["--forget", "--dry-run"],
        ["--forget", "--recall", "0.9"], ["no-such.jsonl"], ["rows.jsonl", "--fpr", "x"], ["rows.jsonl", "--model", "no-such"],
    ])
    def test_usage(self, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]) -> None:
        monkeypatch.chdir(rows.parent)
        assert main(["calibrate", *arguments, *(() if "--model" in arguments else ("--model", str(model)))]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("edgeguard: error: ")) == ("", 1)

    def test_a_row_that_cannot_be_judged_is_named_and_nothing_kept(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        long = json.loads(rows.read_text().splitlines()[0])
        long["messages"][0]["content"] = SECRET * 9000
        rows.write_text(rows.read_text() + json.dumps(long) + "\n")
        assert main(["calibrate", str(rows), "--model", str(model)]) == 2
        err = capsys.readouterr().err
        assert "line 241 cannot be judged" in err and SECRET not in err.replace(str(rows), "")
        assert not kept(home)


class TestForget:
    def test_it_is_gone(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        stored = run(capsys, rows, "--model", model)["stored"]
        assert run(capsys, "--forget", "--model", model)["removed"] == stored
        assert not kept(home)
        assert main(["calibrate", "--forget", "--model", str(model)]) == 0
        assert capsys.readouterr().out == "There was no calibration to remove.\n"

    def test_the_artifacts_own(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        ship(model)
        run(capsys, rows, "--model", model)
        assert run(capsys, "--forget", "--artifact", "--model", model)["removed"] == str(model / "manifest.json")
        assert Manifest.read(model).calibration is None
        assert len(kept(home)) == 1
        assert run(capsys, "--forget", "--artifact", "--model", model)["removed"] is None


class TestArtifact:
    def test_the_manifest_gets_it_and_the_model_stays_the_same(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        before = Artifact.read(model)
        result = run(capsys, rows, "--model", model, "--recall", "0.9", "--artifact")
        after = Artifact.read(model)
        assert after.manifest.calibration == Calibration.from_dict(result["calibration"])
        assert replace(after.manifest, calibration=None) == before.manifest
        assert store.digest(after) == store.digest(before), "what is cached for this model stays valid"
        assert store.verify(model)[0][1].ok
        assert not kept(home)
        with Guard.load(model) as guard:
            assert guard.calibration == after.manifest.calibration

    def test_a_calibration_of_the_users_own_that_hides_it_is_named(self, model: Path, rows: Path, home: Path, capsys: Any) -> None:
        assert run(capsys, rows, "--model", model, "--artifact")["shadowed"] is None
        own = run(capsys, rows, "--model", model)
        assert own["shadowed"] is None
        assert run(capsys, rows, "--model", model, "--artifact")["shadowed"] == own["stored"]
        assert main(["calibrate", str(rows), "--model", str(model), "--artifact"]) == 0
        assert "is yours and counts first" in capsys.readouterr().out

    def test_folders_that_cannot_be_written(self, model: Path, rows: Path, opened: list[str], capsys: Any,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda place, *_: place != model)
        assert main(["calibrate", str(rows), "--model", str(model), "--artifact"]) == 2
        assert "cannot be written" in capsys.readouterr().err
        assert not opened
        assert main(["calibrate", str(rows), "--model", str(model), "--artifact", "--dry-run"]) == 0

    def test_models_without_a_manifest(self, tmp_path: Path, rows: Path, capsys: Any) -> None:
        (tmp_path / "lone.gguf").write_bytes(b"GGUF" + bytes(100))
        for name in ("config.json", "model.onnx", "tokenizer.json"):
            (tmp_path / "export").mkdir(exist_ok=True)
            (tmp_path / "export" / name).write_text("{}")
        assert main(["calibrate", str(rows), "--model", str(tmp_path / "lone.gguf"), "--profile", PROFILE, "--artifact"]) == 2
        assert "no manifest" in capsys.readouterr().err
        assert main(["calibrate", str(rows), "--model", str(tmp_path / "export"), "--profile", PROFILE]) == 2
        assert "told from other models" in capsys.readouterr().err

    def test_one_that_was_changed_meanwhile(self, model: Path, rows: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        real = loading.open_choice

        def change(*given: Any, **options: Any) -> loading.Parts:
            parts = real(*given, **options)
            (model / "model.onnx").write_bytes(b"other")
            manifest = Manifest.read(model)
            replace(manifest, files={**manifest.files, "model.onnx": store.record(model / "model.onnx")}).write(model)
            return parts

        monkeypatch.setattr(loading, "open_choice", change)
        assert main(["calibrate", str(rows), "--model", str(model), "--artifact"]) == 2
        assert "changed while" in capsys.readouterr().err
        assert Manifest.read(model).calibration is None


class TestWhose:
    own = Calibration(2.0, 1.0, 0.75, "ef" * 32, 100)

    @pytest.fixture(autouse=True)
    def _stored(self, model: Path) -> None:
        store.write_calibration(store.digest(Artifact.read(model)), PROFILE, self.own)

    @pytest.mark.parametrize(("whose", "shipped", "forgotten", "expected"), [
        ("user", True, False, own), ("user", True, True, SHIPPED), ("user", False, True, Calibration()), ("user", False, False, own),
        ("artifact", True, False, SHIPPED), ("artifact", False, False, Calibration()), ("none", True, False, Calibration()),
    ])
    def test_order(self, model: Path, whose: Any, shipped: bool, forgotten: bool, expected: Calibration) -> None:
        if shipped:
            ship(model)
        if forgotten:
            assert store.forget_calibration(store.digest(Artifact.read(model)), PROFILE)
        with Guard.load(model, calibration=whose) as guard:
            assert guard.calibration == expected
            verdict = guard.check("z = 0.5", verdict_only=True)
            assert (verdict.threshold, verdict.score) == (expected.threshold, expected(verdict.raw_score))
            assert next(guard.check_many(["z = 0.5"], verdict_only=True)).threshold == expected.threshold

    def test_another_model_or_profile_never_gets_it(self, model: Path) -> None:
        (model / "model.onnx").write_bytes(b"other weights")
        manifest = Manifest.read(model)
        replace(manifest, files={**manifest.files, "model.onnx": store.record(model / "model.onnx")}).write(model)
        with Guard.load(model) as guard:
            assert guard.calibration == Calibration()
        assert store.read_calibration("ab" * 32, PROFILE) is None
        assert store.read_calibration("", PROFILE) is None

    def test_a_backend_of_ones_own_has_none(self, model: Path) -> None:
        ship(model)
        backend = Guard.scripted(lambda prompt: "safe", model)._backend
        assert Guard.load(model, backend=backend).calibration == Calibration()

    @pytest.mark.parametrize("whose", ["", "mine", None, 1, []])
    def test_owners_that_there_are_not(self, model: Path, whose: Any) -> None:
        with pytest.raises(InputError, match="user, artifact, none"):
            Guard.load(model, calibration=whose)

    def test_a_record_that_is_damaged_is_an_error_until_it_is_forgotten(self, model: Path, home: Path, capsys: Any) -> None:
        (path,) = kept(home)
        whole = path.read_text()
        data = json.loads(whole)
        for wrong in ("", "{", "[]", "1", "null", whole[:-20], whole + " " * (1 << 16), "[" * 100_000, whole.replace('"slope"', '"offset"'),
                      *(json.dumps({**data, **change}) for change in (
                          {"format": 2}, {"model": "ab" * 32}, {"profile": "llama-guard-2"}, {"calibration": None}, {"more": 1},
                          {"calibration": {**data["calibration"], "slope": 0}},
                          {"calibration": {**data["calibration"], "threshold": float("nan")}},
                          {"calibration": {**data["calibration"], "rows": 0}}))):
            path.write_text(wrong)
            with pytest.raises(StoreError, match="--forget"):
                Guard.load(model)
        with Guard.load(model, calibration="artifact") as guard:
            assert guard.calibration == Calibration()
        assert main(["doctor", "--no-probe", "--model", str(model)]) == 2
        assert "cannot be read" in capsys.readouterr().out
        assert main(["calibrate", "--forget", "--model", str(model)]) == 0
        with Guard.load(model) as guard:
            assert guard.calibration == Calibration()

    def test_what_is_no_file_is_an_error(self, model: Path, home: Path) -> None:
        (path,) = kept(home)
        path.unlink()
        path.mkdir()
        with pytest.raises(StoreError):
            Guard.load(model)

    def test_doctor_and_models_tell(self, model: Path, home: Path, capsys: Any) -> None:
        model.rename(home / "own")
        assert main(["doctor", "--no-probe", "--model", "own"]) == 0
        assert "yours, fitted on 100 rows: slope 2, offset 1, unsafe from 0.75\n" in capsys.readouterr().out
        assert main(["models", "list", "--json"]) == 0
        listed = {entry["name"]: entry["models"] for entry in json.loads(capsys.readouterr().out)}
        assert listed["own"][0]["calibration"] == "user"
        store.forget_calibration(store.digest(Artifact.read(home / "own")), PROFILE)
        for shipped, says, word in ((SHIPPED, "the artifact's, fitted on 900 rows", "artifact"), (None, "none: the model's own", "none")):
            ship(home / "own", shipped)
            assert main(["doctor", "--no-probe", "--model", "own", "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["choice"]["calibration"]["of"] == word
            assert main(["doctor", "--no-probe", "--model", "own"]) == 0
            assert says in capsys.readouterr().out
            assert main(["models"]) == 0
            assert re.search(rf"^own .* {word} ", capsys.readouterr().out, re.MULTILINE)


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "file" / "home"))
    yield


@pytest.mark.usefixtures("unwritable")
def test_a_home_that_cannot_be_written(model: Path, rows: Path, capsys: Any) -> None:
    with pytest.raises(StoreError, match="EDGEGUARD_HOME"):
        store.write_calibration("ab" * 32, PROFILE, SHIPPED)
    assert main(["calibrate", str(rows), "--model", str(model)]) == 2
    assert "EDGEGUARD_HOME" in capsys.readouterr().err
    with Guard.load(model) as guard:
        assert guard.calibration == Calibration()


def test_manifests_are_held_to_the_same(model: Path) -> None:
    ship(model)
    plain = Manifest.read(model).to_dict()
    assert "calibration" not in make_artifact(model.parent / "plain").manifest.to_dict(), "older versions read those still"
    for name, value in (("slope", 0), ("slope", float("nan")), ("offset", None), ("threshold", 1.5), ("data_sha256", "x"), ("rows", 0)):
        with pytest.raises(ModelFileError, match=f"'calibration' is wrong: {name}"):
            Manifest.from_dict({**plain, "calibration": {**plain["calibration"], name: value}})
    wrongs: tuple[Any, ...] = (None, [], {}, {**plain["calibration"], "more": 1})
    for wrong in wrongs:
        with pytest.raises(ModelFileError, match="'calibration' is wrong"):
            Manifest.from_dict({**plain, "calibration": wrong})
