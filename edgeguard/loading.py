"""From a model's name or path to a running backend: which artifact, which runtime, and whether it fits into memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edgeguard import __version__, machine, profiles, store
from edgeguard.architecture import Shape
from edgeguard.backends.base import PACKED, Backend
from edgeguard.calibration import UNCALIBRATED, Calibration, Whose
from edgeguard.errors import EdgeGuardError, InputError, ModelMemoryError, ModelMismatchError, RuntimeMissingError
from edgeguard.profiles import Profile
from edgeguard.store import Artifact, BareModel, FileRecord, Manifest, Model, PrefixCache, Tuned
from edgeguard.tokenizer import GgufTokenizer, JsonTokenizer, Tokenizer
from edgeguard.verdict import ModelIdentity
from edgeguard.weights import read_json

MAX_THREADS = 1024
MAPPED = 0.1
"""Bytes of memory for each byte of weights that are mapped as they are packed."""


@dataclass(frozen=True)
class Runtime:
    """A backend's name, the kind of model it reads, and the package it needs."""

    backend: str
    kind: str
    module: str
    package: str
    extra: str
    copies: float
    """Bytes of memory for each byte of weights on disk that cannot be dropped again: both runtimes map the file, whose pages
    can, and keep a packed copy."""
    keys_values: float
    """Bytes of memory for each byte of a full context's keys and values in float32."""

    @property
    def installed(self) -> bool:
        """The package is there."""
        return importlib.util.find_spec(self.module) is not None


# in the order in which `auto` tries them: the int8 guard graph is ahead of llama.cpp on CPUs (docs/how-it-works.md)
RUNTIMES = (
    Runtime("onnx", "onnx", "onnxruntime", "onnxruntime", "cpu", PACKED, 1.0),
    Runtime("llama", "gguf", "llama_cpp", "llama-cpp-python", "llama", 1.0, 0.5),
    Runtime("reference", "hf", "numpy", "numpy", "cpu", 2.0, 1.0),
)


@dataclass(frozen=True)
class Choice:
    """What will be loaded, and why."""

    runtime: Runtime
    model: Model
    reason: str
    threads: int | None = None
    """As measured on this machine; None leaves it to the backend."""
    prepacked: bool = False
    """Weights are mapped in the form in which the runtime multiplies them; also measured."""

    @property
    def backend(self) -> str:
        """Its name."""
        return self.runtime.backend


@dataclass(frozen=True)
class Parts:
    """What a guard is composed of."""

    backend: Backend
    tokenizer: Tokenizer
    profile: Profile
    identity: ModelIdentity
    calibration: Calibration = UNCALIBRATED


def choose(model: str | Path | None = None, backend: str = "auto", device: str = "auto") -> Choice:
    """The backend and the model's files; for `auto`, what `edgeguard tune` chose on this machine, if it still fits.

    Raises `RuntimeMissingError`, `ModelError`, or `InputError` for an unknown backend.
    """
    if backend != "auto":
        return _named(model, backend)
    return (tuned_choice(model) if device == "auto" else None) or default_choice(model)


def default_choice(model: str | Path | None = None) -> Choice:
    """As long as nothing was measured: the first of `RUNTIMES` that is installed and reads what the model has."""
    held = {each.kind for each in store.scan(store.locate(model))}
    fitting = [runtime for runtime in RUNTIMES if runtime.kind in held]
    for runtime in fitting:
        if runtime.installed:
            passed_over = [f"{other.package} is not installed" for other in fitting[: fitting.index(runtime)]]
            why = "; ".join([*passed_over, f"the model has {runtime.kind} weights and {runtime.package} is installed"])
            return Choice(runtime, store.resolve(model, (runtime.kind,)), why)
    raise RuntimeMissingError(fitting[0].package, fitting[0].extra)


def tuned_choice(model: str | Path | None) -> Choice | None:
    """What was measured to be the fastest here, or None: nothing was measured, or not with this machine and these runtimes."""
    tuned, _ = tuned_record(model)
    if tuned is None:
        return None
    setting = tuned.setting
    for runtime in RUNTIMES:
        for each in store.scan(store.locate(model)):
            fits = runtime.installed and (runtime.backend, runtime.kind) == (setting.backend, each.kind)
            if fits and store.digest(each, known=True) == setting.artifact:
                why = f"measured on this machine on {tuned.created[:10]}: {tuned.reason}"
                return Choice(runtime, each, why, setting.threads, setting.prepacked)
    return None


def tuned_record(model: str | Path | None) -> tuple[Tuned | None, str]:
    """What `edgeguard tune` stored for a model, or None and why there is none to follow."""
    path = store.tuned_path([store.digest(each, known=True) for each in store.scan(store.locate(model))])
    return store.read_tuned(path, machine_key() if path.is_file() else {})


def keep_tuned(model: str | Path | None, tuned: Tuned) -> None:
    """Store what was measured for a model; raises `StoreError`."""
    path = store.tuned_path([store.digest(each, known=True) for each in store.scan(store.locate(model))])
    store.write_tuned(path, machine_key(), tuned)


def machine_key() -> dict[str, str]:
    """All on which speed depends beside the model."""
    installed = (f"{runtime.name} {runtime.version}" for runtime in machine.runtimes() if runtime.version)
    return {"processor": cpu_key(), "threads": str(machine.default_threads()), "runtimes": ", ".join(installed), "edgeguard": __version__}


def cpu_key() -> str:
    """This machine's processor, as a part of keys."""
    cpu = machine.cpu()
    return " ".join([cpu.arch, cpu.vendor, cpu.model, *sorted(cpu.flags)])


def _named(model: str | Path | None, backend: str) -> Choice:
    for runtime in RUNTIMES:
        if runtime.backend == backend:
            if not runtime.installed:
                raise RuntimeMissingError(runtime.package, runtime.extra)
            return Choice(runtime, store.resolve(model, (runtime.kind,)), "asked for by name")
    if backend == "scripted":
        raise InputError("A scripted guard has no model to load: use Guard.scripted.")
    raise InputError(f"There is no backend {backend!r}; there are auto, {', '.join(r.backend for r in RUNTIMES)} and scripted.")


def load_parts(model: str | Path | None = None, *, backend: str | Backend = "auto", device: str = "auto",
               threads: int | None = None, profile: str | None = None, calibration: Whose = "user") -> Parts:
    """Load everything that a guard is made of; `Guard.load` tells the arguments and errors."""
    if calibration not in get_args(Whose):
        raise InputError(f"calibration is {repr(calibration)[:40]}; {', '.join(get_args(Whose))} are possible.")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS):
        raise InputError(f"threads is {repr(threads)[:40]}; a whole number from 1 to {MAX_THREADS} is needed.")
    if not isinstance(backend, str):
        return _given(model, backend, profile)
    return open_choice(choose(model, backend, device), device=device, threads=threads, profile=profile, calibration=calibration)


def open_choice(choice: Choice, *, device: str = "auto", threads: int | None = None, profile: str | None = None,
                calibration: Whose = "user") -> Parts:
    """Load what was chosen; raises what `Guard.load` does."""
    found = choice.model
    named = profile_of(found, profile)
    before = store.check_files(found)
    applied, _ = calibration_of(found, named, calibration)
    tokenizer = _tokenizer(found.tokenizer)
    _check_memory(choice)
    running = _OPEN[choice.backend](choice, device, threads or choice.threads, prefix_cache(found, named))
    try:
        store.check_unmoved(found, before)
        if tokenizer.vocab_size < (rows := int(running.info.head_ids[-1]) + 1):
            raise ModelMismatchError(f"The tokenizer of {found.name} has {tokenizer.vocab_size} ids, its model answers with {rows}.")
    except BaseException:
        running.shutdown()
        raise
    return Parts(running, tokenizer, named, _identity(found.name, _weights_hash(found), named, running), applied)


def _digest(model: Model, *, known: bool) -> str:
    """What tells a model from others; a GGUF whose hash cannot be remembered is hashed all the same if it may have a calibration."""
    found = store.digest(model, known=known)
    return store.sha256(model.weights) if not found and not known and model.kind == "gguf" and store.any_calibration() else found


def calibration_of(model: Model, profile: Profile, whose: Whose = "user", *, known: bool = False) -> tuple[Calibration, Whose]:
    """What is done to a model's scores, and whose calibration that is: the user's, else the artifact's, as far as `whose` allows.

    With `known`, no file of weights is read for it. Raises `StoreError` for a calibration of the user that cannot be read.
    """
    if whose == "user" and (own := store.read_calibration(_digest(model, known=known), profile.name)):
        return own, "user"
    if whose != "none" and isinstance(model, Artifact) and model.manifest.calibration:
        return model.manifest.calibration, "artifact"
    return UNCALIBRATED, "none"


def prefix_cache(model: Model, profile: Profile) -> PrefixCache | None:
    """The prefix states on disk that this model may restore; None for one that cannot be told from others."""
    known = store.digest(model)
    identity = {"model": known, "profile": profile.name, "processor": cpu_key()}
    return PrefixCache(store.cache_folder() / "prefixes", identity) if known else None


def packed_folder() -> Path:
    """Where weights lie as this machine's runtime multiplies them."""
    return store.cache_folder() / "prepacked"


def prepack(artifact: Artifact) -> None:
    """Write an ONNX artifact's weights once more, packed for this machine, unless that was done; as large as twice the weights.

    Raises `StoreError`, `InferenceError`, and what loading the artifact does.
    """
    from edgeguard.backends import onnx, onnx_session, prepacked

    if prepacked.find(artifact, packed_folder(), onnx_session.build()) is None:
        onnx.make_prepacked(artifact, packed_folder())


def _given(model: str | Path | None, backend: Backend, profile: str | None) -> Parts:
    """A backend object of the caller's, with the tokenizer and profile of a model, by default the built-in one."""
    found = store.resolve(model)
    named = profile_of(found, profile)
    return Parts(backend, _tokenizer(found.tokenizer), named, _identity(backend.info.name, "", named, backend))


def scripted_parts(answer: Callable[[str], str], model: str | Path | None = None, profile: str | None = None) -> Parts:
    """The parts of a guard without weights; `Guard.scripted` tells the arguments."""
    from edgeguard.answers import Answers
    from edgeguard.backends.scripted import ScriptedBackend

    found = store.resolve(model)
    named, tokenizer = profile_of(found, profile), _tokenizer(found.tokenizer)
    answers = Answers.build(named, [category.code for category in named.policy.categories], tokenizer)
    backend = ScriptedBackend.answering(answer, answers, tokenizer, context=named.context)
    return Parts(backend, tokenizer, named, _identity("scripted", "", named, backend))


def profile_of(model: Model, asked: str | None = None) -> Profile:
    """Which guard model it is, by its manifest or as asked; raises `ModelMismatchError` when that is not known or contradicts it."""
    recorded = model.manifest.profile if isinstance(model, Artifact) else None
    wanted = recorded if asked is None else asked
    if wanted is None:
        raise ModelMismatchError(
            f"{model.name} does not say which guard model it is. Name its profile: one of {', '.join(profiles.NAMES)}."
        )
    return profiles.asked_for(model.name, recorded, wanted)


def _tokenizer(path: Path) -> Tokenizer:
    if path.suffix != ".gguf":
        return JsonTokenizer.load(path)
    from edgeguard.gguf_check import check_gguf

    check_gguf(path)  # llama.cpp only says that it failed, or fails worse
    return GgufTokenizer.load(path)


def needed_memory(runtime: Runtime, model: Model, *, prepacked: bool = False) -> int:
    """Bytes that the model will take, weights (unless mapped as they are packed) and one full context: an estimate."""
    keys_values = model.manifest.shape.kv_bytes * min(model.manifest.shape.context, 8192) if isinstance(model, Artifact) else 0
    return int(model.size * (MAPPED if prepacked else runtime.copies) + keys_values * runtime.keys_values)


def _check_memory(choice: Choice) -> None:
    needed, free = needed_memory(choice.runtime, choice.model, prepacked=choice.prepacked), machine.available_memory()
    if needed <= free:
        return
    smaller = _smaller(choice.model, free)
    advice = f"Use {smaller}, which fits." if smaller else "Convert it to a smaller precision (int4, q4_k_m), or free memory."
    raise ModelMemoryError(
        f"{choice.model.name} needs about {_gib(needed)} of memory with the backend {choice.backend}; "
        f"{_gib(free)} are free. {advice}"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count < 1 << 44 else "more than 16,000 GiB"


def _smaller(model: Model, free: int) -> Path | None:
    """The largest artifact beside this one that fits and whose runtime is installed."""
    fitting = [
        (each.size, each.folder)
        for each in _beside(model)
        if any(runtime.kind == each.kind and runtime.installed and needed_memory(runtime, each) <= free for runtime in RUNTIMES)
    ]
    return max(fitting)[1] if fitting else None


def _beside(model: Model) -> Iterator[Artifact]:
    """Artifacts in the same folder; those that cannot be read are no help, and no reason to say something else."""
    with suppress(OSError):
        for folder in model.folder.resolve().parent.iterdir():
            with suppress(EdgeGuardError, OSError):
                yield Artifact.read(folder)


def _weights_hash(model: Model) -> str:
    """SHA-256 of the file that holds the weights, by the manifest or, of a bare GGUF, as remembered; else empty."""
    if not isinstance(model, Artifact):
        return store.digest(model, known=True)
    return max(model.manifest.files.values(), key=lambda record: record.size).sha256


def _identity(name: str, sha256: str, profile: Profile, backend: Backend) -> ModelIdentity:
    info = backend.info
    return ModelIdentity(name, profile.name, info.precision, sha256, info.name, info.runtime, info.device)


def _export(model: BareModel) -> Artifact:
    """An ordinary ONNX export as if it had a manifest: the whole vocabulary, no prefixes, nothing to be held against."""
    files = {path.name: FileRecord("", path.stat().st_size) for path in (model.weights, model.tokenizer)}
    shape = Shape.from_config(read_json(model.folder / "config.json"))
    return Artifact(model.folder, Manifest(model.name, "onnx", "", "exported", model.weights.name, files, shape))


def _onnx(choice: Choice, device: str, threads: int | None, cache: PrefixCache | None) -> Backend:
    from edgeguard.backends.onnx import OnnxBackend

    model = choice.model
    prepacked = packed_folder() if choice.prepacked and isinstance(model, Artifact) else None
    return OnnxBackend(model if isinstance(model, Artifact) else _export(model), device=device, threads=threads, cache=cache,
                       prepacked=prepacked, checked=isinstance(model, Artifact))


def _llama(choice: Choice, device: str, threads: int | None, cache: PrefixCache | None) -> Backend:
    from edgeguard.backends.llama import LlamaBackend

    return LlamaBackend(choice.model.weights, device=device, threads=threads, cache=cache)


def _reference(choice: Choice, device: str, threads: int | None, cache: PrefixCache | None) -> Backend:  # noqa: ARG001  the plain way
    from edgeguard.backends.reference import ReferenceBackend
    from edgeguard.errors import DeviceError
    from edgeguard.weights import SafetensorsWeights

    if device not in ("auto", "cpu"):
        raise DeviceError(f"The reference backend runs on the cpu only, not on {device!r}.")
    return ReferenceBackend(SafetensorsWeights(choice.model.folder))


_OPEN: dict[str, Callable[[Choice, str, int | None, PrefixCache | None], Backend]] = {
    "onnx": _onnx, "llama": _llama, "reference": _reference,
}  # fmt: skip
