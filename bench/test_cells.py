"""Cells for pytest-benchmark: `pytest bench/test_cells.py --benchmark-json=out.json`; not part of the default tests.

The parts of one verdict, each alone, on the built-in model. A runtime that is not installed makes its cells fail, by its name.
"""

from __future__ import annotations

import atexit
from functools import lru_cache
from itertools import cycle
from typing import Any

import pytest

from edgeguard import profiles, store
from edgeguard.answers import Answers
from edgeguard.backends.base import Run
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.bench.texts import KINDS, messages
from edgeguard.conversation import Conversation
from edgeguard.decoder import decide
from edgeguard.guard import Guard
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.tokenizer import JsonTokenizer

DISTINCT = 512  # more than the rounds of a cell, so that no prompt follows itself
ROUNDS = 16


@lru_cache(maxsize=1)
def parts() -> tuple[Profile, JsonTokenizer, Answers]:
    """Of the built-in model."""
    model = store.resolve()
    profile = profiles.get("edgeguard-mini")
    tokenizer = JsonTokenizer.load(model.tokenizer)
    return profile, tokenizer, Answers.build(profile, [each.code for each in profile.policy.categories], tokenizer)


@lru_cache(maxsize=2)
def guard(backend: str) -> Guard:
    """Loaded once for all cells."""
    made = Guard.load(backend=backend, device="cpu")
    atexit.register(made.close)
    return made


def test_render(benchmark: Any) -> None:  # noqa: ANN401  pytest is no part of an installation
    """A conversation to a prompt."""
    profile, _, _ = parts()
    texts = cycle(messages("harmless", DISTINCT))
    benchmark(lambda: render(profile, Conversation.of(next(texts))))


def test_tokenizer(benchmark: Any) -> None:  # noqa: ANN401
    """A prompt to ids."""
    profile, tokenizer, _ = parts()
    prompts = cycle([render(profile, Conversation.of(text)).segments for text in messages("harmless", DISTINCT)])
    benchmark(lambda: tokenizer.encode(next(prompts)))


@pytest.mark.parametrize("answer", ["safe", "unsafe\nS1", "unsafe\nS1,S3,S10"])
def test_decoder(benchmark: Any, answer: str) -> None:  # noqa: ANN401
    """Logits to a decision, on a backend that costs next to nothing."""
    _, tokenizer, answers = parts()
    backend, run = ScriptedBackend.answering(lambda _: answer, answers, tokenizer), Run()
    node = backend.open(tokenizer.encode_text("Hello."), run)
    benchmark(lambda: decide(backend, node, answers, run))


@pytest.mark.parametrize("pack", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["onnx", "llama"])
def test_verdict(benchmark: Any, backend: str, kind: str, pack: int) -> None:  # noqa: ANN401
    """One message, or a pack of them, through the whole guard."""
    judge, made = guard(backend), messages(kind, DISTINCT)
    blocks = cycle([made[at: at + pack] for at in range(0, DISTINCT, pack)])
    list(judge.check_many(next(blocks), batch=pack))
    benchmark.extra_info.update(vars(judge.identity), messages=pack)
    benchmark.pedantic(lambda block: list(judge.check_many(block, batch=pack)), setup=lambda: ((next(blocks),), {}), rounds=ROUNDS)
