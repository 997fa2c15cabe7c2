"""A guard over HTTP for the programs of one machine: a bounded queue, and never a 200 without a verdict.

    POST /check   {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}; optional: role, threshold,
                  timeout (seconds, never longer than the server's own), verdict_only. Answers with a verdict.
    GET /health   Which model judges.

Whatever goes wrong is {"error": {"type", "message"}} with a status of 400 or more: nothing was judged.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeguard import __version__, strict_json
from edgeguard.aio import AsyncGuard
from edgeguard.errors import CancelledError, DeadlineError, EdgeGuardError, InputError
from edgeguard.guard import Judged
from edgeguard.verdict import Verdict

READING = 10.0
"""Seconds for a body to arrive."""
HELD = 64
"""Bodies of the largest size that are held while they arrive; they take no place in the queue before they are complete."""
STOPPING = "The server is stopping; the text was not judged."
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names under which a loopback server is asked; a page that rebinds its own name to 127.0.0.1 comes with that name."""

FIELDS: dict[str, tuple[type, str]] = {
    "text": (str, "a string"), "messages": (list, "a list"), "role": (str, "a string"), "threshold": (float, "a number"),
    "timeout": (float, "a number"), "verdict_only": (bool, "true or false")}
STATUSES: tuple[tuple[type[EdgeGuardError], int], ...] = ((InputError, 400), (CancelledError, 503), (DeadlineError, 504))
KINDS = {404: "NotFound", 405: "MethodNotAllowed", 408: "BodyTooSlow", 413: "BodyTooLarge", 415: "ContentType", 421: "WrongHost",
         429: "QueueFull"}


def create_app(guard: AsyncGuard, *, max_bytes: int = 1 << 20, queue: int = 16, timeout: float = 60.0,
               hosts: Collection[str] | None = LOOPBACK) -> Starlette:
    """An ASGI application around `guard`, which it closes when it is shut down; `app.state.stop()` ends what still runs, with 503.

    `max_bytes` bounds a body, `queue` the checks that wait besides the one that runs, `timeout` the seconds of a check, its
    wait included. `hosts` are the names that a Host header may carry, lower case and without a port; None allows any, for
    a server that is meant to be reached from outside. Raises `InputError` for bounds that make no sense.
    """
    if max_bytes < 1 or queue < 0 or not timeout > 0:
        raise InputError(f"max_bytes {max_bytes}, queue {queue}, timeout {timeout}: at least 1, at least 0 and above 0 are needed.")

    async def health(_: Request) -> Response:
        return JSONResponse({"edgeguard": __version__, "model": asdict(guard.identity)})

    async def refused(_: Request, error: Exception) -> Response:
        return _failure(error)

    desk = _Desk(guard, max_bytes, queue, timeout)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with guard:
            yield
            desk.stop()

    app = Starlette(
        routes=[Route("/check", desk.answer, methods=["POST"]), Route("/health", health)],
        middleware=[] if hosts is None else [Middleware(_asked_as, hosts)],
        exception_handlers={HTTPException: refused}, lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.stop = desk.stop
    return app


class _Desk:
    """Takes in one check after the other; those that do not fit into the queue are sent away before their body is read."""

    def __init__(self, guard: AsyncGuard, max_bytes: int, queue: int, timeout: float) -> None:
        self._guard, self._max_bytes, self._timeout = guard, max_bytes, timeout
        self._free, self._room = 1 + queue, HELD * max_bytes
        self._work, self._stopped = set[asyncio.Future[Verdict]](), False
        self._turn = asyncio.Lock()  # those who leave while they wait are forgotten at once, text and all

    async def answer(self, request: Request) -> Response:
        """The verdict, or what went wrong."""
        work = asyncio.ensure_future(self._admit(request))
        self._work.add(work)
        try:
            return JSONResponse((await work).to_dict())
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            return _failure(CancelledError(STOPPING))
        except Exception as error:  # of whatever kind: it must not pass for a verdict, and its text may hold the user's
            return _failure(error)
        finally:
            self._work.discard(work)

    def stop(self) -> None:
        """Judge nothing more; whoever still waits is told so."""
        self._stopped = True
        for work in self._work:
            work.cancel()

    async def _admit(self, request: Request) -> Verdict:
        # other content types than this one can be sent by any web page without asking
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "The body must be sent as application/json.")
        self._refuse()
        body = await self._read(request)
        self._refuse()  # much may have happened meanwhile
        self._free -= 1
        try:
            return await self._judge(request, _parse(body))
        finally:
            self._free += 1

    def _refuse(self) -> None:
        if self._stopped:
            raise CancelledError(STOPPING)
        if not self._free or self._room < 0:
            raise HTTPException(429, "The queue is full; ask again later.", {"Retry-After": "1"})

    async def _read(self, request: Request) -> bytearray:
        try:
            return await asyncio.wait_for(self._pieces(request), READING)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {READING:g} seconds.") from None

    async def _pieces(self, request: Request) -> bytearray:
        """The body, never more than a piece above the bound."""
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                self._room -= len(piece)
                if len(body) > self._max_bytes:
                    raise HTTPException(413, f"The body has more than {self._max_bytes} bytes; judge the text in parts.")
                self._refuse()
            return body
        finally:
            self._room += len(body)

    async def _judge(self, request: Request, asked: dict[str, Any]) -> Verdict:
        """The verdict, unless the client goes away or the time runs out first: either stops the model's pass."""
        seconds = min(asked.pop("timeout", self._timeout), self._timeout)
        if not seconds >= 0:  # NaN too
            raise InputError("timeout must not be below 0.")
        given = asked.pop("text") if "text" in asked else asked.pop("messages")
        check = asyncio.ensure_future(self._in_turn(given, **asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({check, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if check.done():
                return check.result()
            if gone.done():
                raise ClientDisconnect
            raise DeadlineError("The check ran out of time; no verdict was reached.")
        finally:
            check.cancel()
            gone.cancel()

    async def _in_turn(self, given: Judged, **options: Any) -> Verdict:  # noqa: ANN401  as `Guard.check` has them
        async with self._turn:
            return await self._guard.check(given, **options)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parse(body: bytearray) -> dict[str, Any]:
    """The fields of a check, those that are null left out; raises `InputError` for all that is not one."""
    try:
        # whole numbers as floats: endless digits would take endless time
        found = strict_json.loads(body.decode("utf-8"), parse_int=float)
    except (ValueError, RecursionError):
        raise InputError("The body is not JSON in UTF-8, names a field twice, or is nested too deeply.") from None
    if not isinstance(found, dict) or not found.keys() <= FIELDS.keys():
        raise InputError(f"The body must be an object with no other fields than {', '.join(FIELDS)}.")
    asked = {name: value for name, value in found.items() if value is not None}
    for name, value in asked.items():
        kind, wanted = FIELDS[name]
        if not isinstance(value, kind):
            raise InputError(f"{name} must be {wanted}.")
    if ("text" in asked) == ("messages" in asked):
        raise InputError("Either text or messages is needed.")
    for number, message in enumerate(asked.get("messages", ()), 1):
        plain = isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        if not plain or message.keys() != {"role", "content"}:  # what is not read would pass unjudged
            raise InputError(f"Message {number} must be an object with role and content, both strings, and nothing else.")
    return asked


def _asked_as(app: ASGIApp, hosts: Collection[str]) -> ASGIApp:
    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        asked = app
        if scope["type"] == "http":
            name = re.sub(r":\d+$", "", Request(scope).headers.get("host", "")).lower()
            if name not in hosts:
                asked = _failure(HTTPException(421, f"This server answers only as {', '.join(sorted(hosts))}."))
        await asked(scope, receive, send)

    return checked


def _failure(error: Exception) -> JSONResponse:
    status, kind, headers = 500, "InternalError", None
    message = f"Unexpected {type(error).__name__}; the text was not judged."
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
        kind = KINDS.get(status, "HTTPError")
    elif isinstance(error, EdgeGuardError):
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
        kind, message = type(error).__name__, str(error)
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)
