"""Worker processes: started, asked, watched and ended; the protocol is that of `workers/protocol.py`."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from edgeguard.errors import InferenceError

WORKERS = Path(__file__).parent / "workers"
PATIENCE = 4 * 3600.0  # seconds for one request; a longer one hangs
WATCH = 0.05  # seconds between two looks at a process's memory
LAST_LINES = 3


@dataclass(frozen=True)
class Program:
    """What is started, and what it is told to load."""

    name: str
    """The contender, for people."""
    command: tuple[str, ...]
    """Python of an environment and a worker script."""
    model: str = ""
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Peak:
    """The most memory that was seen, in bytes."""

    resident: int = 0
    anonymous: int | None = None
    """What is no mapped file; None where the system does not tell."""


class Worker:
    """A running worker process; leaving the context ends it, whatever it is doing. Raises `InferenceError` with its reason."""

    def __init__(self, program: Program, log: Path) -> None:
        self.program, self._log = program, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(  # noqa: S603  a script of the bench's own
                    program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
        except OSError as error:
            raise InferenceError(f"{program.name} cannot be started: {error}") from error
        self.facts: dict[str, Any] = {}

    def since_start(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._began

    def load(self) -> dict[str, Any]:
        """Load the program's model; the reply holds `load_s`."""
        program = self.program
        reply = self.ask({"op": "load", "model": program.model, "threads": program.threads, "options": dict(program.options)})
        self.facts = reply["facts"]
        return reply

    def judge(self, items: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[int]], *, max_tokens: int = 16,
              **more: object) -> dict[str, Any]:
        """Judge items in one request; the reply holds `seconds` and `raw`."""
        reply = self.ask({"op": "judge", "items": list(items), "answers": dict(answers), "max_tokens": max_tokens, **more})
        if len(reply["raw"]) != len(items):
            raise InferenceError(f"{self.program.name} was asked for {len(items)} answers and gave {len(reply['raw'])}.")
        self.facts |= reply.pop("granted", {})
        return reply

    def memory(self) -> dict[str, int | None]:
        """Bytes: `resident`, `anonymous`, `peak`."""
        reply = self.ask({"op": "memory"})
        return {name: reply[name] for name in ("resident", "anonymous", "peak")}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request, one reply."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101  they are pipes
        alarm = threading.Timer(PATIENCE, self._process.kill)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            raise InferenceError(f"{self.program.name} died at {request['op']!r}{self._last_words()}")
        try:
            reply = json.loads(line)
            good = reply["ok"] is True
        except (ValueError, TypeError, KeyError):
            raise InferenceError(f"{self.program.name} gave no reply but {line[:80]!r}.") from None
        if not good:
            raise InferenceError(f"{self.program.name}: {reply.get('error', 'it failed and gave no reason')}")
        return dict(reply)

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        """Look at the process's memory all the time; the peak is complete when the context ends."""
        peak, stop = Peak(), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(peak, stop), daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            stop.set()
            watcher.join()

    def _watch(self, peak: Peak, stop: threading.Event) -> None:
        process = psutil.Process(self._process.pid)
        while True:
            try:
                info = process.memory_info()
            except psutil.Error:
                return
            peak.resident = max(peak.resident, info.rss)
            if hasattr(info, "shared"):  # on Linux: mapped files
                peak.anonymous = max(peak.anonymous or 0, info.rss - info.shared)
            if stop.wait(WATCH):
                return

    def _last_words(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        return f" (status {status}{'; was there enough memory?' if status == -9 else ''}): {' / '.join(lines)}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            if kind is None and self._process.stdin is not None:
                with suppress(OSError, subprocess.TimeoutExpired):
                    self._process.stdin.write('{"op":"quit"}\n')
                    self._process.stdin.close()
                    self._process.wait(timeout=60)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written has no reader any more
                    pipe.close()
