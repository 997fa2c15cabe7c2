"""The one module that composes: conversation, prompt, tokens, backend, decoder, verdict. One lock around the backend."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeguard.answers import Answers
from edgeguard.backends import background
from edgeguard.backends.base import Backend, BackendInfo, Node, Run
from edgeguard.calibration import UNCALIBRATED, Calibration, Whose
from edgeguard.conversation import Conversation, Message
from edgeguard.decoder import Decision, decide_many
from edgeguard.errors import (
    ContextLengthError,
    EdgeGuardError,
    InferenceError,
    InputError,
    ModelMemoryError,
    ModelMismatchError,
    PolicyError,
)
from edgeguard.policy import Policy
from edgeguard.prefix import role_prefixes
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.tokenizer import Tokenizer
from edgeguard.verdict import Category, ModelIdentity, Role, Verdict

Judged = str | Sequence[Mapping[str, Any] | Message]
"""What can be checked: a text, or messages with role and content."""

LOW_MASS = 0.5
ANSWER_ROOM = 64  # tokens of the context kept free for the answer and its branches


@dataclass(frozen=True)
class _Asked:
    """One conversation on its way."""

    role: Role
    ids: list[int]
    warnings: tuple[str, ...]
    tokenize: float
    """Milliseconds."""


class Guard:
    """A loaded guard model. Safe to share between threads: calls wait for each other. Use `Guard.load`, then `check`."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, profile: Profile, identity: ModelIdentity, *,
                 policy: Policy | None = None, neutralise: bool = False, calibration: Calibration = UNCALIBRATED) -> None:
        """From parts; raises `PolicyError` or `ModelMismatchError` when they do not belong together."""
        if policy is not None and not profile.custom_policy:
            raise PolicyError(f"{profile.title} reads no policy: it was trained on its own categories. Leave the policy out.")
        self.profile, self.identity, self.calibration = profile, identity, calibration
        self.policy = policy or profile.policy
        self._custom, self._neutralise = policy, neutralise
        self._backend, self._tokenizer = backend, tokenizer
        self._answers = Answers.build(profile, [category.code for category in self.policy.categories], tokenizer)
        if lacking := set(self._answers.ids) - set(backend.info.head_ids.tolist()):
            raise ModelMismatchError(
                f"The model's head has no rows for {len(lacking)} of the answer's tokens (ids {sorted(lacking)[:5]}); "
                f"it was not converted for the profile {profile.name!r}."
            )
        self._prefixes = role_prefixes(profile, tokenizer, policy)
        self._roots: dict[Role, Node] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def load(cls, model: str | Path | None = None, *, backend: str | Backend = "auto", device: str = "auto",
             threads: int | None = None, profile: str | None = None,
             policy: Policy | str | Path | Sequence[Any] | None = None, neutralise: bool = False,
             calibration: Whose = "user") -> Guard:
        """Load a model by name or path, or the built-in one.

        `backend` is `auto`, `onnx`, `llama`, `reference`, or a `Backend` of your own; `device` is `auto`,
        `cpu`, `cuda`, `metal`, ...; `policy` is a list of categories or a YAML or JSON file. `profile` is needed only for
        model files that do not say which guard model they are. With `neutralise`, pieces of the prompt's template inside
        the text are defused, not only reported. `calibration` says whose scores and threshold count: the user's, from
        `edgeguard calibrate`, if there are any, else the artifact's; the artifact's only; or none's. A backend of your own has
        none. Raises `ModelError`, `RuntimeMissingError`, `DeviceError`, `PolicyError`, and `StoreError` for a calibration that
        cannot be read.
        """
        from edgeguard.loading import load_parts

        parts = load_parts(model, backend=backend, device=device, threads=threads, profile=profile, calibration=calibration)
        try:
            return cls(parts.backend, parts.tokenizer, parts.profile, parts.identity, policy=_policy(policy, parts.profile),
                       neutralise=neutralise, calibration=parts.calibration)
        except BaseException:
            parts.backend.shutdown()
            raise

    @classmethod
    def scripted(cls, answer: Callable[[str], str], model: str | Path | None = None, *, profile: str | None = None) -> Guard:
        """A guard without weights, for an application's tests: `answer` gets the prompt and returns the model's answer.

            Guard.scripted(lambda prompt: "unsafe\\nS1" if "bomb" in prompt else "safe")

        `model` lends its tokenizer and profile, by default the built-in one.
        """
        from edgeguard.loading import scripted_parts

        parts = scripted_parts(answer, model, profile)
        return cls(parts.backend, parts.tokenizer, parts.profile, parts.identity)

    @property
    def backend_info(self) -> BackendInfo:
        """What was really granted."""
        return self._backend.info

    def check(self, given: Judged, role: str | None = None, threshold: float | None = None, *,
              timeout: float | None = None, verdict_only: bool = False, run: Run | None = None) -> Verdict:
        """Judge a text or a conversation.

        `role` is whose turn is judged (`user` or `assistant`; the last message's by default), `threshold` the score from
        which on it is unsafe (the calibration's by default, 0.5 without one), `timeout` seconds; `run` is a cancel token of
        your own instead. `verdict_only` leaves out the codes. Raises an `EdgeGuardError` whenever there is no verdict.
        """
        asked = self._ask(given, role)
        return self._judge([asked], self._threshold(threshold), _run(timeout, run), verdict_only)[0]

    def check_many(self, items: Iterable[Judged], role: str | None = None, threshold: float | None = None, *,
                   timeout: float | None = None, verdict_only: bool = False, batch: int = 16,
                   run: Run | None = None) -> Iterator[Verdict]:
        """Judge many, up to `batch` of them in one pass, in order, as they are asked for.

        `timeout` seconds count for each batch, a `run` of your own for all.

        The first item that cannot be judged raises its error, after the verdicts of those before it.
        """
        threshold = self._threshold(threshold)
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch is {batch!r}; a whole number from 1 on is needed.")
        if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
            raise InputError(f"check_many takes a list or iterator of texts or conversations, not {type(items).__name__}.")
        _run(timeout, run)
        return self._batches(iter(items), role, threshold, lambda: _run(timeout, run), verdict_only, batch)

    def _batches(self, items: Iterator[Judged], role: str | None, threshold: float, start: Callable[[], Run],
                 verdict_only: bool, batch: int) -> Iterator[Verdict]:
        while taken := list(islice(items, batch)):
            asked: list[_Asked] = []
            failed: EdgeGuardError | None = None
            for item in taken:
                try:
                    asked.append(self._ask(item, role))
                except EdgeGuardError as error:
                    failed = error
                    break
            if asked:
                run = start()  # verdicts are given when all are there: what is done with one must not take the time of the next
                yield from [each for part in self._passes(asked) for each in self._judge(part, threshold, run, verdict_only)]
            if failed is not None:
                raise failed

    def warmup(self) -> None:
        """Evaluate the shared prefixes and run each kernel once, so that the first check is as fast as the others."""
        for role in ("user", "assistant"):
            self.check("Hello.", role, verdict_only=True)
        background.settled()

    def close(self) -> None:
        """Free the model; closing twice is allowed, and after a fork it leaves the parent's model alone."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._roots.clear()
                self._backend.shutdown()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _threshold(self, given: float | None) -> float:
        if given is None:
            return self.calibration.threshold
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
            raise InputError(f"threshold is {given!r}; a number from 0 to 1 is needed.")
        return float(given)

    def _ask(self, given: Judged, role: str | None) -> _Asked:
        """Tokens of the prompt, no model involved."""
        began = time.perf_counter()
        conversation = Conversation.of(given, role)
        prompt = render(self.profile, conversation, self._custom, neutralise=self._neutralise)
        ids = [*self._tokenizer.encode(prompt.segments), *self._answers.lead_in]
        limit = min(self.profile.context, self._backend.info.context) - ANSWER_ROOM
        if len(ids) > limit:
            raise ContextLengthError(len(ids), limit)
        return _Asked(conversation.role, ids, prompt.warnings, _since(began))

    def _passes(self, asked: list[_Asked]) -> Iterator[list[_Asked]]:
        """Those that are judged together: as many, in order, as the backend gains by."""
        most, part, count = self._backend.info.pass_tokens, list[_Asked](), 0
        for one in asked:
            tokens = len(one.ids) - len(self._prefixes[one.role])
            if part and most is not None and count + tokens > most:
                yield part
                part, count = [], 0
            part.append(one)
            count += tokens
        yield part

    def _judge(self, asked: list[_Asked], threshold: float, run: Run, verdict_only: bool) -> list[Verdict]:
        with self._held(run):
            hits = [one.role in self._roots for one in asked]
            began = time.perf_counter()
            nodes = self._prefill(asked, run)
            prefill = _since(began)
            try:
                decisions = decide_many(self._backend, nodes, self._answers, run, threshold=threshold,
                                        calibration=self.calibration, verdict_only=verdict_only)
            finally:
                for node in nodes:
                    self._backend.close(node)
            times = {"prefill": prefill, "decode": _since(began) - prefill}
        return [self._verdict(one, hit, decision, threshold, times)
                for one, hit, decision in zip(asked, hits, decisions, strict=True)]

    def _prefill(self, asked: list[_Asked], run: Run) -> list[Node]:
        """One node at the end of each prompt, all in one pass on the kept prefixes."""
        entries: list[tuple[Node, list[int]]] = []
        for one in asked:
            prefix = self._prefixes[one.role]
            if one.role not in self._roots:
                self._roots[one.role] = self._backend.open(prefix, run)
            if tuple(one.ids[: len(prefix)]) != prefix:
                raise InferenceError("The text changed the tokens of the prompt before it; it cannot be judged as it stands.")
            entries.append((self._roots[one.role], one.ids[len(prefix):]))
        return self._backend.extend(entries, run)

    @contextmanager
    def _held(self, run: Run) -> Iterator[None]:
        """The lock, waited for as long as the run allows."""
        if os.getpid() != self._process:
            raise InferenceError("This guard was loaded in another process; load it again after the fork.")
        run.check()
        while not self._lock.acquire(timeout=0.05):
            run.check()
        try:
            if self._closed:
                raise InferenceError("This guard is closed; load it again.")
            yield
        except MemoryError as error:
            if isinstance(error, EdgeGuardError):
                raise
            raise ModelMemoryError(f"Memory ran out while a text was judged ({error}). Free some, or judge shorter texts.") from error
        finally:
            self._lock.release()

    def _verdict(self, one: _Asked, hit: bool, decision: Decision, threshold: float, times: Mapping[str, float]) -> Verdict:
        warnings = one.warnings
        if decision.mass < LOW_MASS:
            warnings += (f"The model gave its answers only {decision.mass:.0%} of the probability; is it a {self.profile.title}?",)
        timings = {"tokenize": one.tokenize, **times}
        kept = len(self._prefixes[one.role]) if hit else 0
        return Verdict(
            verdict="unsafe" if decision.unsafe else "safe", score=decision.score, raw_score=decision.raw_score,
            threshold=threshold, mass=decision.mass, role=one.role, categories=self._categories(decision),
            unexplored=decision.unexplored, raw=decision.raw,
            tokens={"prompt": len(one.ids), "prefix": kept, "decoded": decision.decoded}, passes=1 + decision.passes,
            windows=1, cache_hit=hit, timings={**timings, "total": sum(timings.values())}, model=self.identity, warnings=warnings,
        )

    def _categories(self, decision: Decision) -> tuple[Category, ...]:
        """Listed codes in the answer's order, then the others by probability."""
        known = {category.code: category for category in self.policy.categories}
        others = sorted(set(decision.probabilities) - set(decision.codes), key=lambda code: -decision.probabilities[code])
        return tuple(
            Category(code, known[code].slug, known[code].name, decision.probabilities[code], code in decision.codes)
            for code in [*decision.codes, *others]
        )


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def _policy(given: Policy | str | Path | Sequence[Any] | None, profile: Profile) -> Policy | None:
    if given is None or isinstance(given, Policy):
        return given
    if isinstance(given, (str, Path)):
        return Policy.load(given, profile=profile)
    return Policy.of(given, profile.code_prefix)


def _run(timeout: float | None, run: Run | None) -> Run:
    if run is not None and (timeout is not None or not isinstance(run, Run)):
        raise InputError("Give timeout in seconds, or run as a Run, not both.")
    return run or Run.within(timeout)
