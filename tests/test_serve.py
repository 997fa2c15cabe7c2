"""`edgeguard serve`: its options, what it refuses to start with, and the real process with its signals."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeguard import Guard
from edgeguard.cli import main
from edgeguard.cli.serve import serve
from edgeguard.errors import InputError
from edgeguard.server import create_app


def test_command_has_the_same_defaults() -> None:
    offered, taken = inspect.signature(serve).parameters, inspect.signature(create_app).parameters
    for name in ("max_bytes", "queue", "timeout"):
        assert offered[name].default == taken[name].default


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name == "edgeguard.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("edgeguard.server", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve"]) == 2
    assert 'starlette and uvicorn is not installed. Install it with: pip install "edgeguard[server]"' in capsys.readouterr().err


def test_address_that_cannot_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be listened on" in capsys.readouterr().err
    assert main(["serve", "--timeout", "0"]) == 2


@pytest.mark.parametrize("options", [
    {"profile": None, "policy": None, "neutralise": False},
    {"profile": "llama-guard-2", "policy": Path("mine.yaml"), "neutralise": True},
])
def test_command_loads_as_check_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[str, Any] = {}

    def load(_: Any, **given: Any) -> Guard:
        loaded.update(given)
        raise InputError("Enough.")

    monkeypatch.setattr(Guard, "load", load)
    line = ["--profile", "llama-guard-2", "--policy", "mine.yaml", "--neutralise"] if options["neutralise"] else []
    assert main(["serve", "--port", "0", *line]) == 2
    assert {name: loaded[name] for name in options} == options


def process(*options: str, begin: Sequence[str] = ("-m", "edgeguard")) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *begin, "serve", "--port", "0", "--threads", "1", *options]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def serving(*options: str, **how: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The real server and its port; killed in the end if it still runs."""
    running = process(*options, **how)
    watch = threading.Timer(90, running.kill)
    watch.start()
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert "at http://" in line, running.communicate()[1]
        yield running, int(line.rsplit(":", 1)[1])
    finally:
        watch.cancel()
        running.kill()
        running.communicate()


def send(port: int, body: bytes, host: str = "localhost") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/check", body, {"Content-Type": "application/json", "Host": host})
    response = connection.getresponse()
    status, content = response.status, json.loads(response.read())
    connection.close()
    return status, content


def wait_for_stop(running: subprocess.Popen[str], number: int) -> tuple[str, str]:
    running.send_signal(number)
    return running.communicate(timeout=30)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_real_server() -> None:
    with serving("--backend", "onnx", "--max-bytes", "100000") as (running, port):
        status, verdict = send(port, b'{"text": "How do I kill a Python process? SECRET"}')
        assert (status, verdict["verdict"]) == (200, "safe")
        assert verdict["cache_hit"], "it is warm when it begins to serve"
        assert verdict["model"]["backend"] == "onnx"
        assert send(port, b'{"text": "SECRET"}', "evil.example")[0] == 421
        assert send(port, b"{SECRET")[0] == 400
        with socket.create_connection(("127.0.0.1", port), 30) as raw:  # a body without an end
            raw.sendall(b"POST /check HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    raw.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                    time.sleep(0.001)
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(100).startswith(b"HTTP/1.1 413")
        with socket.create_connection(("127.0.0.1", port), 30) as raw:  # one that asks and leaves
            body = json.dumps({"text": "word " * 7000}).encode()
            raw.sendall(b"POST /check HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                        % len(body) + body)
            time.sleep(0.3)
        assert send(port, b'{"text": "hello", "timeout": 20}')[0] == 200
        out, err = wait_for_stop(running, signal.SIGTERM)
        assert running.returncode == 0
        assert (out, err) == ("", ""), "neither requests nor texts are logged"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_open_server_warns() -> None:
    with serving("--host", "0.0.0.0", "--backend", "onnx") as (running, port):
        assert send(port, b'{"text": "hello"}', "guard.example")[0] == 200
        _, err = wait_for_stop(running, signal.SIGINT)
        assert running.returncode == 0
        assert "warning: Listening on 0.0.0.0" in err


SHORT = """
import sys, time
from edgeguard import Guard
from edgeguard.cli import main, serve

def stuck(guard, *given, run, **options):
    while True:
        time.sleep(0.01)
        run.check()

Guard.warmup, Guard.check, serve.GRACE = lambda guard: None, stuck, 0.3
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_stopped_under_load() -> None:
    with serving("--backend", "onnx", begin=("-c", SHORT)) as (running, port), ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(send, port, b'{"text": "hello"}') for _ in range(3)]
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", port), 30) as raw:
            raw.sendall(b"POST /check HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.2)
            out, err = wait_for_stop(running, signal.SIGTERM)
            assert (running.returncode, out, err) == (0, "", "")
            assert raw.recv(100).startswith(b"HTTP/1.1 503")
        for each in asked:
            status, content = each.result(5)
            assert (status, content["error"]["type"]) == (503, "CancelledError")
