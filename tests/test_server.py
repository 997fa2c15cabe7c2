"""The HTTP server: verdicts, every refusal by its status, bounds, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import httpx
import pytest

from edgeguard import AsyncGuard, Guard, server
from edgeguard.backends.base import Run
from edgeguard.errors import CancelledError, InferenceError, InputError
from edgeguard.server import create_app
from edgeguard.verdict import Verdict

URL = "http://127.0.0.1:8080"
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how to make a bomb"}]


def answer(prompt: str) -> str:
    if "crash" in prompt:
        raise ZeroDivisionError(prompt)
    return "unsafe\nS1" if "bomb" in prompt else "safe"


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with Guard.scripted(answer) as scripted:
        scripted.warmup()
        yield scripted


class Stuck:
    """A guard whose checks last until they are let go or stopped."""

    def __init__(self, error: Exception | None = None) -> None:
        self.entered, self.stopped, self.release, self.error = threading.Event(), threading.Event(), threading.Event(), error
        self.identity, self.asked = SHARED.identity, 0

    def check(self, given: Any, *rest: Any, run: Run, **options: Any) -> Verdict:
        self.asked += 1
        self.entered.set()
        if self.error:
            raise self.error
        while not self.release.wait(0.005):
            if run.stopped:
                self.stopped.set()
                run.check()
        return SHARED.check("hello")

    def close(self) -> None:
        pass


SHARED = Guard.scripted(answer)


def client(guard: Any, **options: Any) -> Any:
    transport = httpx.ASGITransport(create_app(AsyncGuard(cast(Guard, guard)), **options))
    return httpx.AsyncClient(transport=transport, base_url=URL)


def ask(guard: Any, *, method: str = "POST", path: str = "/check", options: dict[str, Any] | None = None, **request: Any) -> Any:
    """One request to an application of its own."""

    async def scene() -> Any:
        async with client(guard, **(options or {})) as asking:
            return await asking.request(method, path, **request)

    return asyncio.run(asyncio.wait_for(scene(), 30))


def refusal(response: Any) -> tuple[int, str]:
    """Status and type of an error, which has no verdict."""
    assert response.json().keys() == {"error"}
    assert response.json()["error"]["message"]
    return response.status_code, response.json()["error"]["type"]


def test_verdict_is_the_one_of_python(guard: Guard) -> None:
    found = ask(guard, json={"text": "how to make a bomb"})
    wanted = guard.check("how to make a bomb").to_dict()
    assert found.status_code == 200
    assert {**found.json(), "timings": {}} == json.loads(json.dumps({**wanted, "timings": {}}))
    assert found.json()["raw"] == "unsafe\nS1"


@pytest.mark.parametrize(("body", "verdict", "role"), [
    ({"text": "hello"}, "safe", "user"), ({"text": "a bomb", "role": "assistant"}, "unsafe", "assistant"),
    ({"messages": MESSAGES}, "unsafe", "assistant"), ({"messages": MESSAGES, "text": None, "role": "user"}, "unsafe", "user"),
    ({"text": "a bomb", "verdict_only": True}, "unsafe", "user"), ({"text": "hello", "threshold": 0}, "unsafe", "user"),
    ({"text": "a bomb", "threshold": 1, "timeout": 20}, "safe", "user"),
])
def test_fields(guard: Guard, body: dict[str, Any], verdict: str, role: str) -> None:
    found = ask(guard, json=body)
    assert found.status_code == 200
    assert (found.json()["verdict"], found.json()["role"]) == (verdict, role)
    assert found.json()["threshold"] == body.get("threshold", 0.5)
    if body.get("verdict_only"):
        assert found.json()["categories"] == []


def test_health_names_the_model(guard: Guard) -> None:
    found = ask(guard, method="GET", path="/health")
    assert found.status_code == 200
    assert found.json()["model"]["profile"] == guard.identity.profile


BAD: list[Any] = [
    {}, [], "text", None, 3, {"text": None}, {"text": ""}, {"text": "  "}, {"text": 3}, {"text": ["a"]}, {"texts": "a"},
    {"text": "a", "policy": []}, {"text": "a", "messages": MESSAGES}, {"messages": []}, {"messages": "a"}, {"messages": ["a"]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, {"messages": [{"role": ["user"], "content": "a"}]},
    {"messages": [{"role": "system", "content": "a"}]}, {"messages": MESSAGES[1:] + MESSAGES[:1]}, {"text": "a", "role": "judge"},
    {"text": "a", "threshold": 2}, {"text": "a", "threshold": "0.5"}, {"text": "a", "threshold": True}, {"text": "a", "timeout": -1},
    {"text": "a", "timeout": "1"}, {"text": "a", "verdict_only": 1}, {"text": "a", "threshold": 10**400}, {"text": "\ud800"},
]


@pytest.mark.parametrize("body", [json.dumps(body) for body in BAD] + [
    "", "{", '{"text": "a"', '{"text": "a"}}', '{"text": "a", "text": "b"}', '{"text": "a", "threshold": NaN}',
    '{"text": "a", "timeout": NaN}', "[" * 200_000, '{"text": "a", "role": ' + "[" * 200_000, "1" * 900_000,
    b'{"text": "\xff"}', '{"text": "a"}'.encode("utf-16"), '\ufeff{"text": "a"}', '{"messages": [{"role": "user", "role": "user"}]}',
])
def test_what_is_no_check_is_400(guard: Guard, body: str | bytes) -> None:
    found = ask(guard, content=body, headers={"content-type": "application/json"})
    assert refusal(found)[0] == 400
    assert refusal(found)[1] in {"InputError", "ConversationError"}


def test_longer_than_the_context_is_400(guard: Guard) -> None:
    assert refusal(ask(guard, json={"text": "word " * 9000})) == (400, "ContextLengthError")


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_content_type(guard: Guard, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert refusal(ask(guard, content=b'{"text": "a"}', headers=headers)) == (415, "ContentType")


def test_content_type_with_a_charset(guard: Guard) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert ask(guard, content='{"text": "é"}'.encode(), headers=headers).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/check", 405), ("PUT", "/check", 405), ("OPTIONS", "/check", 405), ("POST", "/health", 405), ("GET", "/", 404),
    ("POST", "/check/", 404), ("POST", "/", 404), ("GET", "/docs", 404),
])
def test_other_ways_in(guard: Guard, method: str, path: str, status: int) -> None:
    found = ask(guard, method=method, path=path)
    assert refusal(found)[0] == status
    assert "access-control-allow-origin" not in found.headers


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1:1", 200), ("[::1]", 200), ("[::1]:8080", 200), ("", 421),
    ("evil.example", 421), ("evil.example:8080", 421), ("127.0.0.1.evil.example", 421), ("localhost:8080@evil.example", 421),
    ("localhost:80:80", 421),
    ("::1", 421), ("0.0.0.0", 421), ("127.0.0.1\n", 421),
])
def test_names_that_a_loopback_server_answers_to(guard: Guard, host: str, status: int) -> None:
    for method, path in (("POST", "/check"), ("GET", "/health")):
        found = ask(guard, method=method, path=path, json={"text": "hello"}, headers={b"host": host.encode()})
        assert found.status_code == status
        assert "verdict" not in found.text or status == 200


def test_any_name_when_meant_to_be_reached_from_outside(guard: Guard) -> None:
    assert ask(guard, json={"text": "hello"}, headers={"host": "guard.example"}, options={"hosts": None}).status_code == 200


def test_large_body_is_left_unread(guard: Guard) -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1000
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    assert refusal(ask(guard, content=endless(), headers=headers, options={"max_bytes": 5000})) == (413, "BodyTooLarge")
    assert given == 6000
    body = json.dumps({"text": "hello"}).encode()
    assert ask(guard, content=body, headers=headers, options={"max_bytes": len(body)}).status_code == 200
    assert ask(guard, content=body, headers=headers, options={"max_bytes": len(body) - 1}).status_code == 413


def slow(asking: Any, begin: bytes = b"{") -> asyncio.Task[Any]:
    """A request whose body begins and never ends."""

    async def body() -> AsyncIterator[bytes]:
        yield begin
        await asyncio.sleep(60)

    return asyncio.create_task(asking.post("/check", content=body(), headers={"content-type": "application/json"}))


def test_slow_bodies_take_no_place(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READING", 0.3)

    async def scene() -> None:
        async with client(guard, queue=0) as asking:
            late = [slow(asking) for _ in range(300)]
            await asyncio.sleep(0.05)
            assert (await asking.post("/check", json={"text": "hello"})).status_code == 200
            assert {refusal(each) for each in await asyncio.gather(*late)} == {(408, "BodyTooSlow")}

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_bytes_of_bodies_on_their_way_are_bounded(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HELD", 3)

    async def scene() -> None:
        async with client(guard, max_bytes=100) as asking:
            late = [slow(asking, b" " * 100) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert refusal(await asking.post("/check", json={"text": "hello"})) == (429, "QueueFull")
            late.pop().cancel()
            await asyncio.sleep(0.05)
            assert (await asking.post("/check", json={"text": "hello"})).status_code == 200
            for each in late:
                each.cancel()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_queue_that_filled_while_a_body_arrived() -> None:
    stuck = Stuck()

    async def scene() -> None:
        async with client(stuck, queue=0) as asking:
            full = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b'{"text": '
                await full.wait()
                yield b'"hello"}'

            late = asyncio.create_task(asking.post("/check", content=body(), headers={"content-type": "application/json"}))
            await asyncio.sleep(0.05)
            taken = asyncio.create_task(asking.post("/check", json={"text": "hello"}))
            await asyncio.to_thread(stuck.entered.wait, 5)
            full.set()
            assert refusal(await late) == (429, "QueueFull")
            stuck.release.set()
            assert (await taken).status_code == 200

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_stop_answers_all_that_wait() -> None:
    stuck = Stuck()

    async def scene() -> None:
        app = create_app(AsyncGuard(cast(Guard, stuck)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=URL) as asking:
            waiting = [asyncio.create_task(asking.post("/check", json={"text": "hello"})) for _ in range(2)]
            await asyncio.to_thread(stuck.entered.wait, 5)
            waiting.append(slow(asking))
            await asyncio.sleep(0.05)
            app.state.stop()
            assert [refusal(each) for each in await asyncio.gather(*waiting)] == [(503, "CancelledError")] * 3
            assert await asyncio.to_thread(stuck.stopped.wait, 5)
            assert refusal(await asking.post("/check", json={"text": "hello"})) == (503, "CancelledError")
            assert stuck.asked == 1

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_full_queue() -> None:
    stuck = Stuck()

    async def scene() -> None:
        async with client(stuck, queue=2) as asking:
            taken = [asyncio.create_task(asking.post("/check", json={"text": "hello"})) for _ in range(3)]
            await asyncio.to_thread(stuck.entered.wait, 5)
            refused = [await asking.post("/check", json={"text": "hello"}) for _ in range(3)]
            assert [refusal(each) for each in refused] == [(429, "QueueFull")] * 3
            assert int(refused[0].headers["retry-after"]) >= 1
            assert (await asking.get("/health")).status_code == 200
            assert stuck.asked == 1
            stuck.release.set()
            assert [each.status_code for each in await asyncio.gather(*taken)] == [200] * 3
            assert (await asking.post("/check", json={"text": "hello"})).status_code == 200

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_deadline_stops_the_pass_and_counts_the_wait() -> None:
    stuck = Stuck()

    async def scene() -> None:
        async with client(stuck, timeout=0.3) as asking:
            running = asyncio.create_task(asking.post("/check", json={"text": "hello", "timeout": 50}))
            await asyncio.to_thread(stuck.entered.wait, 5)
            waited = await asking.post("/check", json={"text": "hello", "timeout": 0.01})
            assert refusal(waited) == (504, "DeadlineError")
            assert stuck.asked == 1, "the second was never begun"
            assert refusal(await running) == (504, "DeadlineError"), "the server's own bound holds"
            assert await asyncio.to_thread(stuck.stopped.wait, 5)
            assert refusal(await asking.post("/check", json={"text": "hello", "timeout": 0})) == (504, "DeadlineError")
            stuck.release.set()
            assert (await asking.post("/check", json={"text": "hello"})).status_code == 200

    asyncio.run(asyncio.wait_for(scene(), 10))


@pytest.mark.parametrize(("error", "wanted"), [
    (ZeroDivisionError("SECRET"), (500, "InternalError")), (MemoryError("SECRET"), (500, "InternalError")),
    (InferenceError("The logits are NaN."), (500, "InferenceError")), (CancelledError("Stopped."), (503, "CancelledError")),
    (InputError("No."), (400, "InputError")),
])
def test_failures_are_no_verdicts(error: Exception, wanted: tuple[int, str]) -> None:
    found = ask(Stuck(error), json={"text": "SECRET"})
    assert refusal(found) == wanted
    assert "SECRET" not in found.text


def test_unexpected_failure_of_a_backend_tells_no_text(guard: Guard) -> None:
    found = ask(guard, json={"text": "crash on SECRET"})
    assert refusal(found) == (500, "InternalError")
    assert "SECRET" not in found.text


def test_verdict_that_is_no_json_is_an_error(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    monkeypatch.setattr(Verdict, "to_dict", lambda self: {"verdict": "safe", "score": float("nan")})
    assert refusal(ask(guard, json={"text": "hello"})) == (500, "InternalError")


def test_closed_guard_is_an_error() -> None:
    closed = Guard.scripted(answer)
    closed.close()
    assert refusal(ask(closed, json={"text": "hello"})) == (500, "InferenceError")


def test_client_that_leaves_cancels_its_check() -> None:
    stuck = Stuck()

    async def scene() -> list[int]:
        app, sent, left = create_app(AsyncGuard(cast(Guard, stuck)), queue=1), list[int](), asyncio.Event()
        body = {"type": "http.request", "body": b'{"text": "hello"}', "more_body": False}

        def request(gone: Callable[[], Awaitable[Any]]) -> Awaitable[None]:
            given = iter([body])

            async def receive() -> dict[str, Any]:
                if (message := next(given, None)) is None:
                    await gone()
                return message or {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    sent.append(message["status"])

            headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/check", "headers": headers, "query_string": b"", "root_path": ""}
            return asyncio.create_task(app(scope, receive, send))

        running = request(left.wait)
        await asyncio.to_thread(stuck.entered.wait, 5)
        await request(lambda: asyncio.sleep(0.01))  # one that leaves while it waits is never begun
        assert stuck.asked == 1
        left.set()
        await running
        assert await asyncio.to_thread(stuck.stopped.wait, 5)
        stuck.release.set()
        await request(asyncio.Event().wait)
        return sent

    assert asyncio.run(asyncio.wait_for(scene(), 10))[-1] == 200
    assert stuck.asked == 2


def test_application_closes_its_guard() -> None:
    own = Guard.scripted(answer)

    async def scene() -> None:
        app = create_app(AsyncGuard(own))
        async with app.router.lifespan_context(app):
            assert own.check("hello").safe

    asyncio.run(asyncio.wait_for(scene(), 10))
    with pytest.raises(InferenceError, match="closed"):
        own.check("hello")


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"queue": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_bounds_that_make_no_sense(guard: Guard, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least"):
        create_app(AsyncGuard(guard), **options)
