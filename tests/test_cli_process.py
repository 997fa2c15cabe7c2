"""The command line as a process: its exit status whatever happens to its streams and to what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKE = """
import sys
from fakes import FakeGuard
from edgeguard.cli import main
FakeGuard.install()
sys.exit(main(sys.argv[1:]))
"""


def start(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    folders = [options.pop("path", ""), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    return subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(("text", "status"), [("hello", 0), ("bomb", 1), ("crash", 2)])
def test_exit_status(text: str, status: int) -> None:
    process = start("-c", FAKE, "check", text, stdout=subprocess.PIPE)
    process.communicate(timeout=60)
    assert process.returncode == status


@pytest.mark.parametrize("arguments", [("check", "bomb"), ("check", "hello", "--json"), ("prompt", "hello"), ("models",)])
def test_reader_that_went_away(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("-c", FAKE, *arguments, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
@pytest.mark.parametrize("arguments", [("check", "bomb"), ("check", "hello", "--json"), ("--version",)])
def test_full_disk(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = start("-c", FAKE, *arguments, stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"edgeguard: error: " in err
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="needs a system that can close a stream before a program starts")
@pytest.mark.parametrize(("stream", "status"), [(1, 2), (2, 1)])
def test_closed_stream(stream: int, status: int) -> None:
    code = f"import os, sys; os.close({stream}); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = start("-c", code, "-c", FAKE, "check", "bomb", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, "without standard output the verdict cannot be told, without standard error it can"
    assert (b"UNSAFE" in out, b"error: " in err) == (status == 1, status == 2)


@pytest.mark.skipif(os.name == "nt", reason="needs a system that can close a stream before a program starts")
@pytest.mark.parametrize("arguments", [("prompt", "hi"), ("--help",), ("--version",), ("models",)])
def test_nothing_ends_well_without_standard_output(arguments: tuple[str, ...]) -> None:
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = start("-c", code, "-m", "edgeguard", *arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"standard output is closed" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted_process_says_so() -> None:
    # whoever starts the tests in the background may have had SIGINT ignored
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    waiting = f"{heard}; import os, time; FakeGuard.check = lambda *a, **k: (os.write(1, b'on\\n'), time.sleep(60))"
    code = FAKE.replace("FakeGuard.install()", f"FakeGuard.install(); {waiting}")
    process = start("-c", code, "check", "hello", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.split(b"\n")) == (2, [b"edgeguard: interrupted; nothing was decided.", b""])


@pytest.mark.parametrize("broken", ["tokenizers", "numpy", "typer", "rich"])
def test_broken_dependency_does_not_read_as_unsafe(tmp_path: Path, broken: str) -> None:
    (tmp_path / f"{broken}.py").write_text("raise ImportError('broken')")
    process = start("-m", "edgeguard", "check", "hello", path=str(tmp_path), stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert b"edgeguard: error: " in err


def test_console_that_cannot_print_unicode() -> None:
    process = start("-X", "utf8=0", "-c", f"import sys; sys.stdout.reconfigure(encoding='ascii')\n{FAKE}", "check", "bomb",
                    stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"UNSAFE" in out
