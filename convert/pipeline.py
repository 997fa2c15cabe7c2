"""A whole conversion: source, one walk in full precision, artifact, gate, manifest, and only then the final name."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeguard import __version__
from edgeguard.answers import Answers
from edgeguard.backends.base import Backend, FloatArray
from edgeguard.convert import gate, gate_texts, notices, probe, room
from edgeguard.convert.prefixes import Entry, Walked, entry_of, save_prefix, walk
from edgeguard.convert.quantize import QuantisedTensor, int4_blocks, int8_rows
from edgeguard.convert.source import Source, check_vocabulary, open_source
from edgeguard.errors import ConversionError, EdgeGuardError, RuntimeMissingError, StoreError
from edgeguard.prefix import role_prefixes
from edgeguard.profiles import Profile
from edgeguard.profiles import get as get_profile
from edgeguard.store import Artifact, Kind, Manifest, PrefixRecord, home, records
from edgeguard.store.catalogue import NAME
from edgeguard.store.files import Progress, locked
from edgeguard.store.manifest import MANIFEST
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.verdict import Role
from edgeguard.weights import Weights

PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"),
}
SHARED: dict[str, Callable[[str, FloatArray], QuantisedTensor]] = {
    "int8": int8_rows, "q8_0": int8_rows, "int4": int4_blocks, "q4_0": int4_blocks,
}
"""Precisions that both formats hold with the same weights, and how their linear layers are quantised then."""
FLOATS = {"F16": "f16", "BF16": "bf16"}
RUNTIMES = {"onnx": ("onnxruntime", "cpu"), "gguf": ("llama_cpp", "llama")}
BARE = 4  # prompts that are also tried without BOS


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
        return self.out.with_name(f"{self.out.name}.partial")


@dataclass(frozen=True, eq=False)
class Truth:
    """What the source says, and what it was asked."""

    answers: Answers
    prefixes: Mapping[Role, tuple[int, ...]]
    entries: Sequence[Entry]
    rows: tuple[int, ...]
    """Token ids that are compared, and kept in a guard graph's head."""
    walked: Walked
    probe: Mapping[str, Any]


def convert(source: str | Path, out: str | Path, *, target: str, precision: str, profile: str = "llama-guard-2",
            tokenizer: str | Path | None = None, name: str | None = None, exporter: str = "guard", shared: bool = False,
            force: bool = False, threads: int | None = None, progress: Progress | None = None) -> Manifest:
    """Convert a Hugging Face folder, a hub id or a GGUF into the artifact folder `out`, and hold it against its source.

    `target` is `onnx` or `gguf`; `precision` one of `PRECISIONS[target]`; `shared` quantises so that the ONNX and the GGUF
    artifact hold the same weights; `exporter` is `guard` or `optimum` (ONNX fp32 from a folder); `force` replaces an
    artifact; `threads` are the runtime's, by default the machine's choice; `progress(stage, done, total)`.
    The folder is built as `out`.partial and renamed when the gate is passed.
    Raises `ConversionError` (also when the gate fails), `ModelError`, `StoreError`, `RuntimeMissingError`.
    """
    out = Path(out)
    told = progress or (lambda _stage, _done, _total: None)
    _check_choice(target, precision, exporter, shared)
    if out.name in ("", ".."):
        raise ConversionError("--out must be the path of a new folder; an empty one, '.' and '..' are none.")
    if name is not None and not NAME.fullmatch(name):
        raise ConversionError(f"{name[:80]!r} is not a name: letters, digits, '.', '_' and '-' make one, 128 at most.")
    with locked(_lock(out), timeout=0, what=str(out)):
        _check_target(out, force)
        opened = open_source(source, None if tokenizer is None else Path(tokenizer), told)
        chosen = get_profile(profile)
        plan = Plan(opened, out, cast(Kind, target), precision, chosen,
                    name or _default_name(chosen, opened, precision), exporter, shared, threads)
        _check_source(plan)
        room.check(opened.weights.shape, plan.kind, precision, out, traced=exporter == "optimum")
        try:
            manifest = _build(plan, told)
            _rename(plan)
        except ConversionError:
            shutil.rmtree(plan.partial, ignore_errors=True)
            raise
        except EdgeGuardError:
            raise
        except OSError as error:
            raise StoreError(f"{plan.partial} could not be written: {error.strerror or error}.") from error
    return manifest


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
    if not out.exists():
        return
    if not force:
        raise ConversionError(f"{out} exists already. Choose another folder, or replace it with --force.")
    if not (out / MANIFEST).is_file():
        raise ConversionError(f"{out} is no artifact, so it is not replaced. Choose another folder.")


def _check_source(plan: Plan) -> None:
    place, target = plan.source.path.resolve(), plan.out.resolve()
    if target == place or target in place.parents:
        raise ConversionError(f"{plan.out} holds the source itself. Choose another folder.")
    if plan.exporter == "optimum" and plan.source.kind != "folder":
        raise ConversionError("The exporter optimum reads Hugging Face folders only, no GGUF.")


def _lock(out: Path) -> Path:
    """One for each target, in a place that can be written whatever the target is."""
    mark = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return home() / ".locks" / f"{out.name}.{mark}.lock"


def _build(plan: Plan, progress: Progress) -> Manifest:
    """Everything inside the partial folder."""
    shutil.rmtree(plan.partial, ignore_errors=True)
    plan.partial.mkdir(parents=True)
    source, shape = plan.source, plan.source.weights.shape
    origin = {"kind": source.kind, "name": source.name, "sha256": source.sha256(progress)}
    source.write_tokenizer(plan.partial / "tokenizer.json")
    truth = _ask_source(plan, progress)
    types = _WRITERS[plan.exporter if plan.kind == "onnx" else plan.kind](plan, truth, progress)
    notices.write(plan.profile.name, source.folder, plan.partial)
    guard = plan.kind == "onnx" and plan.exporter == "guard"
    kept = _save_prefixes(plan.partial, truth) if guard else {}
    files = records(plan.partial, progress)
    licence = notices.LICENCES.get(plan.profile.name)
    manifest = Manifest(
        name=plan.name, kind=plan.kind, profile=plan.profile.name, precision=plan.precision, weights=f"model.{plan.kind}",
        files=files, shape=shape, head_ids=truth.rows if guard else (),
        prefixes=tuple(PrefixRecord(role, truth.prefixes[role], file, files[file].sha256) for role, file in kept.items()),
        source=origin, builder=__version__, types=types, probe=truth.probe, licence=licence.name if licence else "",
    )
    manifest = replace(manifest, gate=_gate(plan, manifest, truth, progress))
    manifest.write(plan.partial)
    return manifest


def _ask_source(plan: Plan, progress: Progress) -> Truth:
    """Tokenizer, answers and prompts, and one walk through the source with all of them."""
    profile, weights = plan.profile, plan.source.weights
    tokenizer = JsonTokenizer.load(plan.partial / "tokenizer.json")
    check_vocabulary(weights, tokenizer.vocab_size)
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
    prefixes = role_prefixes(profile, tokenizer)
    entries = [entry_of(one, profile, tokenizer, answers, prefixes) for one in gate_texts.conversations()]
    begin = len(profile.begin)
    whole = [Entry(None, (*prefixes.get(entry.prefix, ()), *entry.ids)) if entry.prefix else entry for entry in entries[:BARE]]
    bare = [Entry(None, entry.ids[begin:]) for entry in whole] if begin else []
    walked = walk(weights, prefixes, [*entries, *bare], progress)
    logits = walked.logits[: len(entries)]
    rows = probe.head_rows(probe.needed_rows(profile, tokenizer, answers), logits)
    return Truth(answers, prefixes, entries, rows, replace(walked, logits=logits),
                 probe.probe(profile, answers, rows, logits, walked.logits[len(entries) :]))


def _save_prefixes(folder: Path, truth: Truth) -> dict[Role, str]:
    files: dict[Role, str] = {}
    for role, (keys, values) in truth.walked.keys_values.items():
        files[role] = f"prefix-{role}.npz"
        save_prefix(folder / files[role], keys, values)
    return files


def _write_onnx(plan: Plan, truth: Truth, progress: Progress) -> dict[str, int]:
    from edgeguard.convert.guard_graph import Precision, build

    return build(plan.source.weights, plan.partial, precision=cast(Precision, plan.precision), head_ids=truth.rows,
                 quantised=_shared(plan) if plan.shared else None, progress=progress)


def _write_optimum(plan: Plan, _truth: Truth, progress: Progress) -> dict[str, int]:
    from edgeguard.convert.optimum_export import export

    return export(plan.source.path, plan.partial, progress)


def _write_gguf(plan: Plan, _truth: Truth, progress: Progress) -> dict[str, int]:
    """Straight from the source; by llama.cpp's own quantiser for what only it can write, from a file in the source's type."""
    from edgeguard.convert.gguf_file import FloatType, write_gguf

    out, stored = plan.partial / "model.gguf", plan.source.weights.raw("model.embed_tokens.weight")[1]
    straight = plan.shared or plan.precision in ("f32", "f16", "bf16")
    kind = plan.precision if plan.precision in ("f32", "f16", "bf16") else FLOATS.get(stored, "f32")
    written = out if straight else plan.partial / "float.gguf"
    types = write_gguf(plan.source.weights, plan.partial / "tokenizer.json", written, type=cast(FloatType, kind), name=plan.name,
                       quantised=_shared(plan) if plan.shared else None,
                       progress=lambda done, total, _name: progress("gguf", done, total))
    if not straight:
        from edgeguard.convert.gguf_quantize import quantise_gguf

        types = quantise_gguf(written, out, plan.precision, threads=plan.threads)
        written.unlink()
    return types


_WRITERS: dict[str, Callable[[Plan, Truth, Progress], dict[str, int]]] = {
    "guard": _write_onnx, "optimum": _write_optimum, "gguf": _write_gguf,
}


def _shared(plan: Plan) -> Callable[[str], QuantisedTensor | None]:
    """Quantises each matrix in the one way that both formats can hold; embeddings and head have 8 bits always."""
    weights: Weights = plan.source.weights

    def quantised(name: str) -> QuantisedTensor | None:
        if name.endswith("norm.weight"):
            return None
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        stored = "model.embed_tokens.weight" if outer and weights.shape.tied else name
        return (int8_rows if outer else SHARED[plan.precision])(name, weights.tensor(stored))

    return quantised


def _gate(plan: Plan, manifest: Manifest, truth: Truth, progress: Progress) -> dict[str, Any]:
    """The comparison's numbers; raises `ConversionError` when they are not good enough."""
    backend = _backend(Artifact(plan.partial, manifest), plan.threads)
    try:
        found = gate.answers_of(backend, truth.prefixes, truth.entries, truth.rows, progress)
    finally:
        backend.shutdown()
    wanted: FloatArray = truth.walked.logits[:, list(truth.rows)]
    safe, unsafe = (np.searchsorted(truth.rows, [ids[0] for ids in forms]).tolist()
                    for forms in (truth.answers.safe, truth.answers.unsafe))
    numbers = gate.measure(wanted, found, safe, unsafe, plan.precision)
    gate.judge(numbers, plan.precision)
    return numbers


def _backend(artifact: Artifact, threads: int | None) -> Backend:
    if artifact.kind == "onnx":
        from edgeguard.backends.onnx import OnnxBackend

        return OnnxBackend(artifact, device="cpu", threads=threads)
    from edgeguard.backends.llama import LlamaBackend

    return LlamaBackend(artifact.weights, device="cpu", threads=threads)


def _rename(plan: Plan) -> None:
    """Give the finished folder its name; what it replaces goes last."""
    old = plan.out.with_name(f"{plan.out.name}.replaced.partial")
    shutil.rmtree(old, ignore_errors=True)
    if plan.out.exists():
        plan.out.rename(old)
    plan.partial.rename(plan.out)
    shutil.rmtree(old, ignore_errors=True)
