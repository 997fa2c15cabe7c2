"""The asynchronous guard when it is closed, and times that are none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from edgeguard import AsyncGuard, Guard, Run
from edgeguard.errors import CancelledError, EdgeGuardError, InferenceError, InputError


class Endless:
    """A guard whose checks end only when they are cancelled."""

    def __init__(self) -> None:
        self.entered, self.busy, self.freed = threading.Event(), False, 0

    def check(self, *given: Any, run: Run, **options: Any) -> None:
        self.busy = True
        self.entered.set()
        try:
            while not run._event.wait(0.005):
                pass
            run.check()
        finally:
            self.busy = False

    def close(self) -> None:
        assert not self.busy
        self.freed += 1


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 10))


def test_closing_cancels_the_calls_that_run_or_wait() -> None:
    endless = Endless()

    async def scene() -> None:
        guard = AsyncGuard(cast(Guard, endless))
        calls = [asyncio.create_task(guard.check("hello")) for _ in range(3)]
        await asyncio.to_thread(endless.entered.wait, 5)
        await asyncio.gather(guard.aclose(), guard.aclose())
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in found] == [CancelledError] * 3

    play(scene)
    assert endless.freed


def test_closed_guard_refuses() -> None:
    async def scene() -> None:
        async with AsyncGuard(Guard.scripted(lambda prompt: "safe")) as guard:
            assert (await guard.check("hello")).safe
        await guard.aclose()
        with pytest.raises(InferenceError, match="This guard is closed; load it again"):
            await guard.check("hello")
        with pytest.raises(InferenceError, match="closed"):
            [verdict async for verdict in guard.check_many(["hello"])]

    play(scene)


def test_closing_between_two_batches() -> None:
    async def scene() -> None:
        guard, seen = AsyncGuard(Guard.scripted(lambda prompt: "safe")), []
        with pytest.raises(InferenceError, match="closed"):
            async for verdict in guard.check_many(["a", "b", "c"], batch=2):
                seen.append(verdict.verdict)
                await guard.aclose()
        assert seen == ["safe", "safe"]

    play(scene)


@pytest.mark.parametrize("timeout", [10**400, -(10**400), 10**5000, float("nan"), -1, -0.1, True, "1", [], 1j],
                         ids=lambda given: type(given).__name__)
def test_what_is_no_time(timeout: Any) -> None:
    with pytest.raises(InputError, match="timeout") as caught:
        Run.within(timeout)
    assert len(str(caught.value)) < 100

    async def scene() -> None:
        async with AsyncGuard(Guard.scripted(lambda prompt: "safe")) as guard:
            with pytest.raises(EdgeGuardError, match="timeout"):
                await guard.check("hello", timeout=timeout)

    play(scene)


@pytest.mark.parametrize("timeout", [60, 0.5e3, 1e300, float("inf"), None])
def test_what_is_a_time(timeout: float | None) -> None:
    assert not Run.within(timeout).stopped
