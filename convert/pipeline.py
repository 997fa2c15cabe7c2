"""A whole conversion: source, one walk in full precision, artifact, gate, manifest, and only then the final name.

Killed at any moment it is taken up again by the next run (`convert.resume`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeguard import __version__
from edgeguard.architecture import Shape
from edgeguard.backends.base import FloatArray
from edgeguard.convert import gate, gate_pieces, notices, pieces, probe, resume, room
from edgeguard.convert.journal import Journal, remove_journals
from edgeguard.convert.memory import MemoryMeter
from edgeguard.convert.prefixes import Walked, save_prefix, walk
from edgeguard.convert.quantize import Importance, QuantisedTensor, int4_blocks, int8_rows
from edgeguard.convert.questions import Questions, questions_of
from edgeguard.convert.smooth import STRENGTH, STRENGTH_IN_4_BITS, SmoothedWeights, ranges
from edgeguard.convert.source import Source, open_source
from edgeguard.errors import ConversionError, EdgeGuardError, RuntimeMissingError, StoreError
from edgeguard.machine import default_threads
from edgeguard.profiles import Profile, asked_for
from edgeguard.store import Artifact, Kind, Manifest, PrefixRecord, home, records
from edgeguard.store.catalogue import NAME
from edgeguard.store.files import Progress, locked
from edgeguard.store.manifest import MANIFEST
from edgeguard.verdict import Role
from edgeguard.weights import EMBEDDING, HEAD, Weights, expected, read_json

PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"),
}
FLOATS = ("fp32", "fp16", "f32", "f16", "bf16")
"""Precisions that lose nothing by outliers, and are written as the source is."""
SHARED: dict[str, Callable[..., QuantisedTensor]] = {
    "int8": int8_rows, "q8_0": int8_rows, "int4": int4_blocks, "q4_0": int4_blocks,
}
"""Precisions that both formats hold with the same weights, and how their linear layers are quantised then."""
OUTER = (EMBEDDING, HEAD)
PROFILE = "llama-guard-2"
"""Of a source that does not say which guard model it is."""
RUNTIMES = {"onnx": ("onnxruntime", "cpu"), "gguf": ("llama_cpp", "llama")}


@dataclass(frozen=True)
class Plan:
    """What is to be made, checked as far as it can be without reading weights."""

    source: Source
    out: Path
    kind: Kind
    precision: str
    profile: Profile
    name: str
    exporter: str
    shared: bool
    threads: int | None

    @property
    def partial(self) -> Path:
        """Where it is built."""
        return _partial(self.out)

    @property
    def strength(self) -> float:
        """With which outliers are smoothed into weights that get few bits."""
        return STRENGTH_IN_4_BITS if SHARED.get(self.precision) is int4_blocks else STRENGTH


@dataclass(frozen=True, eq=False)
class Truth:
    """What the source says."""

    weights: Weights
    """Those to be written: the source's, for few bits with its outliers smoothed."""
    importance: Importance
    rows: tuple[int, ...]
    """Token ids that are compared, and kept in a guard graph's head."""
    walked: Walked
    probe: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Work:
    """A conversion under way."""

    plan: Plan
    questions: Questions
    progress: Progress
    identity: Mapping[str, Any]
    """What all bytes depend on."""
    journal: Journal
    meter: MemoryMeter

    def stage_done(self) -> None:
        """Keep the peaks of memory, should this run be killed."""
        self.journal.finish(resume.MEMORY, self.meter.look())


def convert(source: str | Path, out: str | Path, *, target: str, precision: str, profile: str | None = None,
            tokenizer: str | Path | None = None, name: str | None = None, exporter: str = "guard", shared: bool = False,
            force: bool = False, threads: int | None = None, progress: Progress | None = None,
            tell: Callable[[str], None] | None = None) -> Manifest:
    """Convert a Hugging Face folder, a hub id or a GGUF into the artifact folder `out`, and hold it against its source.

    `target` is `onnx` or `gguf`; `precision` one of `PRECISIONS[target]`; `profile` by default the one of an artifact, else
    `PROFILE`; `shared` quantises so that the ONNX and the GGUF artifact hold the same weights; `exporter` is `guard` or
    `optimum` (ONNX fp32 from a folder); `force` replaces an artifact; `threads` by default the machine's choice;
    `progress(stage, done, total)`; `tell` gets sentences for people, first of all what disk and memory the work needs. The folder
    is built as `out`.partial and renamed when the gate is passed; what a killed run has left there is taken up where source,
    settings and builder are the same.
    Raises `ConversionError` (also when the gate fails), `ModelError` (also when an artifact is of another profile), `StoreError`,
    `RuntimeMissingError`.
    """
    out = Path(out)
    told = progress or (lambda _stage, _done, _total: None)
    _check_choice(target, precision, exporter, shared)
    if out.name in ("", ".."):
        raise ConversionError("--out must be the path of a new folder; an empty one, '.' and '..' are none.")
    if name is not None and not NAME.fullmatch(name):
        raise ConversionError(f"{name[:80]!r} is not a name: letters, digits, '.', '_' and '-' make one, 128 at most.")
    with locked(_lock(out), timeout=0, what=str(out)), _files_told(out):
        _check_target(out, force)
        opened = open_source(source, None if tokenizer is None else Path(tokenizer), told,
                             partial(_check_download, out, target, precision, exporter))
        chosen = asked_for(opened.name, opened.profile, (opened.profile or PROFILE) if profile is None else profile)
        plan = Plan(opened, out, cast(Kind, target), precision, chosen,
                    name or _default_name(chosen, opened, precision), exporter, shared, threads)
        _check_source(plan)
        questions = questions_of(plan.source, plan.kind, plan.profile)
        _check_room(plan, questions, tell or (lambda _sentence: None))
        try:
            return _work(plan, questions, told)
        except ConversionError:
            with suppress(OSError):
                resume.clear(plan.partial, resume.STAGES)
            raise


@contextmanager
def _files_told(out: Path) -> Iterator[None]:
    """What the system refuses, as an error of ours."""
    try:
        yield
    except EdgeGuardError:
        raise
    except OSError as error:
        raise StoreError(f"{error.filename or _partial(out)} could not be read or written: {error.strerror or error}.") from error


def _default_name(profile: Profile, source: Source, precision: str) -> str:
    """From the source's, in the characters that a name may have."""
    name = notices.artifact_name(profile.name, source.name, precision)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:128]


def _check_choice(target: str, precision: str, exporter: str, shared: bool) -> None:
    if target not in PRECISIONS:
        raise ConversionError(f"There is no target {target!r}; there are {', '.join(PRECISIONS)}.")
    if precision not in PRECISIONS[target]:
        raise ConversionError(f"{target} has no precision {precision!r}; it has {', '.join(PRECISIONS[target])}.")
    if exporter not in ("guard", "optimum"):
        raise ConversionError(f"There is no exporter {exporter!r}; there are guard, optimum.")
    if exporter == "optimum" and (target, precision) != ("onnx", "fp32"):
        raise ConversionError("The exporter optimum makes ONNX fp32 only; use --to onnx --precision fp32.")
    if shared and precision not in SHARED:
        raise ConversionError(f"Only {', '.join(SHARED)} can be shared between ONNX and GGUF, not {precision}.")
    runtime, extra = RUNTIMES[target]
    if importlib.util.find_spec(runtime) is None:
        raise RuntimeMissingError(f"{runtime} (it runs the artifact for the comparison with its source)", extra)


def _check_target(out: Path, force: bool) -> None:
    if out.is_symlink():
        raise ConversionError(f"{out} is a link. Name the folder that is to be made.")
    for folder, file in ((_partial(out), resume.STAGES), (_replaced(out), MANIFEST)):
        if folder.is_symlink() or (folder.exists() and not (folder / file).is_file() and not _is_empty(folder)):
            raise ConversionError(f"{folder} is in the way, and was not left by a conversion. Move it away, or choose another --out.")
    if not out.exists():
        return
    if not force:
        raise ConversionError(f"{out} exists already. Choose another folder, or replace it with --force.")
    if not (out / MANIFEST).is_file():
        raise ConversionError(f"{out} is no artifact, so it is not replaced. Choose another folder.")


def _partial(out: Path) -> Path:
    """Where an artifact is built."""
    return out.with_name(f"{out.name}.partial")


def _replaced(out: Path) -> Path:
    """Where the artifact goes that it takes the place of."""
    return out.with_name(f"{out.name}.replaced.partial")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _check_source(plan: Plan) -> None:
    place, target = plan.source.path.resolve(), plan.out.resolve()
    if target == place or target in place.parents:
        raise ConversionError(f"{plan.out} holds the source itself. Choose another folder.")
    if plan.exporter == "optimum" and plan.source.kind != "folder":
        raise ConversionError("The exporter optimum reads Hugging Face folders only, no GGUF.")


def _lock(out: Path) -> Path:
    """One for each target, in a place that can be written whatever the target is."""
    mark = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:12]
    return home() / ".locks" / f"{out.name}.{mark}.lock"


def needs(plan: Plan, questions: Questions) -> room.Needs:
    """Disk and memory of the whole conversion."""
    return room.needs(plan.source.weights.shape, plan.kind, plan.precision, questions.contents, tokens=questions.tokens,
                      kinds=_gguf_kinds(plan), traced=plan.exporter == "optimum")


def _check_download(out: Path, kind: str, precision: str, exporter: str, folder: Path, coming: int) -> None:
    """Raises `ConversionError` when the disk would not hold the weights that are to be fetched and what is made of them."""
    shape, traced = Shape.from_config(read_json(folder / "config.json")), exporter == "optimum"
    room.check_download(room.artifact_bytes(shape, kind, precision, exported=traced) * (1 + traced), out, folder, coming)


def _check_room(plan: Plan, questions: Questions, tell: Callable[[str], None]) -> None:
    """Raises `ConversionError` when disk or memory would run out, else tells what is needed."""
    there = sum(path.stat().st_size for path in plan.partial.rglob("*") if path.is_file()) if plan.partial.is_dir() else 0
    tell(f"The conversion {room.check(needs(plan, questions), plan.out, there)}.")


def _work(plan: Plan, questions: Questions, progress: Progress) -> Manifest:
    """Take up the partial folder or begin it, fill it, and give it its name."""
    settings = {"kind": plan.kind, "precision": plan.precision, "profile": plan.profile.name, "name": plan.name,
                "exporter": plan.exporter, "shared": plan.shared, "strength": plan.strength, "tokenizer": questions.tokenizer}
    identity = resume.identity(plan.source.files, settings)
    journal = resume.take_up(plan.partial, identity)
    try:
        with MemoryMeter(journal.finished(resume.MEMORY)) as meter:
            manifest = _build(Work(plan, questions, progress, identity, journal, meter))
    finally:
        journal.close()
    _rename(plan)
    remove_journals(plan.out)
    return manifest


def _build(work: Work) -> Manifest:
    """Everything inside the partial folder."""
    plan, questions, folder = work.plan, work.questions, work.plan.partial
    source = plan.source
    hashes = resume.hashed(source.files, work.journal, work.progress)
    origin = {"kind": source.kind, "name": source.name,
              "sha256": hashes[source.path.name] if source.kind == "gguf" else resume.combined(hashes)}
    source.write_tokenizer(folder / "tokenizer.json")
    truth = _ask_source(work)
    work.stage_done()
    types = _WRITERS[plan.exporter if plan.kind == "onnx" else plan.kind](work, truth)
    work.stage_done()
    notices.write(plan.profile.name, source.folder, folder)
    guard = plan.kind == "onnx" and plan.exporter == "guard"
    kept = _save_prefixes(folder, truth) if guard else {}
    files = records(folder, work.progress)
    licence = notices.LICENCES.get(plan.profile.name)
    manifest = Manifest(
        name=plan.name, kind=plan.kind, profile=plan.profile.name, precision=plan.precision, weights=f"model.{plan.kind}",
        files=files, shape=source.weights.shape, head_ids=truth.rows if guard else (),
        prefixes=tuple(PrefixRecord(role, questions.prefixes[role], file, files[file].sha256) for role, file in kept.items()),
        source=origin, builder=__version__, types=types, probe=truth.probe, licence=licence.name if licence else "",
    )
    manifest = replace(manifest, gate=_gate(work, manifest, truth))
    manifest = replace(manifest, conversion={"memory": work.meter.look()})
    (folder / resume.WALK).unlink(missing_ok=True)
    manifest.write(folder)
    return manifest


def _ask_source(work: Work) -> Truth:
    """One walk through the source with all prompts."""
    questions, profile = work.questions, work.plan.profile
    observer = None if work.plan.precision in FLOATS else ranges
    walked = walk(work.plan.source.weights, questions.prefixes, [*questions.entries, *questions.bare], work.progress, observer=observer,
                  state=work.plan.partial / resume.WALK, identity=json.dumps(work.identity))
    count = len(questions.entries)
    logits = walked.logits[:count]
    rows = probe.head_rows(questions.needed, logits)
    probed = probe.probe(profile, questions.answers, rows, logits, walked.logits[count:])
    if observer is None:
        return Truth(work.plan.source.weights, lambda _name: None, rows, replace(walked, logits=logits), probed)
    smoothed = SmoothedWeights(work.plan.source.weights, walked.observed, work.plan.strength)
    prefixes = {role: (keys, smoothed.values(values)) for role, (keys, values) in walked.keys_values.items()}
    return Truth(smoothed, smoothed.importance, rows, replace(walked, logits=logits, keys_values=prefixes), probed)


def _save_prefixes(folder: Path, truth: Truth) -> dict[Role, str]:
    files: dict[Role, str] = {}
    for role, (keys, values) in truth.walked.keys_values.items():
        files[role] = f"prefix-{role}.npz"
        save_prefix(folder / files[role], keys, values)
    return files


def _write_onnx(work: Work, truth: Truth) -> dict[str, int]:
    from edgeguard.convert.guard_graph import Precision, build

    plan = work.plan
    return build(truth.weights, plan.partial, precision=cast(Precision, plan.precision), head_ids=truth.rows,
                 quantised=_shared(plan, truth) if plan.shared else None, importance=truth.importance, threads=plan.threads,
                 identity={**work.identity, "rows": truth.rows}, progress=work.progress)


def _write_optimum(work: Work, _truth: Truth) -> dict[str, int]:
    from edgeguard.convert.optimum_export import export

    return export(work.plan.source.path, work.plan.partial, work.progress)


def _write_gguf(work: Work, truth: Truth) -> dict[str, int]:
    from edgeguard.convert.gguf_file import write_gguf

    plan = work.plan
    return write_gguf(truth.weights, plan.partial / "tokenizer.json", plan.partial / "model.gguf", type=plan.precision,
                      name=plan.name, quantised=_shared(plan, truth) if plan.shared else None, kinds=_gguf_kinds(plan),
                      importance=truth.importance, threads=plan.threads, identity=work.identity, progress=work.progress)


_WRITERS: dict[str, Callable[[Work, Truth], dict[str, int]]] = {
    "guard": _write_onnx, "optimum": _write_optimum, "gguf": _write_gguf,
}


def _gguf_kinds(plan: Plan) -> dict[str, str]:
    """Types of the matrices whose weights are those of the ONNX artifact too."""
    return {name: "Q4_0" if plan.precision == "q4_0" and name not in OUTER else "Q8_0"
            for name, size in expected(plan.source.weights.shape).items() if plan.shared and len(size) == 2}


def _shared(plan: Plan, truth: Truth) -> Callable[[str], QuantisedTensor | None]:
    """Quantises each matrix in the one way that both formats can hold; the head has 8 bits always, the embedding in a GGUF too."""
    weights = truth.weights

    def quantised(name: str) -> QuantisedTensor | None:
        if name.endswith("norm.weight"):
            return None
        outer = name in OUTER
        stored = EMBEDDING if outer and weights.shape.tied else name
        quantise = partial(int8_rows if outer else SHARED[plan.precision], importance=truth.importance(stored))
        return pieces.quantised(weights, stored, quantise, plan.threads or default_threads(), name)

    return quantised


def _gate(work: Work, manifest: Manifest, truth: Truth) -> dict[str, Any]:
    """The comparison's numbers; raises `ConversionError` when they are not good enough."""
    plan, questions = work.plan, work.questions
    found = _answers(work, Artifact(plan.partial, manifest), truth.rows)
    wanted: FloatArray = truth.walked.logits[:, list(truth.rows)]
    safe, unsafe = (np.searchsorted(truth.rows, [ids[0] for ids in forms]).tolist()
                    for forms in (questions.answers.safe, questions.answers.unsafe))
    numbers = gate.measure(wanted, found, safe, unsafe, plan.precision)
    gate.judge(numbers, plan.precision)
    return numbers


def _answers(work: Work, artifact: Artifact, rows: Sequence[int]) -> FloatArray:
    """The artifact's to the questions."""
    plan, questions, large = work.plan, work.questions, artifact.size > room.PREPACKED
    if large and plan.kind == "onnx" and plan.exporter == "guard":
        return gate_pieces.answers_of(artifact, questions.entries, rows, plan.threads, work.progress)
    backend = gate.runtime_of(artifact, plan.threads, questions.longest, copies=not large)
    try:
        return gate.answers_of(backend, questions.prefixes, questions.entries, rows, work.progress)
    finally:
        backend.shutdown()


def _rename(plan: Plan) -> None:
    """Give the finished folder its name; what it replaces goes last."""
    old = _replaced(plan.out)
    resume.clear(old, MANIFEST)
    if plan.out.exists():
        plan.out.rename(old)
    plan.partial.rename(plan.out)
    with suppress(OSError):  # the new one is there; the next conversion clears it
        resume.clear(old, MANIFEST)
