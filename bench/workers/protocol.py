"""What a bench worker speaks: one JSON object a line, requests on standard input, replies on standard output.

    {"op":"load","model":PATH,"threads":N,"options":{...}}   {"ok":true,"load_s":S,"facts":{...}}
    {"op":"judge","items":[{"text":PROMPT,"message":TEXT,"ids":[...],"prefix":P}],
     "answers":{"safe":[ids],"unsafe":[ids]},"max_tokens":N,"threshold":X or null}
                                                             {"ok":true,"seconds":S,"raw":[...],"scores":[...]}
    {"op":"memory"}                                          {"ok":true,"resident":B,"anonymous":B,"peak":B}
    {"op":"quit"}

Any failure is {"ok":false,"error":TEXT}. Whatever else a library prints goes to standard error. Only the standard library is
used, for the Python of any environment; a worker is a script beside this file that ends in `serve(Engine())`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Judged:
    """What came back for the items of one request, in their order."""

    raw: Sequence[str]
    """`safe`, `unsafe\\nS1,S10`, or whatever the model said."""
    scores: Sequence[float | None] = ()
    """P(unsafe) where it can be had."""
    seconds: float | None = None
    """Of the work alone; None takes the time of the whole call."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More to tell, such as the tokens of the pass; `granted` are facts that have changed since the model was loaded."""


class Engine(Protocol):
    """A contender."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Load, and say what was granted: runtime, device, precision, threads, kernel, bytes, fallbacks."""
        ...

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """Judge all items of a request."""
        ...


def serve(engine: Engine) -> None:
    """Answer requests until `quit` or the end of the input."""
    replies = _own_output()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        try:
            reply = {"ok": True, **_answer(engine, request)}
        except Exception as error:  # every failure is told, and the next request may go well
            reply = {"ok": False, "error": str(error) if type(error).__module__.startswith("edgeguard") else _named(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    if request["op"] == "load":
        facts = dict(engine.load(request["model"], request["threads"], request.get("options", {})))
        return {"load_s": time.perf_counter() - began, "facts": facts}
    if request["op"] == "judge":
        judged = engine.judge(request)
        seconds = time.perf_counter() - began if judged.seconds is None else judged.seconds
        scores = judged.scores or [None] * len(judged.raw)
        return {"seconds": seconds, "raw": list(judged.raw), "scores": list(scores), **judged.extra}
    if request["op"] == "memory":
        return memory()
    raise ValueError(f"there is no operation {request['op']!r}")


def memory() -> dict[str, int | None]:
    """Bytes of this process: resident, what of it is no mapped file (None where the system does not tell), the peak."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        kib = {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM") if name in fields}
        return {"resident": kib["VmRSS"], "anonymous": kib.get("RssAnon"), "peak": kib.get("VmHWM")}
    try:
        import psutil
    except ImportError as error:
        raise RuntimeError("psutil is needed to read a process's memory on this system") from error
    info = psutil.Process().memory_info()
    return {"resident": info.rss, "anonymous": None, "peak": getattr(info, "peak_wset", None)}


def _own_output() -> TextIO:
    """The way to the driver; file descriptor 1 is turned to standard error, where native libraries may print as they like."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
