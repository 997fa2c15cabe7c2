from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from edgeguard import decoder
from edgeguard.answers import Answers, Ids
from edgeguard.backends.base import Node, Run
from edgeguard.backends.scripted import ScriptedBackend
from edgeguard.decoder import MASS_FLOOR, Decision, decide, decide_many
from edgeguard.errors import CancelledError, ContextLengthError, DeadlineError, InferenceError, InputError, ModelMismatchError

PROMPT = (1000, 7, 8)
SEVERAL = 7  # seed of a script of llama3 that lists several codes, and so takes two passes
OTHERS = (3, 271, 11, 50000)  # rows that are no part of an answer


def llama3(count: int = 11) -> Answers:
    """Digits fused, comma and S fused, two ends, three forms."""
    digits = [*range(16, 25), 605, 806, *range(900, 940)][:count]
    return Answers(
        lead_in=(), safe=((19193,), (6220,), (26747,)), unsafe=((39257,), (20451,), (79870,)), line=(198,),
        codes=tuple(f"S{number + 1}" for number in range(count)), first=tuple((50, id_) for id_ in digits),
        following=tuple((21861, id_) for id_ in digits), ends=(128001, 128009),
    )


def smollm(numbers: Sequence[int] = range(1, 12)) -> Answers:
    """Digits one by one, comma and S apart, `unsafe` in two tokens, one end."""
    spelled = [(67, *(32 + int(digit) for digit in str(number))) for number in numbers]
    return Answers(
        lead_in=(), safe=((18437,),), unsafe=((10082, 9980),), line=(198,), codes=tuple(f"S{number}" for number in numbers),
        first=tuple(spelled), following=tuple((28, *ids) for ids in spelled), ends=(2,),
    )


def bytes_(numbers: Sequence[int] = range(1, 8)) -> Answers:
    """One token a character, the line break in two, codes O1 to O7."""
    spelled = [(79, *str(number).encode()) for number in numbers]
    return Answers(
        lead_in=(), safe=((115, 97), (83, 97)), unsafe=((117, 110, 115), (85, 110, 115)), line=(13, 10),
        codes=tuple(f"O{number}" for number in numbers), first=tuple(spelled), following=tuple((44, *ids) for ids in spelled),
        ends=(256, 257),
    )


VOCABULARIES = {"llama3": llama3(), "smollm": smollm(), "bytes": bytes_(), "smollm-26": smollm(range(1, 27)), "one": smollm([9]),
                "two": llama3(2), "starts": smollm([1, 10, 11, 110, 2])}


def allowed(answers: Answers, said: Ids, used: Ids = ()) -> set[int]:
    """Every id that can follow in a list of codes, by trying all of them."""
    found: set[int] = set()
    for code, ids in enumerate(answers.following if used else answers.first):
        if code in used:
            continue
        if len(said) < len(ids) and ids[: len(said)] == said:
            found.add(ids[len(said)])
        elif said[: len(ids)] == ids:
            found |= set(answers.ends) if said == ids else set()
            found |= allowed(answers, said[len(ids):], (*used, code))
    return found


class Script:
    """Random logits that depend on every id of the sequence; what the automaton allows is liked by `bias` more."""

    def __init__(self, answers: Answers, seed: int, bias: float = 0.0, spread: float = 2.0) -> None:
        self.answers, self.seed, self.bias, self.spread = answers, seed, bias, spread
        self.head = np.array(sorted({*answers.ids, *OTHERS}))
        self.rows = {id_: row for row, id_ in enumerate(self.head.tolist())}

    def __call__(self, ids: Ids) -> np.ndarray:
        logits = np.random.default_rng([self.seed, *ids]).normal(0, self.spread, len(self.head))
        for id_ in self.liked(ids[len(PROMPT):]):
            logits[self.rows[id_]] += self.bias
        if len(ids) == len(PROMPT):  # a guard's mass is on its answers
            logits[[self.rows[form[0]] for form in (*self.answers.safe, *self.answers.unsafe)]] += 30
        return logits.astype(np.float32)

    def liked(self, said: Ids) -> set[int]:
        if not self.bias:
            return set()
        forms = [(*form, *self.answers.line) for form in self.answers.unsafe]
        begun = {form[len(said)] for form in forms if len(form) > len(said) and form[: len(said)] == said}
        begun |= {form[0] for form in self.answers.safe} if not said else set()
        for form in forms:
            if said[: len(form)] == form:
                return allowed(self.answers, said[len(form):])
        return begun

    def logit(self, ids: Ids, id_: int) -> float:
        return float(self(ids)[self.rows[id_]])


def backend_of(script: Script, **options: int) -> ScriptedBackend:
    return ScriptedBackend(script, script.head.tolist(), **options)


def check(script: Script, prompt: Ids = PROMPT, **options: float) -> tuple[Decision, ScriptedBackend]:
    backend = backend_of(script)
    node = backend.open(prompt, Run())
    backend.passes = 0
    decision = decide(backend, node, script.answers, Run(), **options)  # type: ignore[arg-type]
    assert backend.open_nodes == 1
    assert backend.passes == decision.passes
    return decision, backend


def opening(script: Script) -> Ids:
    form = max(script.answers.unsafe, key=lambda ids: script.logit(PROMPT, ids[0]))
    return (*PROMPT, *form, *script.answers.line)


def plain_greedy(script: Script) -> tuple[str, ...]:
    """Codes one token at a time, one pass a token."""
    begin, said = opening(script), ()
    while True:
        choice = max(sorted(allowed(script.answers, said)), key=lambda id_: script.logit((*begin, *said), id_))
        if choice in script.answers.ends:
            return names(script.answers, said)
        said = (*said, choice)


def names(answers: Answers, said: Ids, used: Ids = ()) -> tuple[str, ...]:
    """Codes that the ids of a complete list spell."""
    if not said:
        return tuple(answers.codes[code] for code in used)
    for code, ids in enumerate(answers.following if used else answers.first):
        rest = said[len(ids):]
        whole = not rest or rest[-1] in allowed(answers, rest[:-1], (*used, code))
        if code not in used and said[: len(ids)] == ids and whole:
            found = names(answers, rest, (*used, code))
            if found:
                return found
    return ()


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_codes_are_the_masked_greedy_ones(name: str, bias: float) -> None:
    answers = VOCABULARIES[name]
    lengths = set()
    for seed in range(20 if name == "smollm-26" else 120):
        script = Script(answers, seed, bias, spread=[0.5, 2.0, 6.0][seed % 3])
        decision, _ = check(script, threshold=0.0)
        assert decision.codes == plain_greedy(script)
        assert decision.raw == "unsafe\n" + ",".join(decision.codes)
        assert decision.passes <= 1 + len(decision.codes)
        assert set(decision.probabilities) == set(answers.codes)
        lengths.add(len(decision.codes))
    assert len(lengths) > 1 or name == "one"


@pytest.mark.parametrize("name", ["llama3", "smollm", "bytes"])
def test_raw_is_what_unconstrained_decoding_says_when_it_is_well_formed(name: str) -> None:
    answers, met = VOCABULARIES[name], set()
    single = replace(answers, safe=answers.safe[:1], unsafe=answers.unsafe[:1])
    for seed in range(300):
        script = Script(single, seed, bias=10.0)
        said = unconstrained(script)
        decision, _ = check(script)
        if said is not None:
            assert decision.raw == said
            met.add((seed, said.count("S") + said.count("O")))
    assert len(met) > 120
    assert len({codes for _, codes in met}) > 2


def unconstrained(script: Script) -> str | None:
    """Greedy decoding over all rows; None if it is no answer."""
    said: Ids = ()
    while len(said) < 80:
        choice = int(script.head[int(np.argmax(script((*PROMPT, *said))))])
        if choice in script.answers.ends:
            break
        said = (*said, choice)
        if said == script.answers.safe[0]:
            return "safe"
    begin = (*script.answers.unsafe[0], *script.answers.line)
    codes = names(script.answers, said[len(begin):]) if said[: len(begin)] == begin else ()
    return "unsafe\n" + ",".join(codes) if codes else None


Lists = dict[Ids, tuple[float, tuple[int, ...]]]


def lists(script: Script) -> Lists:
    """Every list of codes as ids: its probability given unsafe, and its codes; by brute force."""
    begin, answers = opening(script), script.answers
    found: Lists = {}

    def visit(said: Ids, share: float) -> None:
        options = sorted(allowed(answers, said))
        weights = np.exp([script.logit((*begin, *said), id_) for id_ in options])
        for id_, weight in zip(options, weights / weights.sum(), strict=True):
            if id_ in answers.ends:
                before, _ = found.get(said, (0.0, ()))
                found[said] = before + share * weight, tuple(map(answers.codes.index, names(answers, said)))
            else:
                visit((*said, id_), share * weight)

    visit((), 1.0)
    return found


def asked_by(backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> set[Ids]:
    asked: set[Ids] = set()
    extend = backend.extend

    def noting(entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        nodes = extend(entries, run)
        asked.update(node.state for node in nodes)  # type: ignore[misc]
        return nodes

    monkeypatch.setattr(backend, "extend", noting)
    return asked


SMALL = {"llama3-4": llama3(4), "smollm-4": smollm([1, 10, 11, 2]), "bytes-3": bytes_([1, 2, 12])}


@pytest.mark.parametrize("name", SMALL)
def test_probabilities_are_those_of_the_explored_tree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = SMALL[name]
    open_ends = 0
    for seed in range(40):
        monkeypatch.setattr(decoder, "BRANCHES", [12, 3, 6][seed % 3])
        script = Script(answers, seed, spread=[0.3, 1.0, 3.0][seed % 3])
        backend = backend_of(script)
        node = backend.open(PROMPT, Run())
        asked = asked_by(backend, monkeypatch)
        decision = decide(backend, node, answers, Run(), threshold=0.0)
        everything = lists(script)
        assert sum(share for share, _ in everything.values()) == pytest.approx(1)
        lower, unexplored = explored(script, everything, asked)
        assert decision.unexplored == pytest.approx(unexplored, abs=1e-9)
        for code, name_ in enumerate(answers.codes):
            exact = sum(share for share, codes in everything.values() if code in codes)
            assert decision.probabilities[name_] == pytest.approx(lower[code], abs=1e-9)
            assert decision.probabilities[name_] - 1e-9 <= exact <= decision.probabilities[name_] + unexplored + 1e-9
        open_ends += unexplored > 0.01
    assert open_ends > 0


def explored(script: Script, everything: Lists, asked: set[Ids]) -> tuple[dict[int, float], float]:
    """The bounds by their definition: what is certain for a list at the first choice on its way that was not asked."""
    answers, begin, unexplored = script.answers, opening(script), 0.0
    lower = dict.fromkeys(range(len(answers.codes)), 0.0)
    for said, (share, listed) in everything.items():
        certain = set(listed)
        for size in range(len(said) + 1):
            options = allowed(answers, said[:size])
            if len(options - set(answers.ends)) + bool(options & set(answers.ends)) > 1 and (*begin, *said[:size]) not in asked:
                unexplored += share
                alike = [set(others) for ids, (_, others) in everything.items() if ids[:size] == said[:size]]
                certain = set.intersection(*alike)
                break
        for code in certain:
            lower[code] += share
    return lower, unexplored


@pytest.mark.parametrize("name", SMALL)
def test_exploring_everything_is_exact_and_takes_two_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "BRANCHES", 10**6)
    monkeypatch.setattr(decoder, "LIKELY", 0.0)
    scripts = [Script(SMALL[name], seed) for seed in range(20)]
    decided = [(script, check(script, threshold=0.0)[0]) for script in scripts]
    assert {decision.passes for _, decision in decided} == {1, 2}  # one pass decides about a single code without exploring the rest
    for script, decision in ((script, decision) for script, decision in decided if decision.passes == 2):
        everything = lists(script)
        assert decision.unexplored == 0
        for code, name_ in enumerate(script.answers.codes):
            exact = sum(share for share, codes in everything.values() if code in codes)
            assert decision.probabilities[name_] == pytest.approx(exact)


@pytest.mark.parametrize("name", ["llama3", "smollm"])
@pytest.mark.parametrize(("codes", "passes"), [("S1", 1), ("S11", 1), ("S1,S9", 2), ("S2,S3", 2), ("S10,S1", 2), ("S1,S2,S3", 3),
                                               ("S3,S1,S10,S11", 4), (",".join(f"S{number}" for number in range(1, 12)), 11)])
def test_a_pass_for_each_code_is_enough(name: str, codes: str, passes: int) -> None:
    """A model that is fairly sure, and for which the second code of the list was the second best first one."""
    answers = VOCABULARIES[name]
    script = Fixed(answers, codes)
    decision, _ = check(script)
    assert ",".join(decision.codes) == codes
    assert decision.passes <= passes
    assert decision.decoded <= 40 * decision.passes
    assert decision.probabilities[decision.codes[0]] > 0.8


class Fixed(Script):
    """Says one list; the codes to come are liked before their turn."""

    def __init__(self, answers: Answers, codes: str) -> None:
        super().__init__(answers, 0)
        order = [answers.codes.index(code) for code in codes.split(",")]
        self.target = [answers.first[order[0]], *(answers.following[code] for code in order[1:])]
        self.whole = (*answers.unsafe[0], *answers.line, *(id_ for ids in self.target for id_ in ids), answers.ends[0])

    def __call__(self, ids: Ids) -> np.ndarray:
        said, row = ids[len(PROMPT):], np.zeros(len(self.head))
        for rank, ids_ in enumerate(self.target[1:3]):
            row[[self.rows[id_] for id_ in ids_[1:]]] = 2 - rank
        if said == self.whole[: len(said)]:
            row[self.rows[self.whole[len(said)]]] = 6
        return row


@pytest.mark.parametrize("count", [16, 50])
def test_many_codes(count: int) -> None:
    script = Script(llama3(count), 1, bias=0.1)
    decision, _ = check(script, threshold=0.0)
    assert decision.codes == plain_greedy(script)
    assert decision.passes <= 1 + len(decision.codes)


def test_a_single_code_needs_no_pass() -> None:
    decision, _ = check(Script(smollm([9]), 0), threshold=0.0)
    assert decision.codes == ("S9",)
    assert decision.probabilities == {"S9": 1.0}
    assert (decision.passes, decision.decoded, decision.unexplored) == (0, 0, 0.0)


def given_first(answers: Answers, logits: dict[int, float], rest: float = 0.0) -> Script:
    """A script whose first answer position is given."""
    script = Script(answers, 0)
    plain = script.__class__.__call__

    class First(Script):
        def __call__(self, ids: Ids) -> np.ndarray:
            if ids != PROMPT:
                return plain(self, ids)
            row = np.full(len(self.head), rest, dtype=np.float32)
            for id_, logit in logits.items():
                row[self.rows[id_]] = logit
            return row

    return First(answers, 0)


def test_score_and_mass_sum_the_surface_forms() -> None:
    answers = VOCABULARIES["llama3"]
    logits = {19193: 3.0, 6220: 2.0, 26747: -1.0, 39257: 1.0, 20451: 2.5, 79870: 0.5}
    script = given_first(answers, logits, rest=-0.5)
    decision, _ = check(script)
    safe, unsafe = (sum(np.exp(logits[ids[0]]) for ids in forms) for forms in (answers.safe, answers.unsafe))
    assert decision.score == pytest.approx(unsafe / (safe + unsafe))
    assert decision.mass == pytest.approx((safe + unsafe) / (safe + unsafe + (len(script.head) - 6) * np.exp(-0.5)))
    assert not decision.unsafe
    assert (decision.raw, decision.codes, decision.probabilities, decision.passes) == ("safe", (), {}, 0)


def test_list_goes_on_from_the_likeliest_unsafe_form() -> None:
    script = given_first(VOCABULARIES["llama3"], {20451: 9.0, 39257: 8.0})
    backend = backend_of(script)
    with pytest.MonkeyPatch.context() as patch:
        asked = asked_by(backend, patch)
        assert decide(backend, backend.open(PROMPT, Run()), script.answers, Run()).unsafe
    assert {ids[len(PROMPT)] for ids in asked} == {20451}


@pytest.mark.parametrize(("threshold", "unsafe"), [(0.0, True), (0.25, True), (0.2689, True), (0.269, False), (1.0, False)])
def test_unsafe_from_the_threshold_on(threshold: float, unsafe: bool) -> None:
    script = given_first(VOCABULARIES["smollm"], {18437: 1.0, 10082: 0.0})  # score 0.26894
    decision, _ = check(script, threshold=threshold, verdict_only=True)
    assert decision.unsafe is unsafe
    assert decision.raw == ("unsafe" if unsafe else "safe")
    assert (decision.codes, decision.probabilities, decision.passes) == ((), {}, 0)


def test_a_tie_is_unsafe_at_the_threshold() -> None:
    decision, _ = check(given_first(VOCABULARIES["smollm"], {18437: 1.0, 10082: 1.0}), verdict_only=True)
    assert decision.score == 0.5
    assert decision.unsafe


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), float("inf"), float("-inf")])
def test_thresholds_outside_zero_to_one(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold"):
        check(Script(VOCABULARIES["smollm"], 0), threshold=threshold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_logits_that_are_not_finite_are_no_verdict(bad: float, row: int, depth: int) -> None:
    answers = VOCABULARIES["llama3"]

    class Bad(Script):
        def __call__(self, ids: Ids) -> np.ndarray:
            logits = super().__call__(ids)
            if backend.passes == depth:
                logits[row] = bad
            return logits

    backend = backend_of(Bad(answers, SEVERAL))
    first = backend.open(PROMPT, Run())
    with pytest.raises(InferenceError, match="NaN or infinite"):
        decide(backend, first, answers, Run(), threshold=0.0)
    assert backend.open_nodes == 1


def test_no_mass_on_the_answers_is_no_verdict() -> None:
    answers = VOCABULARIES["smollm"]
    for logit, fails in ((np.log(MASS_FLOOR) + 0.1, False), (np.log(MASS_FLOOR) - 0.1, True), (-80.0, True)):
        script = given_first(answers, {3: 20.0, 18437: 20.0 + float(logit)}, rest=-60.0)
        if fails:
            with pytest.raises(InferenceError, match="probability"):
                check(script)
        else:
            assert check(script)[0].mass == pytest.approx(MASS_FLOOR, rel=0.2)


def test_huge_logits_do_not_overflow() -> None:
    decision, _ = check(given_first(VOCABULARIES["smollm"], {10082: 3e38, 18437: -3e38}, rest=-3e38))
    assert (decision.score, decision.mass) == (1.0, 1.0)


def test_missing_rows_are_a_mismatch() -> None:
    answers = VOCABULARIES["llama3"]
    for missing in (answers.ids[0], answers.ids[-1], 19193):
        head = [id_ for id_ in answers.ids if id_ != missing]
        backend = ScriptedBackend(lambda ids: np.zeros(len(head)), head)  # noqa: B023
        with pytest.raises(ModelMismatchError, match=str(missing)):
            decide(backend, backend.open(PROMPT, Run()), answers, Run())


@pytest.mark.parametrize("name", ["llama3", "smollm", "bytes"])
def test_many_at_once_are_as_one_by_one_in_fewer_passes(name: str) -> None:
    answers = VOCABULARIES[name]

    @cache
    def script(ids: Ids) -> np.ndarray:
        return Script(answers, ids[0], bias=2.0)((*PROMPT, *ids[1:]))

    head = Script(answers, 0).head.tolist()
    backend = ScriptedBackend(script, head)
    nodes = [backend.open((seed,), Run()) for seed in range(12)]
    alone = [decide(backend, node, answers, Run(), threshold=0.4) for node in nodes]
    backend.passes = 0
    together = decide_many(backend, nodes, answers, Run(), threshold=0.4)
    assert together == alone
    assert {decision.unsafe for decision in alone} == {True, False}
    assert backend.passes == max(decision.passes for decision in alone)
    assert backend.open_nodes == len(nodes)
    assert decide_many(backend, [], answers, Run()) == []


def test_one_that_fails_fails_all_and_leaves_no_node() -> None:
    answers = VOCABULARIES["llama3"]
    good = Script(answers, 3)

    def script(ids: Ids) -> np.ndarray:
        return good(ids) if ids[0] == PROMPT[0] or len(ids) < 5 else np.full(len(good.head), np.nan)

    backend = ScriptedBackend(script, good.head.tolist())
    nodes = [backend.open(PROMPT, Run()), backend.open((5,), Run())]
    with pytest.raises(InferenceError):
        decide_many(backend, nodes, answers, Run(), threshold=0.0)
    assert backend.open_nodes == 2


@pytest.mark.parametrize(("stop", "error"), [
    (Run.cancel, CancelledError), (lambda run: setattr(run, "deadline", 0.0), DeadlineError),
])
@pytest.mark.parametrize("after", [1, 2])
def test_cancel_between_passes_leaves_no_node(stop: Callable[[Run], None], error: type[Exception], after: int) -> None:
    script, run = Script(VOCABULARIES["llama3"], SEVERAL), Run()
    backend = backend_of(script)
    node = backend.open(PROMPT, run)
    extend = backend.extend

    def stopping(entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        if backend.passes == after:
            stop(run)
        return extend(entries, run)

    backend.extend = stopping  # type: ignore[method-assign]
    with pytest.raises(error):
        decide(backend, node, script.answers, run, threshold=0.0)
    assert backend.open_nodes == 1
    backend.extend = extend  # type: ignore[method-assign]
    assert decide(backend, node, script.answers, Run(), threshold=0.0).unsafe  # the prompt's node is as good as before


def test_context_that_is_full_is_an_error() -> None:
    script = Script(VOCABULARIES["llama3"], 3)
    backend = backend_of(script, context=len(PROMPT) + 2)
    with pytest.raises(ContextLengthError):
        decide(backend, backend.open(PROMPT, Run()), script.answers, Run(), threshold=0.0)
    assert backend.open_nodes == 1
