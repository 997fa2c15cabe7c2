from __future__ import annotations

import numpy as np
import pytest
from vocabularies import write_smollm

from edgeguard import profiles
from edgeguard.answers import Answers
from edgeguard.backends.base import Backend, Run
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.conversation import Conversation
from edgeguard.decoder import decide
from edgeguard.errors import CancelledError, ContextLengthError, DeadlineError, InputError
from edgeguard.prompt import render
from edgeguard.tokenizer import JsonTokenizer


def make(**options: int) -> ScriptedBackend:
    return ScriptedBackend(lambda ids: [float(sum(ids)), float(len(ids))], [3, 9], **options)


def test_it_is_a_backend() -> None:
    backend: Backend = make(context=77)
    assert (backend.info.name, backend.info.device, backend.info.context) == ("scripted", "cpu", 77)
    assert backend.info.head_ids.tolist() == [3, 9]


def test_nodes_carry_the_logits_of_their_whole_sequence() -> None:
    backend = make()
    root = backend.open([1, 2], Run())
    left, right = backend.extend([(root, [10]), (root, [20, 30])], Run())
    (leaf,) = backend.extend([(left, (5,))], Run())
    assert [node.logits.tolist() for node in (root, left, right, leaf)] == [[3, 2], [13, 3], [53, 4], [18, 4]]
    assert [node.length for node in (root, left, right, leaf)] == [2, 3, 4, 4]
    assert leaf.parent is left
    assert leaf.logits.dtype == np.float32
    assert backend.passes == 3


def test_closed_and_foreign_nodes_are_errors() -> None:
    backend, other = make(), make()
    root, foreign = backend.open([1], Run()), other.open([1], Run())
    (child,) = backend.extend([(root, [2])], Run())
    backend.close(root)
    backend.close(root)
    with pytest.raises(ValueError, match="closed"):
        backend.extend([(child, [3]), (root, [3])], Run())
    with pytest.raises(ValueError, match="another backend"):
        backend.extend([(foreign, [3])], Run())
    assert backend.passes == 2
    assert backend.extend([(child, [3])], Run())[0].length == 3  # a child outlives its parent
    assert backend.open_nodes == 2


def test_entries_need_tokens() -> None:
    backend = make()
    with pytest.raises(ValueError, match="no tokens"):
        backend.extend([(backend.open([1], Run()), [])], Run())


def test_context_limit() -> None:
    backend = make(context=4)
    root = backend.open([1, 2], Run())
    backend.extend([(root, [3, 4])], Run())
    with pytest.raises(ContextLengthError) as caught:
        backend.extend([(root, [3]), (root, [3, 4, 5])], Run())
    assert (caught.value.tokens, caught.value.limit) == (5, 4)
    assert backend.open_nodes == 2
    with pytest.raises(ContextLengthError):
        backend.open(range(5), Run())


def test_run_is_honoured_and_older_nodes_stay() -> None:
    backend, run = make(), Run()
    root = backend.open([1], run)
    run.cancel()
    with pytest.raises(CancelledError):
        backend.extend([(root, [2])], run)
    with pytest.raises(DeadlineError):
        backend.open([1], Run.within(0))
    assert backend.passes == 1
    assert backend.extend([(root, [2])], Run())


def test_shutdown_ends_it() -> None:
    backend = make()
    root = backend.open([1], Run())
    backend.shutdown()
    assert backend.open_nodes == 0
    with pytest.raises(ValueError, match="shut down"):
        backend.extend([(root, [2])], Run())
    with pytest.raises(ValueError, match="shut down"):
        backend.open([2], Run())


def test_script_of_the_wrong_width() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        ScriptedBackend(lambda ids: [0.0], [3, 9]).open([1], Run())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    return JsonTokenizer.load(write_smollm(tmp_path_factory.mktemp("smollm") / "tokenizer.json"))


@pytest.mark.parametrize("answer", ["safe", "unsafe\nS1", "unsafe\nS10,S2", "unsafe\nS11,S1,S10,S3"])
def test_answering_says_what_the_script_says(tokenizer: JsonTokenizer, answer: str) -> None:
    profile = profiles.get("edgeguard-mini")
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
    seen = []

    def script(prompt: str) -> str:
        seen.append(prompt)
        return answer if "a bomb" in prompt else "safe"

    backend = ScriptedBackend.answering(script, answers, tokenizer)
    for text, expected in (("Where can I buy a bomb? unsafe\nS1", answer), ("Hello", "safe")):
        prompt = render(profile, Conversation.of(text))
        node = backend.open(tokenizer.encode(prompt.segments), Run())
        decision = decide(backend, node, answers, Run())
        assert decision.raw == expected
        assert min(decision.score, 1 - decision.score) < 1e-4
        assert set(seen) == {prompt.text}
        seen.clear()


@pytest.mark.parametrize("answer", ["", "Safe", "unsafe", "unsafe\n", "unsafe\nS12", "unsafe\nS1, S2", "unsafe\nS1,S1",
                                    "safe\nS1", "maybe\nS1"])
def test_answering_takes_answers_only(tokenizer: JsonTokenizer, answer: str) -> None:
    profile = profiles.get("edgeguard-mini")
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
    with pytest.raises(InputError, match="no answer"):
        ScriptedBackend.answering(lambda prompt: answer, answers, tokenizer).open(tokenizer.encode_text("x"), Run())
