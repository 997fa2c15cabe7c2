"""What README, docs and examples show: Python and commands run, options exist, links lead somewhere, tables tell what the code has."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import pytest
import typer

from edgeguard import Guard, Verdict, errors, profiles, server
from edgeguard.cli import main
from edgeguard.cli.app import app
from edgeguard.convert import gate
from edgeguard.convert.pipeline import PRECISIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"^`([\w.-]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
OPERATOR = re.compile(r"[|&;()<>]+")
HANDED_OVER = ("convert", "bench")


class Block(NamedTuple):
    """A fenced block and where it begins."""

    language: str
    code: str
    place: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text("utf-8")
    return [Block(found[1], found[2], f"{page.name}:{text.count(chr(10), 0, found.start(2)) + 1}")
            for found in FENCE.finditer(text) if found[1] in languages]


def commands(code: str) -> Iterator[list[str]]:
    """Arguments of every `edgeguard` command of a shell block, whatever stands before it in its line."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not OPERATOR.fullmatch(word):
                command.append(word)
                continue
            if "edgeguard" in command:
                yield command[command.index("edgeguard") + 1 :]
            command = []


def parse(arguments: Sequence[str]) -> None:
    """Hold a command line against the commands and options that there are; raises a usage error."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands") and rest:
        name = rest.pop(0)
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
        if name in HANDED_OVER:
            command = typer.main.get_command(importlib.import_module(f"edgeguard.{name}.cli").app)
    command.make_context("edgeguard", rest).close()


def needs_more(arguments: Sequence[str]) -> bool:
    """The command takes weights, files or a network that are not there, or does not end by itself."""
    return arguments[0] in (*HANDED_OVER, "serve") or arguments[:2] in (["models", "pull"], ["models", "remove"]) or any(
        word.startswith("./") for word in arguments)


def expected(code: str) -> list[str]:
    """What a block says that it prints: comments behind `print` or on lines of their own below it."""
    lines, below = [], False
    for line in code.splitlines():
        _, _, behind = line.partition("  # ")
        if line.startswith("# "):
            lines += [line[2:]] if below else []
        else:
            below = "print(" in line
            lines += [behind] if below and behind else []
    return lines


def row_of(table_text: str, first: str) -> list[str]:
    """Cells of the table row that begins with a cell."""
    line = next(line for line in table_text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


COMMANDS = sorted({tuple(found) for page in PAGES for block in blocks(page, "bash") for found in commands(block.code)})
RUN = [found for found in COMMANDS if not needs_more(list(found))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def workplace(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, no network, and no models but the built-in one."""
    monkeypatch.setenv("EDGEGUARD_HOME", str(home))
    monkeypatch.setenv("EDGEGUARD_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_named_files(page: Path, folder: Path) -> None:
    """The files that a page shows under their names."""
    for name, content in NAMED.findall(page.read_text("utf-8")):
        (folder / name).write_text(content, "utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_they_say(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_named_files(page, workplace)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block.code, block.place, "exec"), namespace)
        printed = iter(capsys.readouterr().out.splitlines())
        for line in expected(block.code):
            assert line in printed, f"{block.place} does not print {line!r} there"


def test_languages_of_blocks_are_known() -> None:
    """A misspelt language would take a block out of these tests."""
    for page in PAGES:
        assert {found[1] for found in FENCE.finditer(page.read_text("utf-8"))} <= {"python", "bash", "text", "json", "yaml"}, page.name
        assert page.read_text("utf-8").count("```") == 2 * len(FENCE.findall(page.read_text("utf-8"))), page.name


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_and_options_exist(arguments: tuple[str, ...]) -> None:
    parse(arguments)


@pytest.mark.parametrize("arguments", [
    ("check", "hi", "--modle", "x"), ("convert", "x", "--to", "onnx", "--precison", "int8", "--out", "y"),
    ("bench", "speed", "--mesages", "3"), ("bench", "sped"), ("models", "fetch", "x/y"),
])
def test_commands_that_do_not_exist_are_found(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|no command"):
        parse(arguments)


def test_commands_are_read_from_shell_lines() -> None:
    shell = 'pip install "edgeguard[cpu]"\nX=1 edgeguard check "a | b" --json | jq .  # edgeguard no\nif edgeguard models; then\n'
    assert list(commands(shell)) == [["check", "a | b", "--json"], ["models"]]


@pytest.mark.parametrize("arguments", RUN, ids=" ".join)
def test_commands_run(arguments: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:
    for page in PAGES:
        if arguments in {tuple(found) for block in blocks(page, "bash") for found in commands(block.code)}:
            write_named_files(page, workplace)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"How do I kill a Python process?")))
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status in ((0, 1) if arguments[0] == "check" else (0,)), err
    assert out


def test_first_two_shell_blocks_are_the_set_up() -> None:
    install, test = (block.code for block in blocks(ROOT / "README.md", "bash")[:2])
    assert 'pip install ".[cpu]"' in install
    assert next(commands(install)) == ["check", "How do I kill a Python process?"]
    assert 'pip install -e ".[dev]"' in test
    assert "python -m pytest" in test


def test_extras_exist() -> None:
    offered = set(importlib.metadata.metadata("edgeguard").get_all("Provides-Extra") or ())
    for page in PAGES:
        for extras in re.findall(r'pip install (?:-e )?"(?:edgeguard|\.)\[([\w,]+)\]"', page.read_text("utf-8")):
            assert set(extras.split(",")) <= offered, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda picture: picture.name)
def test_pictures_are_shown_and_told(picture: Path) -> None:
    svg = ET.fromstring(picture.read_text("utf-8"))
    assert svg.findtext("{http://www.w3.org/2000/svg}desc")
    assert any(picture.name in page.read_text("utf-8") for page in PAGES)


class TestTables:
    embedding = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    converting = (ROOT / "docs" / "converting.md").read_text("utf-8")
    prompts = (ROOT / "docs" / "profiles-and-policies.md").read_text("utf-8")

    def test_errors(self) -> None:
        leaves = [each for each in vars(errors).values() if inspect.isclass(each) and each is not errors.EdgeGuardError]
        assert set(re.findall(r"^\| `(\w+Error)` \|", self.embedding, re.MULTILINE)) == {each.__name__ for each in leaves}
        for each in leaves:
            also = row_of(self.embedding, f"`{each.__name__}`")[1].strip("`")
            builtins = [base.__name__ for base in each.__mro__ if base.__module__ == "builtins"]
            assert builtins[0] == (also or "Exception"), each.__name__

    def test_signature_of_load(self) -> None:
        shown = re.search(r"`Guard\.load\(([^`]*)\)`", self.embedding)
        assert shown
        names = [name for name in re.split(r"[=,\s]+", re.sub(r'=[^,]+', "", shown[1])) if name and name != "*"]
        assert names == list(inspect.signature(Guard.load).parameters)
        for name in names:
            assert re.search(rf"^\| .*`{name}`.* \|", self.embedding, re.MULTILINE), name

    def test_fields_of_a_verdict(self) -> None:
        told = self.embedding.split("## The verdict")[1].split("```")[0]
        assert {field.name for field in dataclasses.fields(Verdict)} <= set(re.findall(r"`(\w+)`", told))

    def test_answers_of_the_server(self) -> None:
        told = dict(re.findall(r"^\| (\d{3}) \| (.*?) \|", self.embedding, re.MULTILINE))
        named = {int(status): set(re.findall(r"`(\w+)`", types)) for status, types in told.items()}
        for status, kind in server.KINDS.items():
            assert named[status] == {kind}
        for error, status in server.STATUSES:
            assert error.__name__ in named[status]
        assert named.keys() == {200, 500, *server.KINDS, *(status for _, status in server.STATUSES)}

    def test_fields_of_a_request(self) -> None:
        told = self.embedding.split("## Other languages: HTTP")[1].split("| status |")[0]
        assert set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)) == set(server.FIELDS)

    def test_limits_of_the_gate(self) -> None:
        rows = re.findall(r"^\| ([a-z0-9_, ]+) \| (.*) \|$", self.converting.split("<!-- gate limits")[1], re.MULTILINE)
        told = {name: cells.split(" | ") for names, cells in rows[1:] for name in names.split(", ")}
        assert set(told) == set(gate.LIMITS)
        for name, limits in gate.LIMITS.items():
            assert [None if cell == "-" else float(cell) for cell in told[name]] == list(vars(limits).values()), name

    def test_precisions(self) -> None:
        rows = re.findall(r"^\| (onnx|gguf) \| ([^|]+) \|", self.converting, re.MULTILINE)
        told = [(target, name.strip()) for target, names in rows for name in names.split(",")]
        assert sorted(told) == sorted((target, name) for target, names in PRECISIONS.items() for name in names)

    @pytest.mark.parametrize("name", profiles.NAMES)
    def test_profiles(self, name: str) -> None:
        profile = profiles.get(name)
        codes = [category.code for category in profile.taxonomy]
        assert row_of(self.prompts, f"`{name}`")[2:] == [f"{codes[0]} to {codes[-1]}", "yes" if profile.custom_policy else "no"]


class TestExamples:
    def run(self, name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def test_all_are_tested(self) -> None:
        names = {path.name for path in (ROOT / "examples").glob("*.py")}
        assert names == {"classify_file.py", "chat_moderation.py", "custom_policy.py", "app_test.py"}

    def test_classify_file(self, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        (workplace / "lines.txt").write_text(
            "How do I kill a Python process?\n\nTell me how to build a pipe bomb to hurt people.\n", "utf-8")
        assert self.run("classify_file.py", "lines.txt", monkeypatch=monkeypatch) == 1
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [(number, verdict) for number, verdict, *_ in lines] == [("1", "safe"), ("3", "unsafe")]
        assert (lines[0][3], bool(lines[1][3])) == ("", True)
        (workplace / "empty.txt").write_text("\n \n", "utf-8")
        for name in ("missing.txt", "empty.txt"):
            assert self.run("classify_file.py", name, monkeypatch=monkeypatch) == 2, "nothing was judged"

    def test_chat_moderation(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("chat_moderation.py", monkeypatch=monkeypatch) == 0
        assert capsys.readouterr().out.splitlines() == [
            "You asked: How do I kill a Python process?", "I cannot help with that.", "I cannot help with that."]

    def test_custom_policy(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("custom_policy.py", monkeypatch=monkeypatch) == 0
        out = capsys.readouterr().out
        assert "S1: Medical Advice. \nS2: Gambling. \nAI models should not help people to place bets.\n" in out
        assert "User: Which horse should I bet on?\n(Agent): Any of them.\n" in out
        assert 'warning: Message 1 (user) holds "Agent:"' in out

    def test_app_test(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "examples" / "app_test.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout
        assert "5 passed" in done.stdout
