"""The guard as a whole: composition, locking, limits and faults, on a scripted backend with the built-in tokenizer."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard import AsyncGuard, EdgeGuardError, Guard, Policy, Run, Verdict
from edgeguard.backends.base import Node
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.errors import (
    CancelledError,
    ContextLengthError,
    ConversationError,
    DeadlineError,
    InferenceError,
    InputError,
    ModelMemoryError,
    ModelMismatchError,
    ModelNotFoundError,
    PolicyError,
)


def answer(prompt: str) -> str:
    return "unsafe\nS1,S8" if "bomb" in prompt else "safe"


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard.scripted(answer) as made:
        yield made


class Slow(ScriptedBackend):
    """Waits in each pass until it is stopped or released."""

    def __init__(self, inner: ScriptedBackend) -> None:
        super().__init__(inner._logits, inner.info.head_ids.tolist())
        self.entered, self.release = threading.Event(), threading.Event()

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        self.entered.set()
        while not self.release.wait(0.01):
            run.check()
        return super().extend(entries, run)


def slow_guard() -> tuple[Guard, Slow]:
    backend = Slow(Guard.scripted(answer)._backend)  # type: ignore[arg-type]
    return Guard.load(backend=backend), backend


def test_a_text_gets_its_verdict(guard: Guard) -> None:
    safe, unsafe = guard.check("hello"), guard.check("a bomb")
    assert (safe.verdict, safe.raw, safe.categories, safe.safe) == ("safe", "safe", (), True)
    assert (unsafe.verdict, unsafe.raw, unsafe.codes) == ("unsafe", "unsafe\nS1,S8", ("S1", "S8"))
    assert unsafe.categories[0].slug == "violent-crimes" and unsafe.categories[0].probability > 0.9
    assert (safe.cache_hit, unsafe.cache_hit) == (False, True)
    assert unsafe.passes <= 4 and safe.passes == 1


def test_role_and_threshold(guard: Guard) -> None:
    talk = [{"role": "human", "content": "a bomb"}, {"role": "agent", "content": "no"}]
    assert guard.check(talk).role == "assistant"
    assert guard.check(talk, "user").role == "user"
    low = guard.check("hello", threshold=0.0)
    assert (low.verdict, low.threshold) == ("unsafe", 0.0)
    assert guard.check("a bomb", threshold=1.0).verdict == "safe"
    assert guard.check("a bomb", verdict_only=True).raw == "unsafe"


@pytest.mark.parametrize("bad", ["", " \n", None, 7, b"bytes", [], [{"role": "system", "content": "x"}], [{"role": "user"}],
                                 [{"role": "user", "content": None}], "\ud800", "\u200b\ufeff", "\0",
                                 [{"role": "user", "content": "a", "name": "b"}], [{"role": "user", "content": "a"}] * 2])
def test_what_cannot_be_judged_is_an_error(guard: Guard, bad: object) -> None:
    with pytest.raises(ConversationError):
        guard.check(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"threshold": float("nan")}, {"threshold": 2}, {"threshold": True}, {"threshold": "0.5"},
                                    {"timeout": float("nan")}, {"timeout": -1}, {"timeout": "5"}, {"timeout": 1, "run": Run()},
                                    {"run": 5}])
def test_bad_options_are_errors(guard: Guard, option: dict[str, object]) -> None:
    with pytest.raises(InputError):
        guard.check("hello", **option)  # type: ignore[arg-type]


def test_beyond_the_context(guard: Guard) -> None:
    assert guard.check("word " * 8000).tokens["prompt"] > 8000
    with pytest.raises(ContextLengthError, match="8128"):
        guard.check("word " * 8200)


def test_check_many_keeps_order_and_packs(guard: Guard) -> None:
    texts = [f"{'a bomb' if n % 3 == 0 else 'hello'} {n}" for n in range(40)]
    verdicts = list(guard.check_many(texts, batch=16))
    assert [v.verdict for v in verdicts] == ["unsafe" if n % 3 == 0 else "safe" for n in range(40)]
    assert guard._backend.passes <= 1 + 3 * 4  # type: ignore[attr-defined]
    assert [v.raw for v in verdicts] == [guard.check(text).raw for text in texts]


def test_passes_are_no_longer_than_the_backend_gains_by(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["hello", "a bomb", "how are you today, my old friend?" * 3, "hello", "a bomb"]
    together = list(guard.check_many(texts))
    counts = list[int]()
    tokens = [each.tokens["prompt"] - len(guard._prefixes["user"]) for each in together]
    info = replace(guard.backend_info, pass_tokens=sum(tokens[:2]))
    monkeypatch.setattr(ScriptedBackend, "info", property(lambda _backend: info))
    monkeypatch.setattr(guard, "_prefill", lambda asked, run: counts.append(len(asked)) or Guard._prefill(guard, asked, run))
    verdicts = guard.check_many(texts)
    apart = [next(verdicts)]
    assert counts == [2, 1, 2], "what is done with a verdict takes no time of the batch's"
    apart += verdicts
    assert tokens[2] > sum(tokens[:2])
    assert [(each.verdict, each.raw, each.score) for each in apart] == [(each.verdict, each.raw, each.score) for each in together]


def test_check_many_is_lazy_and_fails_at_the_bad_item(guard: Guard) -> None:
    def endless() -> Iterator[str]:
        yield "hello"
        yield " "
        raise AssertionError("read too far")

    verdicts = guard.check_many(endless(), batch=2)
    assert next(verdicts).safe
    with pytest.raises(ConversationError):
        next(verdicts)
    with pytest.raises(InputError):
        guard.check_many([], batch=0)


@pytest.mark.parametrize("items", ["abc", b"abc", {"a": 1}, None, 5])
def test_check_many_refuses_what_is_no_list_of_texts(guard: Guard, items: object) -> None:
    with pytest.raises(InputError, match="check_many takes"):
        guard.check_many(items)  # type: ignore[arg-type]


def test_a_verdict_has_no_truth_value(guard: Guard) -> None:
    with pytest.raises(TypeError, match=r"verdict\.safe"):
        bool(guard.check("hello"))


def test_no_node_is_left_open(guard: Guard) -> None:
    list(guard.check_many(["a bomb", "hello"] * 5))
    kept = guard._backend.open_nodes  # type: ignore[attr-defined]
    assert kept == len(guard._roots) == 1


@pytest.mark.parametrize("logits", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_no_verdict(guard: Guard, logits: float) -> None:
    rows = len(guard.backend_info.head_ids)
    broken = Guard.load(backend=ScriptedBackend(lambda ids: np.full(rows, logits), guard.backend_info.head_ids.tolist()))
    with pytest.raises(InferenceError):
        broken.check("hello")


def test_memory_that_runs_out_is_no_verdict(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> list[Node]:
        raise MemoryError("Unable to allocate 5.37 MiB")

    with monkeypatch.context() as patched:
        patched.setattr(guard._backend, "extend", full)
        with pytest.raises(ModelMemoryError, match=r"5\.37 MiB.*shorter texts"):
            guard.check("hello")
    assert guard.check("hello").verdict == "safe"


def test_a_model_off_its_path_is_an_error_or_warned_of(guard: Guard) -> None:
    ids = np.array([*guard.backend_info.head_ids.tolist(), 20000])

    def with_other(height: float) -> Guard:
        row = np.zeros(len(ids))
        row[-1] = height
        return Guard.load(backend=ScriptedBackend(lambda _: row, ids.tolist()))

    assert any("probability" in warning for warning in with_other(6.0).check("hello").warnings)
    with pytest.raises(InferenceError):
        with_other(60.0).check("hello")


def test_deadline_and_cancel_stop_a_pass_and_leave_the_guard_usable() -> None:
    guard, backend = slow_guard()
    with pytest.raises(DeadlineError):
        guard.check("hello", timeout=0.05)
    run = Run()
    backend.entered.clear()
    thread = threading.Thread(target=lambda: (backend.entered.wait(5), run.cancel()))
    thread.start()
    with pytest.raises(CancelledError):
        guard.check("hello", run=run)
    thread.join()
    backend.release.set()
    assert guard.check("a bomb").verdict == "unsafe"


def test_waiting_for_another_thread_counts_against_the_deadline() -> None:
    guard, backend = slow_guard()
    thread = threading.Thread(target=lambda: guard.check("hello"))
    thread.start()
    backend.entered.wait(5)
    with pytest.raises(DeadlineError):
        guard.check("hello", timeout=0.1)
    backend.release.set()
    thread.join()


def test_many_threads_get_their_own_verdicts(guard: Guard) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(20):
            text = f"{'a bomb' if (number + turn) % 2 else 'hello'} {number} {turn}"
            if guard.check(text).safe == ("bomb" in text):
                wrong.append(text)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))  # raises what a thread raised
    assert not wrong


def test_closed_guard_is_an_error(guard: Guard) -> None:
    guard.close()
    guard.close()
    with pytest.raises(InferenceError, match="closed"):
        guard.check("hello")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_use_after_fork_is_an_error(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(InferenceError, match="fork"):
        guard.check("hello")
    with guard._lock:  # as inherited from a thread of the parent that was in a check
        guard.close()


def test_policies() -> None:
    with pytest.raises(PolicyError, match="no policy"):
        Guard.load(backend=Guard.scripted(answer)._backend, policy=["Spoilers"])


def test_custom_policy_names_the_categories(llama3_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_text("")
    (tmp_path / "tokenizer.json").write_bytes(llama3_tokenizer.read_bytes())
    backend = Guard.scripted(lambda prompt: "unsafe\nS2" if "S2: Pineapple" in prompt else "safe", tmp_path, profile="llama-guard-2")
    policy = Policy.of(["Spoilers", {"name": "Pineapple", "description": "On pizza."}])
    guard = Guard.load(tmp_path, backend=backend._backend, profile="llama-guard-2", policy=policy)
    verdict = guard.check("I like it")
    assert [(c.code, c.name) for c in verdict.categories if c.listed] == [("S2", "Pineapple")]


def test_loading_what_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError):
        Guard.load("no-such-model")
    with pytest.raises(InputError, match="no backend"):
        Guard.load(backend="tensorrt")
    with pytest.raises(InputError, match=r"Guard\.scripted"):
        Guard.load(backend="scripted")
    with pytest.raises(InputError, match="threads"):
        Guard.load(threads=0)
    with pytest.raises(ModelMismatchError, match="made for the profile 'edgeguard-mini', not 'llama-guard-3-8b'"):
        Guard.load(profile="llama-guard-3-8b")


def test_head_without_the_answers_is_refused(guard: Guard) -> None:
    with pytest.raises(ModelMismatchError, match="no rows"):
        Guard.load(backend=ScriptedBackend(lambda ids: np.zeros(3), [1, 2, 3]))


def test_async_guard_cancels_and_goes_on() -> None:
    async def scene() -> tuple[Verdict, list[Verdict]]:
        guard, backend = slow_guard()
        async with AsyncGuard(guard) as waiting:
            task = asyncio.create_task(waiting.check("hello"))
            await asyncio.to_thread(backend.entered.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(DeadlineError):
                await waiting.check("hello", timeout=0.05)
            backend.release.set()
            many = [verdict async for verdict in waiting.check_many(["a bomb", "hello", "hello"], batch=2)]
            return await waiting.check("a bomb"), many

    verdict, many = asyncio.run(asyncio.wait_for(scene(), 30))
    assert verdict.verdict == "unsafe" and [v.safe for v in many] == [False, True, True]


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_every_text_ends_in_a_verdict_or_a_typed_error(text: str) -> None:
    try:
        verdict = SHARED.check(text)
    except ConversationError:
        blank = all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)
        assert blank or any("\ud800" <= c <= "\udfff" for c in text)
    else:
        assert verdict.verdict == ("unsafe" if "bomb" in text else "safe")


SHARED = Guard.scripted(answer)


def test_error_tree_is_one(guard: Guard) -> None:
    calls: list[Callable[[], object]] = [lambda: guard.check(""), lambda: guard.check("x", threshold=9), lambda: Guard.load("nope")]
    for call in calls:
        with pytest.raises(EdgeGuardError):
            call()


def test_async_check_many_gives_what_came_before_a_bad_item() -> None:
    async def scene() -> list[str]:
        seen: list[str] = []
        async with AsyncGuard(Guard.scripted(answer)) as guard:
            with pytest.raises(ConversationError):
                async for verdict in guard.check_many(["hello", "a bomb", " ", "hello"], batch=4):
                    seen += [verdict.verdict]
        return seen

    assert asyncio.run(scene()) == ["safe", "unsafe"]
