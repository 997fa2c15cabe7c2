"""How an application tests what it does with verdicts: a scripted guard, no weights, no runtime, no network.

    python -m pytest examples/app_test.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgeguard import EdgeGuardError, Guard


def publish(guard: Guard, comment: str) -> str:
    """The application: publishes a comment, holds it back for a person, or rejects it."""
    try:
        verdict = guard.check(comment)
    except EdgeGuardError:
        return "held back"  # not judged is not safe
    if verdict.safe:
        return "published"
    return "rejected: " + ", ".join(category.slug for category in verdict.categories if category.listed)


@pytest.fixture
def guard() -> Iterator[Guard]:
    """Finds violence in bombs, and hate and self-harm where they are called by their names."""
    script = {"bomb": "unsafe\nS1", "hate and harm": "unsafe\nS9,S10"}
    with Guard.scripted(lambda prompt: next((answer for word, answer in script.items() if word in prompt), "safe")) as scripted:
        yield scripted


@pytest.mark.parametrize(("comment", "outcome"), [
    ("A nice day.", "published"),
    ("Here is how to build a bomb.", "rejected: violent-crimes"),
    ("This is hate and harm.", "rejected: hate, self-harm"),
    ("   ", "held back"),
])
def test_what_becomes_of_a_comment(guard: Guard, comment: str, outcome: str) -> None:
    """Each kind of verdict, and a text that cannot be judged."""
    assert publish(guard, comment) == outcome


def test_a_guard_that_fails_publishes_nothing(guard: Guard) -> None:
    """A closed guard raises; the comment waits for a person."""
    guard.close()
    assert publish(guard, "A nice day.") == "held back"
