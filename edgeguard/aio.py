"""The asynchronous face of a guard: one worker thread owns the calls, the event loop never waits for a model."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

from edgeguard.backends.base import Run
from edgeguard.errors import EdgeGuardError, InferenceError
from edgeguard.guard import Guard, Judged
from edgeguard.verdict import ModelIdentity, Verdict

T = TypeVar("T")


class AsyncGuard:
    """A `Guard` for asyncio. Cancelling the task that awaits a check stops the model's pass."""

    def __init__(self, guard: Guard) -> None:
        """Takes over `guard`, which is closed with this object."""
        self._guard = guard
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edgeguard")
        self._runs, self._closed = list[Run](), False

    @classmethod
    async def load(cls, *args: Any, **options: Any) -> AsyncGuard:  # noqa: ANN401  passed on as they are
        """`Guard.load` with the same arguments, off the event loop."""
        return cls(await asyncio.to_thread(functools.partial(Guard.load, *args, **options)))

    @property
    def identity(self) -> ModelIdentity:
        """Which model judges."""
        return self._guard.identity

    async def check(self, given: Judged, role: str | None = None, threshold: float | None = None, *,
                    timeout: float | None = None, verdict_only: bool = False) -> Verdict:
        """As `Guard.check`; `timeout` counts from this call, waiting for other calls included."""
        run = Run.within(timeout)
        return await self._within(run, functools.partial(
            self._guard.check, given, role, threshold, verdict_only=verdict_only, run=run))

    async def check_many(self, items: Iterable[Judged], role: str | None = None, threshold: float | None = None, *,
                         timeout: float | None = None, verdict_only: bool = False, batch: int = 16) -> AsyncIterator[Verdict]:
        """As `Guard.check_many`; other calls get their turn between two batches."""
        source = iter(items)
        while part := list(islice(source, batch)):
            run, verdicts = Run.within(timeout), list[Verdict]()
            judged = self._guard.check_many(part, role, threshold, verdict_only=verdict_only, batch=batch, run=run)
            failed: EdgeGuardError | None = None
            try:
                await self._within(run, functools.partial(_collect, judged, verdicts))
            except EdgeGuardError as error:
                failed = error  # told after the verdicts of those before it
            for verdict in verdicts:
                yield verdict
            if failed is not None:
                raise failed

    async def aclose(self) -> None:
        """Cancel the calls that run or wait, then free the model; closing twice is allowed."""
        self._closed = True
        for run in self._runs:
            run.cancel()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._pool.shutdown()
        self._guard.close()

    async def __aenter__(self) -> AsyncGuard:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def _within(self, run: Run, call: Callable[[], T]) -> T:
        if self._closed:
            raise InferenceError("This guard is closed; load it again.")
        self._runs.append(run)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except asyncio.CancelledError:
            run.cancel()
            raise
        finally:
            self._runs.remove(run)


def _collect(verdicts: Iterable[Verdict], into: list[Verdict]) -> None:
    for verdict in verdicts:
        into.append(verdict)  # noqa: PERF402  one by one: what came before an error is kept
