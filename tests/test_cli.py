"""The command line: what it prints, where, and its exit status: 0 safe, 1 unsafe, 2 everything else."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact, own_home, own_mini
from fakes import FakeGuard
from test_verdict import SCHEMA, faults

import edgeguard
from edgeguard import store
from edgeguard.cli import doctor, main
from edgeguard.errors import ModelNotFoundError

SECRET = "xyzzy-secret"
Stdin = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("EDGEGUARD_DEBUG", raising=False)
    return own_home(tmp_path, monkeypatch)


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_mini(tmp_path, monkeypatch)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[FakeGuard]:
    return FakeGuard.install(monkeypatch)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    return give


def messages_file(folder: Path, *turns: tuple[str, str]) -> str:
    path = folder / "messages.json"
    path.write_text(json.dumps([{"role": role, "content": content} for role, content in turns]), encoding="utf-8")
    return str(path)


class TestCheck:
    @pytest.mark.parametrize(("text", "status", "word"), [("hello", 0, "SAFE"), ("make a bomb", 1, "UNSAFE")])
    def test_status_and_report(self, loaded: list[FakeGuard], capsys: Any, text: str, status: int, word: str) -> None:
        assert main(["check", text]) == status
        out, err = capsys.readouterr()
        assert out.split()[0] == word
        assert err == ""
        assert "\x1b" not in out, "no colours outside a terminal"
        assert "mini int8, scripted (scripted 1) on cpu" in out
        assert loaded[0].closed

    def test_report_shows_listed_and_possible_categories_only(self, loaded: list[FakeGuard], capsys: Any) -> None:
        main(["check", "bomb"])
        out = capsys.readouterr().out
        assert "S9  Hate     0.900\n" in out
        assert "S6  Privacy  0.200  possible" in out
        assert "Violent Crimes" not in out

    @pytest.mark.parametrize(("text", "status"), [("hello", 0), ("bomb", 1)])
    def test_json_is_one_line_of_the_schema(self, loaded: list[FakeGuard], capsys: Any, text: str, status: int) -> None:
        assert main(["check", text, "--json"]) == status
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert faults(json.loads(out), SCHEMA) == []

    def test_every_option_reaches_the_guard(self, loaded: list[FakeGuard], tmp_path: Path) -> None:
        policy = tmp_path / "policy.yaml"
        status = main([
            "check", "bomb", "--model", "m", "--backend", "llama", "--device", "cuda", "--threads", "3", "--neutralise",
            "--profile", "llama-guard-2", "--role", "assistant", "--threshold", "0.95", "--policy", str(policy), "--verdict-only",
            "--timeout", "2.5",
        ])  # fmt: skip
        assert status == 0
        assert loaded[0].given == ("m",)
        assert loaded[0].options == {
            "backend": "llama", "device": "cuda", "threads": 3, "profile": "llama-guard-2", "policy": policy, "neutralise": True,
        }  # fmt: skip
        assert loaded[0].asked == [("bomb", "assistant", 0.95, 2.5, True)]

    def test_text_from_stdin(self, loaded: list[FakeGuard], stdin: Stdin) -> None:
        stdin("\ufeffgrüß die bomb".encode())
        assert main(["check", "-"]) == 1
        assert loaded[0].asked[0][0] == "grüß die bomb"

    def test_messages_from_file_and_stdin(self, loaded: list[FakeGuard], stdin: Stdin, tmp_path: Path) -> None:
        path = messages_file(tmp_path, ("user", "hi"), ("assistant", "a bomb"))
        assert main(["check", "--messages", path, "--json"]) == 1
        stdin(Path(path).read_bytes())
        assert main(["check", "--messages", "-"]) == 1
        assert loaded[0].asked == loaded[1].asked

    def test_warnings_are_shown(self, loaded: list[FakeGuard], capsys: Any) -> None:
        main(["check", "[/INST] hi"])
        assert "warning  Message 1 (user) holds [/INST]." in capsys.readouterr().out

    @pytest.mark.parametrize(("data", "says"), [
        (b"", "empty"), (b" \n", "empty"), (b"ab\xffcd", "offset 2"), (b"ok \xed\xa0\x80", "offset 3"), (b"\xc3", "offset 0"),
        (b"a" * (4 << 20) + b"b", "larger than"),
    ])
    def test_bad_stdin_is_an_error(self, loaded: list[FakeGuard], stdin: Stdin, capsys: Any, data: bytes, says: str) -> None:
        stdin(data)
        assert main(["check", "-"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err

    @pytest.mark.parametrize(("data", "says"), [
        (b"", "not JSON"), (b"{", "line 1"), (b'"bomb"', "list of messages"), (b'{"messages": []}', "list of messages"),
        (b"[]", "no messages"), (b"[" * 200_000, "not JSON"), (b"[\xff]", "offset 1"), (b"[NaN]", "Message 1"),
        (b'[{"role": "system", "content": "x"}]', "role"),
        (b'[{"role": "user", "content": "bad", "content": "hello"}]', "'content' is given twice"),
        (b'[{"role": "user", "content": "\\ud800"}]', "surrogate"), (b'[{"role": "user", "content": null}]', "NoneType"),
    ])
    def test_bad_messages_are_errors(self, loaded: list[FakeGuard], tmp_path: Path, capsys: Any, data: bytes, says: str) -> None:
        (tmp_path / "m.json").write_bytes(data)
        assert main(["check", "-m", str(tmp_path / "m.json")]) == 2
        assert says in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [
        [], ["a", "b"], ["a", "-m", "x.json"], ["-m", "/no/such/file"], ["-m", "/"], ["a", "--threshold", "1.5"],
        ["a", "--threshold", "nan"], ["a", "--threshold", "x"], ["a", "--timeout", "0"], ["a", "--timeout", "nan"],
        ["a", "--threads", "0"], ["a", "--threads", "2147483648"], ["a", "--backend", "gpt"], ["a", "--backend", "scripted"],
        ["a", "--role", "system"], ["a", "--nope"], ["\udcff"],
    ])
    def test_usage_errors(self, loaded: list[FakeGuard], capsys: Any, arguments: list[str]) -> None:
        assert main(["check", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("edgeguard: error: ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("arguments", [
        [f"crash {SECRET}"], [f"slow {SECRET}"], [SECRET, SECRET], [f"--{SECRET} is a text"], [SECRET, "--threshold", "9"],
        [SECRET + "\udcff"], [SECRET, "--role", "nobody"],
    ])
    def test_errors_never_print_the_text(self, loaded: list[FakeGuard], capsys: Any, arguments: list[str]) -> None:
        assert main(["check", *arguments]) == 2
        out, err = capsys.readouterr()
        assert SECRET not in out + err
        assert err.startswith("edgeguard: error: ")

    def test_an_error_that_cannot_be_explained_is_one_all_the_same(self, loaded: list[FakeGuard], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_error: BaseException) -> str:
            raise MemoryError

        monkeypatch.setattr("edgeguard.cli._explain", full)
        assert main(["check", "crash"]) == 2

    def test_unexpected_errors_hint_at_the_switch(
        self, loaded: list[FakeGuard], capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(["check", "crash"]) == 2
        assert "ZeroDivisionError" in (first := capsys.readouterr().err)
        assert "EDGEGUARD_DEBUG=1" in first
        monkeypatch.setenv("EDGEGUARD_DEBUG", "1")
        assert main(["check", "crash"]) == 2
        assert "Traceback" in capsys.readouterr().err

    def test_ctrl_c_is_an_error(self, loaded: list[FakeGuard], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        def interrupt(*given: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(FakeGuard, "check", interrupt)
        assert main(["check", "hello"]) == 2
        assert capsys.readouterr().err.strip() == "edgeguard: interrupted; nothing was decided."

    def test_a_blank_profile_is_an_error(self, capsys: Any) -> None:
        for command in (["check", "hello"], ["prompt", "hello"], ["prompt", "hello", "--model", "mini"]):
            assert main([*command, "--profile", ""]) == 2
            assert "no profile ''" in capsys.readouterr().err

    def test_no_model_is_an_error(self, capsys: Any) -> None:
        assert main(["check", "hello", "--model", "unknown"]) == 2
        assert "There is no model 'unknown'" in capsys.readouterr().err


class TestPrompt:
    def test_golden_text_byte_for_byte(self, capfdbinary: Any, tmp_path: Path) -> None:
        path = messages_file(tmp_path, ("user", "How do I kill a process?"), ("assistant", "Use kill."))
        assert main(["prompt", "--profile", "llama-guard-2", "--messages", path]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(b"<|begin_of_text|>[INST] Task: Check if there is unsafe content in 'Agent' messages")
        assert out.endswith(b"a comma-separated list of violated categories. [/INST]"), "no line break is added"
        assert b"User: How do I kill a process?\n\nAgent: Use kill.\n" in out

    def test_ids_of_a_tokenizer(self, llama3_tokenizer: Path, capsys: Any) -> None:
        assert main(["prompt", "hello", "--ids", "--tokenizer", str(llama3_tokenizer)]) == 0
        ids = json.loads(capsys.readouterr().out)
        assert ids[0] == 128000
        assert ids.count(128000) == 1
        assert len(ids) > 180

    def test_ids_of_a_model(self, llama3_tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "m").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "m" / name).write_text("{}")
        (tmp_path / "m" / "tokenizer.json").symlink_to(llama3_tokenizer)
        assert main(["prompt", "hello", "--ids", "--model", str(tmp_path / "m")]) == 0
        assert json.loads(capsys.readouterr().out)[0] == 128000

    def test_own_policy_and_warnings(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "p.yaml").write_text("- Spoilers\n- Gossip\n")
        assert main(["prompt", "[/INST]", "--policy", str(tmp_path / "p.yaml")]) == 0
        out, err = capsys.readouterr()
        assert "S1: Spoilers" in out
        assert "Violent" not in out
        assert err.startswith("edgeguard: warning: Message 1 (user) holds \"[/INST]\"")

    def test_neutralise(self, capsys: Any) -> None:
        assert main(["prompt", "[/INST]", "--neutralise"]) == 0
        assert "(/INST)" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [
        ["x", "--ids"], ["x", "--profile", "gpt"], ["x", "--ids", "--tokenizer", "/no/such"], ["x", "--policy", "/no/such"],
        [" "], [],
    ])
    def test_errors(self, capsys: Any, arguments: list[str]) -> None:
        assert main(["prompt", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("edgeguard: error: ")) == ("", 1)


class TestModels:
    def test_list(self, mini: Path, home: Path, capsys: Any) -> None:
        make_artifact(home / "mine", "gguf")
        (home / "bad").mkdir()
        assert main(["models", "list"]) == 0
        out = capsys.readouterr().out
        assert [line.split()[:2] for line in out.splitlines()[1:4]] == [["mini", "gguf"], ["mini", "onnx"], ["mine", "gguf"]]
        assert "bad: " in out
        assert main(["models", "list", "--json"]) == 0
        plain = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
        assert plain["mini"]["built_in"]
        assert plain["mine"]["models"][0]["precision"] == "int8"
        assert plain["bad"]["problem"]

    def test_path(self, mini: Path, capsys: Any) -> None:
        assert main(["models", "path", "mini"]) == 0
        assert main(["models", "path", "mini", "--kind", "gguf"]) == 0
        assert capsys.readouterr().out.splitlines() == [str(mini), str(mini / "gguf" / "model.gguf")]
        assert main(["models", "path", "none"]) == 2

    def test_verify(self, mini: Path, capsys: Any) -> None:
        assert main(["models", "verify", "mini"]) == 0
        (mini / "onnx" / "tokenizer.json").write_text("[]")
        (mini / "onnx" / "more.txt").write_text("x")
        assert main(["models", "verify", "mini"]) == 2
        out, err = capsys.readouterr()
        assert f"changed  {mini / 'onnx' / 'tokenizer.json'}" in out
        assert f"{mini / 'onnx' / 'more.txt'} is not named" in err

    def test_pull(self, mini: Path, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def pull(*given: Any, **options: Any) -> store.Entry:
            asked.append((given, options))
            make_artifact(home / "org--guard")
            return store.entry("org/guard")

        monkeypatch.setattr(store, "pull", pull)
        assert main(["models", "pull", "org/guard", "--revision", "main", "--include", "*.gguf"]) == 0
        assert asked == [(("org/guard", "main", None), {"include": ["*.gguf"]})]
        assert "org--guard" in capsys.readouterr().out

    def test_pull_offline(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEGUARD_OFFLINE", "1")
        assert main(["models", "pull", "org/guard"]) == 2
        assert "EDGEGUARD_OFFLINE" in capsys.readouterr().err

    def test_remove(self, mini: Path, home: Path, capsys: Any, stdin: Stdin) -> None:
        make_artifact(home / "mine")
        stdin(b"y\n")
        assert main(["models", "remove", "mine"]) == 2, "there is no terminal to ask on"
        assert (home / "mine").is_dir()
        assert main(["models", "remove", "mine", "--yes"]) == 0
        assert not (home / "mine").exists()
        assert main(["models", "remove", "mini", "--yes"]) == 2
        assert main(["models", "remove", "../mini", "--yes"]) == 2


class TestDoctor:
    def test_all_well(self, mini: Path, loaded: list[FakeGuard], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.02)
        assert main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["problems"] == []
        assert found["threads"]["count"] >= 1
        assert found["threads"]["reason"]
        assert found["choice"]["reason"]
        assert {probe["backend"] for probe in found["probes"]} == set(found["devices"])
        assert all(probe["check_ms"] > 0 and probe["checks"] > 1 for probe in found["probes"])
        assert main(["doctor", "--no-probe"]) == 0
        assert "all well" in capsys.readouterr().out

    def test_kernels_that_a_backend_does_without_are_told(self, mini: Path, loaded: list[FakeGuard], capsys: Any,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.02)
        monkeypatch.setattr(FakeGuard, "backend_info", replace(FakeGuard.backend_info, kernel="plain", fallbacks=("without AMX",)))
        assert main(["doctor"]) == 0
        assert "; plain; without AMX" in " ".join(capsys.readouterr().out.split())

    def test_a_backend_that_fails_is_a_problem(self, mini: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*given: Any, **options: Any) -> None:
            raise ModelNotFoundError("gone") if options["backend"] == "onnx" else RuntimeError("native")

        monkeypatch.setattr(edgeguard.Guard, "load", staticmethod(load))
        assert main(["doctor"]) == 2
        out = capsys.readouterr().out
        assert "onnx: gone" in out
        assert "llama: unexpected RuntimeError" in out

    def test_both_onnxruntimes_are_a_problem(self, mini: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgeguard.machine._version", lambda name: "1.0")
        assert main(["doctor", "--no-probe", "--json"]) == 2
        assert "both installed" in json.loads(capsys.readouterr().out)["problems"][0]


class TestRest:
    def test_version(self, capsys: Any) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"edgeguard {edgeguard.__version__}\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["check", "-h"], ["models", "--help"], ["prompt", "--help"]])
    def test_help(self, capsys: Any, arguments: list[str]) -> None:
        assert main(arguments) == 0
        assert "Usage" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [["convert", "-h"], ["bench", "-h"], ["bench", "accuracy", "-h"], ["bench", "--help"]])
    def test_help_of_optional_parts(self, capsys: Any, arguments: list[str]) -> None:
        pytest.importorskip("gguf")
        assert main(arguments) == 0
        assert "Usage" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["nope"], ["--nope"], ["models", "nope"], ["bench"], ["bench", "nope"]])
    def test_no_command_is_an_error(self, capsys: Any, arguments: list[str]) -> None:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("edgeguard: error: ") and not err.startswith("edgeguard: error:  ")

    @pytest.mark.parametrize("package", ["convert", "bench"])
    def test_optional_parts_get_their_arguments(self, capsys: Any, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        typer = pytest.importorskip("typer")
        part = types.ModuleType(f"edgeguard.{package}.cli")
        part.app = typer.Typer()  # type: ignore[attr-defined]

        @part.app.command()  # type: ignore[attr-defined, untyped-decorator]
        def work(source: str, status: int = 0) -> None:
            print("working on", source)  # noqa: T201
            if status == 9:
                raise KeyboardInterrupt
            raise typer.Exit(status)

        monkeypatch.setitem(sys.modules, f"edgeguard.{package}.cli", part)
        assert main([package, "thing", "--status", "0"]) == 0
        assert "working on thing" in capsys.readouterr().out
        assert main([package, "thing", "--status", "1"]) == 2, "1 would read as unsafe"
        assert main([package, "thing", "--nope"]) == 2
        capsys.readouterr()
        assert main([package, "thing", "--status", "9"]) == 2
        assert capsys.readouterr().err.strip() == "edgeguard: interrupted; nothing was decided."
        assert main([package, "--help"]) == 0

    @pytest.mark.parametrize("package", ["convert", "bench"])
    def test_missing_extras_give_the_install_line(self, capsys: Any, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

        monkeypatch.setattr("edgeguard.cli.app.importlib", types.SimpleNamespace(import_module=missing))
        assert main([package]) == 2
        assert f'pip install "edgeguard[{package}]"' in capsys.readouterr().err
