"""What one verdict costs: edgeguard's backends and llama-cpp-python as people call it, on the same messages in one run.

Machines are noisy, so contenders take turns within the run and a time means something only beside the others' of that run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from edgeguard import machine, profiles, store
from edgeguard.bench import texts
from edgeguard.bench.metrics import quartiles, ratio
from edgeguard.conversation import Conversation
from edgeguard.errors import EdgeGuardError, InferenceError, ModelFileError, ModelMismatchError, RuntimeMissingError
from edgeguard.prompt import render

if TYPE_CHECKING:
    from edgeguard.guard import Guard

PEER = "llama-cpp-python"
PACK = 16
PEER_CONTEXT = 8192  # what a guard model's caller sets; Llama's own default of 512 would refuse longer messages
PEER_ANSWER = 16  # tokens


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    model: str | None = None
    """Name or path, of something that has a GGUF and an ONNX artifact; None for the built-in model."""
    profile: str | None = None
    """For model files that do not say it."""
    device: str = "auto"
    threads: int = field(default_factory=machine.default_threads)


@dataclass(frozen=True)
class Answer:
    """What came back for one message."""

    raw: str
    """`safe` or `unsafe\\nS1,S10`."""
    tokens: int
    """Of the whole prompt, kept ones included."""


class Engine(Protocol):
    """A loaded model that is timed from outside."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was granted: runtime, device, precision, threads, context; which file, by its SHA-256."""
        ...

    def answers(self, messages: Sequence[str]) -> list[Answer]:
        """Judge user messages, in one pass where it can."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class EdgeguardEngine:
    """A guard on one of edgeguard's backends."""

    def __init__(self, backend: str, setting: Setting) -> None:
        from edgeguard.guard import Guard

        self._guard: Guard = Guard.load(
            setting.model, backend=backend, device=setting.device, threads=setting.threads, profile=setting.profile)

    @property
    def facts(self) -> Mapping[str, Any]:
        """As the guard says."""
        info, identity = self._guard.backend_info, self._guard.identity
        return {
            "runtime": info.runtime, "device": info.device, "precision": info.precision, "threads": info.threads,
            "context": info.context, "model": identity.name, "profile": identity.profile, "sha256": identity.sha256,
        }

    def answers(self, messages: Sequence[str]) -> list[Answer]:
        """One message as a call of `check`, several as one pass of `check_many`."""
        one, *more = messages
        verdicts = self._guard.check_many(messages, batch=len(messages)) if more else [self._guard.check(one)]
        return [Answer(verdict.raw, verdict.tokens["prompt"]) for verdict in verdicts]

    def close(self) -> None:
        """Free the model."""
        self._guard.close()


class PeerEngine:
    """llama-cpp-python as its documentation has it: `Llama(...).create_completion`, greedy, the text read afterwards."""

    def __init__(self, setting: Setting) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise RuntimeMissingError(PEER, "llama") from error
        self._model = store.resolve(setting.model, ("gguf",))
        recorded = self._model.manifest.profile if isinstance(self._model, store.Artifact) else None
        if (name := setting.profile or recorded) is None:
            raise ModelMismatchError(f"{self._model.name} does not say which guard model it is; give --profile.")
        self._profile = profiles.get(name)
        gpu = setting.device != "cpu" and llama_cpp.llama_supports_gpu_offload()
        context = min(PEER_CONTEXT, self._profile.context)
        self._granted = {
            "runtime": f"{PEER} {llama_cpp.__version__}", "device": "gpu" if gpu else "cpu", "threads": setting.threads,
            "context": context, "model": self._model.name, "profile": self._profile.name,
        }
        try:
            self._llama: Any = llama_cpp.Llama(
                str(self._model.weights), n_ctx=context, n_threads=setting.threads, n_threads_batch=setting.threads,
                n_gpu_layers=-1 if gpu else 0, verbose=False,
            )
        except ValueError as error:
            raise ModelFileError(f"{PEER} cannot load {self._model.weights}: {error}") from error

    @property
    def facts(self) -> Mapping[str, Any]:
        """As they were asked for: the library does not say what it granted. The file is hashed here, not while it loads."""
        precision = self._model.manifest.precision if isinstance(self._model, store.Artifact) else ""
        return {**self._granted, "precision": precision, "sha256": store.sha256(self._model.weights)}

    def answers(self, messages: Sequence[str]) -> list[Answer]:
        """One completion for each."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: str) -> Answer:
        prompt = render(self._profile, Conversation.of(message)).text
        for token in self._profile.begin:  # the library adds its own
            prompt = prompt.removeprefix(token)
        made = self._llama.create_completion(prompt + self._profile.lead_in, max_tokens=PEER_ANSWER, temperature=0.0)
        raw = made["choices"][0]["text"].strip()
        if raw.split("\n")[0] not in ("safe", "unsafe"):
            raise InferenceError(f"{PEER} gave no verdict; is this a {self._profile.title}?")
        return Answer(raw, made["usage"]["prompt_tokens"])

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


Engines = Mapping[str, Callable[[Setting], Engine]]
ENGINES: Engines = {PEER: PeerEngine, "llama": partial(EdgeguardEngine, "llama"), "onnx": partial(EdgeguardEngine, "onnx")}


@dataclass(frozen=True)
class Contender:
    """One row of the result: an engine, and how many messages it gets at once at most."""

    name: str
    engine: str
    pack: int = 1


CONTENDERS = (
    Contender(PEER, PEER),
    Contender("edgeguard llama", "llama"),
    Contender("edgeguard onnx", "onnx"),
    Contender("edgeguard onnx, packed", "onnx", PACK),
)


def cold_start(engine: str, setting: Setting, message: str) -> dict[str, Any]:
    """Load and first verdict in this process, which must be a fresh one: seconds, milliseconds, bytes; or `error`."""
    try:
        began = time.perf_counter()
        loaded = ENGINES[engine](setting)
        ready = time.perf_counter()
        loaded.answers([message])
        first = time.perf_counter() - ready
    except Exception as error:  # as text: not every error survives the way between processes
        return {"error": _reason(error)}
    memory = psutil.Process().memory_info()
    # what is mapped from files can be dropped by the system, the rest cannot; only Linux tells them apart
    anonymous = memory.rss - memory.shared if hasattr(memory, "shared") else None
    return {"load_s": ready - began, "first_ms": first * 1000, "resident": memory.rss, "anonymous": anonymous}


def in_child(engine: str, setting: Setting, message: str) -> dict[str, Any]:
    """`cold_start` in a process of its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(cold_start, engine, setting, message).result()
    except BrokenProcessPool:
        return {"error": "The process died while it loaded the model; was there enough memory?"}


class Course:
    """One run: every contender over the same blocks of messages, in turn; the order moves on by one each round."""

    def __init__(self, setting: Setting, engines: Engines = ENGINES, cold: Callable[..., dict[str, Any]] = in_child) -> None:
        self.setting, self._engines, self._cold = setting, engines, cold
        self._loaded: dict[str, Engine] = {}
        self.failed: dict[str, str] = {}
        """Engines that could not be measured, and why."""
        self.starts: dict[str, list[dict[str, Any]]] = {}
        self.times: dict[tuple[str, str], list[float]] = {}
        """Milliseconds a message, by contender and kind; of a pack, its time divided by its messages."""
        self.answers: dict[tuple[str, str], list[Answer]] = {}

    def run(self, count: int, rounds: int, seed: int = 0, done: Callable[[float], object] = lambda _: None) -> dict[str, Any]:
        """`rounds` times `count` messages of each kind, none of them twice; `done` is called with each finished share of 1."""
        kinds = list(texts.KINDS)
        # one more to start with, and one for each cold start
        made = {kind: texts.messages(kind, count * rounds + 1 + rounds, seed) for kind in kinds}
        step = 1 / (rounds * (len(self._engines) + len(kinds) * len(CONTENDERS)))
        for turn in range(rounds):
            for engine in self._engines:
                self._start_cold(engine, made["harmless"][count * rounds + 1 + turn])
                done(step)
        try:
            for engine in self._engines:
                self._attempt(engine, partial(self._load, engine, [made[kind][count * rounds] for kind in kinds]))
            for turn in range(rounds):
                for kind in kinds:
                    block = made[kind][count * turn: count * (turn + 1)]
                    first = turn % len(CONTENDERS)
                    for contender in (*CONTENDERS[first:], *CONTENDERS[:first]):
                        self._attempt(contender.engine, partial(self._time, contender, kind, block))
                        done(step)
            return {"rows": [self._row(contender, kinds) for contender in CONTENDERS]}
        finally:
            for loaded in self._loaded.values():
                loaded.close()

    def _attempt(self, engine: str, task: Callable[[], None]) -> None:
        if engine not in self.failed:
            try:
                task()
            except Exception as error:  # a native runtime can fail in ways of its own; the others are still measured
                self.failed[engine] = _reason(error)

    def _start_cold(self, engine: str, message: str) -> None:
        if engine not in self.failed:
            measured = self._cold(engine, self.setting, message)
            if "error" in measured:
                self.failed[engine] = measured["error"]
            else:
                self.starts.setdefault(engine, []).append(measured)

    def _load(self, engine: str, warm: list[str]) -> None:
        """Load for the steady stream, and judge what is not timed: every path once."""
        self._loaded[engine] = self._engines[engine](self.setting)
        for pack in (*packs(warm, 1), warm):
            self._loaded[engine].answers(pack)

    def _time(self, contender: Contender, kind: str, block: list[str]) -> None:
        engine = self._loaded[contender.engine]
        times = self.times.setdefault((contender.name, kind), [])
        answers = self.answers.setdefault((contender.name, kind), [])
        for pack in packs(block, contender.pack):
            began = time.perf_counter()
            answered = engine.answers(pack)
            times.append((time.perf_counter() - began) * 1000 / len(pack))
            answers += answered

    def _row(self, contender: Contender, kinds: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"name": contender.name, "pack_limit": contender.pack}
        if contender.engine in self.failed:
            return {**row, "measured": False, "reason": self.failed[contender.engine]}
        starts = self.starts[contender.engine]
        cold = {key: _middle([start[key] for start in starts]) for key in starts[0]}
        return {
            **row, "measured": True, **self._loaded[contender.engine].facts, "cold": cold,
            "kinds": {kind: self._stream(contender, kind) for kind in kinds},
        }

    def _stream(self, contender: Contender, kind: str) -> dict[str, Any]:
        """The steady stream of one kind of message, beside llama-cpp-python's of the same run."""
        times, answers = self.times[contender.name, kind], self.answers[contender.name, kind]
        low, middle, high = quartiles(times)
        unsafe = [answer.raw.startswith("unsafe") for answer in answers]
        alone, peer = contender.pack == 1, PEER not in self.failed
        alike = zip(answers, self.answers[PEER, kind], strict=True) if peer else ()
        return {
            "messages": len(answers), "samples": len(times), "pack": len(answers) / len(times),
            "ms": middle, "ms_q1": low, "ms_q3": high,
            "times_faster": ratio(quartiles(self.times[PEER, kind])[1], middle) if peer else None,
            "judged_unsafe": sum(unsafe),
            # a pack holds both, so its time says nothing of one
            "ms_judged_unsafe": _middle([ms for ms, found in zip(times, unsafe, strict=True) if found]) if alone else None,
            "same_answer": sum(one.raw == other.raw for one, other in alike) if peer else None,
            "prompt_tokens": _middle([answer.tokens for answer in answers]),
        }


def packs(block: list[str], most: int) -> list[list[str]]:
    """The block in as few packs of at most `most` as it takes, their sizes as even as can be."""
    number = -(-len(block) // most)
    return [block[len(block) * at // number: len(block) * (at + 1) // number] for at in range(number)]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, EdgeGuardError) else f"unexpected {type(error).__name__}: {error}"


def _middle(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return quartiles(given)[1] if given else None
