"""`edgeguard tune`: what is measured, when something is chosen, what is kept, and who follows it. No real time passes here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact, own_home, own_mini

from edgeguard import loading, machine, store
from edgeguard.cli import main
from edgeguard.cli import tune as command
from edgeguard.errors import InferenceError, ModelFileError, ModelMemoryError, RuntimeMissingError, StoreError
from edgeguard.store import Setting, Tuned

Seconds = Mapping[str, Sequence[float] | Exception]
ANSWERS = ["safe", "unsafe\nS1"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading.Runtime, "installed", True)
    monkeypatch.setattr(machine, "threads", lambda: machine.Threads(4, "a test"))
    monkeypatch.setattr(machine, "most_threads", lambda: 8)
    return own_mini(tmp_path, monkeypatch)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`judge(seconds)` scripts the rounds of candidates by backend and threads ("onnx 4"); gives the list of who was asked."""

    def script(seconds: Seconds, answers: Mapping[str, list[str]] | None = None) -> list[str]:
        asked: list[str] = []

        def judged(choice: loading.Choice, profile: str | None) -> tuple[float, list[str]]:
            name = f"{choice.backend} {choice.threads}{' packed' if choice.prepacked else ''}"
            given = seconds.get(name, [9.0] * 20)
            asked.append(name)
            if isinstance(given, Exception):
                raise given
            return given[(asked.count(name) - 1) % len(given)], (answers or {}).get(name, ANSWERS)

        monkeypatch.setattr(command, "judged", judged)
        return asked

    return script


def chosen(tuned: Tuned) -> str:
    return f"{tuned.setting.backend} {tuned.setting.threads}"


def test_rounds_are_interleaved_and_begin_with_another_one_each_time(judge: Callable[..., list[str]]) -> None:
    names = [f"{backend} {threads}" for backend in ("onnx", "llama") for threads in (4, 2, 8)]
    asked = judge({name: [1.0, 1.0, 1.0] for name in names})
    tuned = command.measure(None, None, 3)
    assert asked == names + names[1:] + names[:1] + names[2:] + names[:2]
    assert [each.title for each in tuned.candidates][:2] == ["onnx int8, 4 threads", "onnx int8, 2 threads"]
    assert [each.milliseconds for each in tuned.candidates] == [1000.0] * 6


@pytest.mark.parametrize(("rounds", "name", "says"), [
    ({"onnx 4": [1, 1, 1], "llama 4": [0.5, 0.6, 0.5], "onnx 2": [0.9, 0.9, 0.9]}, "llama 4", "2.0 times as fast"),
    ({"onnx 4": [1, 1, 1], "onnx 8": [0.7, 0.7, 0.7]}, "onnx 8", "each of 3 rounds"),
    ({"onnx 4": [1, 1, 1], "llama 4": [0.96, 0.97, 0.96]}, "onnx 4", "5%"),  # too little
    ({"onnx 4": [1, 1, 1], "llama 4": [0.5, 0.5, 0.99]}, "onnx 4", "every round"),  # not always: noise
    ({"onnx 4": [1, 3, 1], "llama 4": [0.9, 2.7, 0.9]}, "llama 4", "1.1 times"),  # the machine was slow, both were
    ({"onnx 4": [1, 1, 1]}, "onnx 4", "only one"),
])
def test_only_what_is_ahead_in_every_round_is_chosen(judge: Callable[..., list[str]], rounds: Seconds, name: str, says: str) -> None:
    judge(rounds)
    tuned = command.measure(None, None, 3)
    assert chosen(tuned) == name
    assert says in tuned.reason


def test_what_is_far_behind_is_measured_once(judge: Callable[..., list[str]]) -> None:
    asked = judge({"onnx 4": [1, 1, 1], "llama 4": [1.7, 0.1, 0.1], "llama 8": [1.5, 1.5, 1.5]})
    tuned = command.measure(None, None, 3)
    assert (asked.count("llama 4"), asked.count("llama 8"), asked.count("onnx 2")) == (1, 3, 1)
    assert chosen(tuned) == "onnx 4"
    left_out = {each.title: each.left_out for each in tuned.candidates}
    assert left_out["llama int8, 4 threads"] == "1.7 times as slow as the fastest in the first round"
    assert left_out["llama int8, 8 threads"] == ""


def test_a_slow_default_is_still_what_the_others_are_held_against(judge: Callable[..., list[str]]) -> None:
    asked = judge({"onnx 4": [5, 5, 5], "llama 4": [1, 1, 1]})
    tuned = command.measure(None, None, 3)
    assert asked.count("onnx 4") == 3
    assert (chosen(tuned), tuned.reason) == ("llama 4", "5.0 times as fast as onnx int8, 4 threads, and ahead in each of 3 rounds")


def test_who_answers_otherwise_is_left_out_however_fast(judge: Callable[..., list[str]]) -> None:
    judge({"onnx 4": [1, 1], "llama 4": [0.1, 0.1]}, {"llama 4": ["safe", "unsafe\nS2"]})
    tuned = command.measure(None, None, 2)
    assert chosen(tuned) == "onnx 4"
    left_out = {each.title: each.left_out for each in tuned.candidates}
    assert left_out["llama int8, 4 threads"] == "answers otherwise than onnx int8, 4 threads for 1 of 2 texts"


@pytest.mark.parametrize(("seconds", "prepacked"), [(0.96, True), (1.04, True), (1.06, False)])
def test_packed_weights_are_taken_when_asked_for_and_as_fast(judge: Callable[..., list[str]], seconds: float, prepacked: bool) -> None:
    asked = judge({"onnx 4": [1, 1], "onnx 4 packed": [seconds, seconds]})
    assert not command.measure(None, None, 2).setting.prepacked
    assert "onnx 4 packed" not in asked
    tuned = command.measure(None, None, 2, prepacked=True)
    assert (tuned.setting.prepacked, tuned.setting.threads) == (prepacked, 4)
    assert "llama 4 packed" not in asked
    assert "onnx int8 prepacked, 4 threads" in {each.title for each in tuned.candidates}


def test_what_does_not_fit_is_left_out_with_the_reason(judge: Callable[..., list[str]]) -> None:
    large = ModelMemoryError("needs 7 GiB; 3 GiB are free.")
    judge({"onnx 4": large, "onnx 2": large, "onnx 8": large, "llama 4": [2, 2], "llama 8": [1, 1]})
    tuned = command.measure(None, None, 2)
    assert chosen(tuned) == "llama 8"
    assert [each.left_out for each in tuned.candidates[:3]] == [str(large)] * 3
    assert tuned.candidates[0].milliseconds is None


def test_when_nothing_runs_the_first_error_is_told(judge: Callable[..., list[str]], home: Path, capsys: Any) -> None:
    names = [f"{backend} {threads}" for backend in ("onnx", "llama") for threads in (4, 2, 8)]
    judge({name: InferenceError(f"{name} failed.") for name in names})
    with pytest.raises(InferenceError, match="onnx 4 failed"):
        command.measure(None, None, 2)
    assert main(["tune"]) == 2
    assert "onnx 4 failed" in capsys.readouterr().err
    assert not (home / ".cache").exists()


def test_nothing_to_measure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelFileError, match="manifest"):
        list(command.candidates(str(tmp_path)))
    monkeypatch.setattr(loading.Runtime, "installed", False)
    with pytest.raises(RuntimeMissingError, match="cpu"):
        list(command.candidates(None))


def test_auto_follows_and_explicit_arguments_win(judge: Callable[..., list[str]], capsys: Any) -> None:
    judge({"onnx 4": [2, 2, 2], "llama 8": [1, 1, 1]})
    assert loading.choose().backend == "onnx"
    assert main(["tune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["backend"] == "llama"
    choice = loading.choose()
    assert (choice.backend, choice.threads, choice.model.kind) == ("llama", 8, "gguf")
    assert "measured on this machine" in choice.reason and "2.0 times as fast" in choice.reason
    assert loading.choose(backend="onnx").threads is None
    assert loading.choose(device="cpu").backend == "onnx", "a device that is named was not what was measured"


def test_threads_of_the_choice_reach_the_backend_unless_given(judge: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    judge({"onnx 4": [2, 2, 2], "onnx 8": [1, 1, 1]})
    assert main(["tune"]) == 0
    seen: list[int | None] = []

    def opened(choice: loading.Choice, device: str, threads: int | None, cache: object) -> Any:
        seen.append(threads)
        raise InferenceError("enough")

    monkeypatch.setattr(loading, "_tokenizer", lambda path: None)
    monkeypatch.setitem(loading._OPEN, "onnx", opened)
    for threads in (None, 3):
        with pytest.raises(InferenceError, match="enough"):
            loading.load_parts(threads=threads)
    assert seen == [8, 3]


def test_another_machine_runtime_or_model_means_the_default(judge: Callable[..., list[str]], mini: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    judge({"onnx 4": [2, 2], "llama 4": [1, 1]})
    assert main(["tune"]) == 0
    for name, changed in (("cpu", lambda: machine.Cpu("other", "", "arm64", frozenset())),
                          ("runtimes", list), ("threads", lambda: machine.Threads(2, "a quota"))):
        with monkeypatch.context() as patch:
            patch.setattr(machine, name, changed)
            assert loading.choose().backend == "onnx"
            assert "before something changed" in loading.tuned_record(None)[1]
    assert loading.choose().backend == "llama"
    monkeypatch.setattr(loading.Runtime, "installed", property(lambda runtime: runtime.backend == "onnx"))
    assert loading.choose().backend == "onnx", "what was chosen has gone"
    monkeypatch.setattr(loading.Runtime, "installed", True)
    make_artifact(mini / "more", "onnx", "more")
    assert loading.tuned_record(None)[1] == "it was never measured here"


def test_damage_means_the_default(judge: Callable[..., list[str]], home: Path) -> None:
    judge({"onnx 4": [2, 2], "llama 4": [1, 1]})
    assert main(["tune"]) == 0
    (path,) = (home / ".cache" / "tuned").iterdir()
    whole = path.read_text()
    data = json.loads(whole)
    for wrong in ("", "{", "[]", "1", whole[:-20], whole.replace('"threads": 4', '"threads": 5'), json.dumps({**data, "format": 2}),
                  json.dumps({**data, "key": []}), json.dumps({**data, "tuned": {}}), "[" * 100_000, whole + " " * (1 << 20)):
        path.write_text(wrong)
        assert loading.choose().backend == "onnx"
        assert "cannot be read" in loading.tuned_record(None)[1]
    path.write_text(whole)
    assert loading.choose().backend == "llama"


@pytest.mark.parametrize("setting", [{"threads": 0}, {"threads": True}, {"threads": "4"}, {"backend": 1}, {"prepacked": 0}, {"more": 1}])
def test_a_record_with_a_wrong_setting_is_none(home: Path, setting: dict[str, Any]) -> None:
    path = home / "t.json"
    tuned = Tuned(Setting("onnx", "ab", 4), "because", "2026-01-01T00:00:00+00:00", ())
    store.write_tuned(path, {"a": "b"}, tuned)
    assert store.read_tuned(path, {"a": "b"}) == (tuned, "")
    plain = {"backend": "onnx", "artifact": "ab", "threads": 4, "prepacked": False, **setting}
    with pytest.raises((TypeError, ValueError)):
        Tuned.from_dict({**tuned.to_dict(), "setting": plain})


def test_a_store_that_cannot_be_written_is_an_error_of_tune(judge: Callable[..., list[str]], tmp_path: Path, capsys: Any,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "file" / "home"))
    judge({"onnx 4": [1, 1, 1]})
    with pytest.raises(StoreError):
        loading.keep_tuned(None, command.measure(None, None, 2))
    assert main(["tune"]) == 2
    assert "EDGEGUARD_HOME" in capsys.readouterr().err


def test_doctor_tells_what_was_measured(judge: Callable[..., list[str]], capsys: Any) -> None:
    assert main(["doctor", "--no-probe"]) == 0
    assert "no, it was never measured here: edgeguard tune\n" in capsys.readouterr().out
    assert main(["doctor", "--no-probe", "--json"]) == 0
    assert "edgeguard tune" in json.loads(capsys.readouterr().out)["choice"]["tuned"]["error"]
    judge({"onnx 4": [2, 2, 2], "llama 8": [1, 1, 1]})
    assert main(["tune"]) == 0
    assert "chosen  llama int8, 8 threads: 2.0 times as fast" in capsys.readouterr().out
    assert main(["doctor", "--no-probe", "--model", "mini"]) == 0
    out = capsys.readouterr().out
    assert "llama, 8 threads: measured on this machine on 20" in out
    assert "llama int8, 8 threads: 1000.0 ms a verdict" in out
    assert "onnx int8, 2 threads: 9000.0 ms a verdict; left out: 9.0 times as slow" in out
    assert "the artifact has its own (user); 0 in the cache" in out
