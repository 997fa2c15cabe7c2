"""The shape of the package: what it exports, what importing it loads, who may know whom, and habits of its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edgeguard

PACKAGE = Path(edgeguard.__file__).parent
CHECKOUT = PACKAGE.parent
RUNTIMES = {"onnxruntime", "onnx", "llama_cpp", "gguf", "torch", "transformers", "optimum", "huggingface_hub"}
COMMAND_LINE = {"typer", "rich", "click"}

MODEL_SIDE = {"taxonomy", "profiles", "policy", "prompt", "conversation", "verdict"}
OUTSIDE = {"cli", "__main__", "server", "scan", "integrations"}
# a room, and what it must not know; see the table in the design: each knows one thing
MUST_NOT_KNOW = {
    "errors": {"*"},
    "machine": {"*"},
    "taxonomy": {"tokenizer", "answers", "backends", "decoder", "guard", "loading", "store", "machine"},
    "policy": {"tokenizer", "answers", "backends", "decoder", "guard", "loading", "store", "machine"},
    "profiles": {"tokenizer", "answers", "backends", "decoder", "guard", "loading", "store", "machine"},
    "prompt": {"tokenizer", "answers", "backends", "decoder", "guard", "loading", "store", "machine"},
    "tokenizer": {"profiles", "policy", "taxonomy", "answers", "backends", "decoder", "guard", "loading", "store", "verdict"},
    "answers": {"backends", "decoder", "guard", "loading", "store", "conversation", "machine"},
    "backends": {*MODEL_SIDE, "tokenizer", "answers", "decoder", "guard", "loading"},
    "decoder": {*MODEL_SIDE - {"profiles"}, "tokenizer", "guard", "loading", "store", "machine"},
    "store": {*MODEL_SIDE - {"verdict"}, "tokenizer", "answers", "backends", "decoder", "guard", "loading"},
    "prefix": {"answers", "backends", "decoder", "guard", "loading", "store", "machine"},
    "guard": {"store", "machine"},
}  # fmt: skip
# a script is written in answers, so its backend reads them; a command starts the server
MAY_KNOW = {
    "edgeguard.backends.scripted": {"answers", "tokenizer"}, "edgeguard.__main__": {"cli"}, "edgeguard.cli.serve": {"server"},
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = ("edgeguard", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "recipe" not in path.parts}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere below, except for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else str(node.module)
        yield from imports(node)


@cache
def known(module: str) -> frozenset[str]:
    return frozenset(imports(ast.parse(SOURCES[module].read_text(encoding="utf-8"))))


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", SOURCES)
def test_no_room_knows_what_it_must_not(module: str) -> None:
    forbidden = MUST_NOT_KNOW.get(room(module), set())
    others = {room(name) for name in known(module) if name.split(".")[0] == "edgeguard"} - {room(module), ""}
    others -= MAY_KNOW.get(module, set())
    if "*" in forbidden:
        assert not others
    assert not others & forbidden
    assert not others & OUTSIDE, "people and programs outside are known to nobody, nor to each other"


def test_no_imports_in_a_circle() -> None:
    graph = {module: known(module) & SOURCES.keys() - {module, "edgeguard"} for module in SOURCES}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", SOURCES)
def test_the_package_never_imports_its_workshops(module: str) -> None:
    if module != "edgeguard.cli.calibrate":  # which reads and counts labelled rows as the bench does
        assert not {name for name in known(module) if room(name) in {"convert", "bench"} and name.startswith("edgeguard.")}


@pytest.mark.parametrize("module", SOURCES)
def test_runtimes_are_imported_where_they_are_used(module: str) -> None:
    body = ast.parse(SOURCES[module].read_text(encoding="utf-8")).body
    top = ast.Module([node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    at_import = {name.split(".")[0] for name in imports(top)}
    assert not at_import & RUNTIMES
    if room(module) != "cli":
        assert not at_import & COMMAND_LINE


in_checkout = pytest.mark.skipif(not (CHECKOUT / "pyproject.toml").is_file(), reason="not a checkout")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_importing_loads_no_runtime_and_changes_nothing() -> None:
    code = (
        "import os, sys, threading; before = dict(os.environ)\n"
        "import edgeguard; from edgeguard import *; import edgeguard.loading, edgeguard.store, edgeguard.machine\n"
        "assert dict(os.environ) == before and threading.active_count() == 1\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = set(python(code).split())
    assert "edgeguard" in loaded
    assert not loaded & (RUNTIMES | COMMAND_LINE | {"starlette", "uvicorn"})


def test_exported_names() -> None:
    assert set(edgeguard.__all__) >= {"AsyncGuard", "Category", "EdgeGuardError", "Guard", "Policy", "Run", "Verdict"}
    assert sorted(edgeguard.__all__) == list(edgeguard.__all__)
    for name in edgeguard.__all__:
        assert getattr(edgeguard, name).__module__.startswith("edgeguard.")
    with pytest.raises(AttributeError):
        edgeguard.nothing  # noqa: B018


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) != "cli"])
def test_the_library_is_silent(module: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id in {"print", "input", "breakpoint"}), f"line {node.lineno}"
        assert not (isinstance(called, ast.Attribute) and called.attr == "basicConfig"), f"line {node.lineno}"


def checked_in(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (CHECKOUT / folder).rglob("*.py"))


@in_checkout
def test_every_package_is_in_the_wheel() -> None:
    listed = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    for path in [*PACKAGE.rglob("__init__.py"), CHECKOUT / "convert/__init__.py", CHECKOUT / "bench/__init__.py"]:
        inside = path.parent.relative_to(CHECKOUT).parts
        assert f'"{".".join(("edgeguard", *inside[inside[0] == "edgeguard":]))}",' in listed


@in_checkout
@pytest.mark.parametrize(("folder", "most"), [("edgeguard", 400), ("convert", 400), ("bench", 400), ("tests", 500)])
def test_files_fit_a_reader(folder: str, most: int) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in checked_in(folder)}
    assert not {name: lines for name, lines in lengths.items() if lines > most}
