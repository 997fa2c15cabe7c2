"""Artifacts and checkpoints of random weights, made directly, for measuring speed at a model's true size without the model.

All of them hold the very same weights (see `synthetic`), so one seed's artifacts can be compared with each other. Prefixes of the
ONNX artifacts are evaluated by the artifacts themselves: conversion's walk in full precision takes minutes at 8B, and what
is measured is the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from edgeguard import __version__, profiles
from edgeguard.answers import Answers
from edgeguard.architecture import Shape
from edgeguard.bench import blocks, checkpoint
from edgeguard.bench.llama3 import write_tokenizer
from edgeguard.bench.synthetic import LLAMA_GUARD_2, RandomWeights, Script
from edgeguard.convert import gate_pieces, probe, room
from edgeguard.convert.gguf_mix import tensor_types
from edgeguard.convert.prefixes import save_prefix
from edgeguard.convert.quantize import QuantisedTensor
from edgeguard.convert.source import check_vocabulary
from edgeguard.errors import EdgeGuardError, InputError, StoreError
from edgeguard.prefix import role_prefixes
from edgeguard.profiles import Profile
from edgeguard.store import Artifact, Kind, Manifest, PrefixRecord, records
from edgeguard.store.files import Progress, record
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.weights import EMBEDDING, HEAD, Rows, read_json

CHECKPOINT = "checkpoint"
WHATS = ("gguf-q4_k_m", "gguf-q4_0", "gguf-q8_0", "onnx-int8", "onnx-int4", CHECKPOINT)
SHAPES = {"llama-guard-2": LLAMA_GUARD_2}
PROFILE = "llama-guard-2"


class Made(NamedTuple):
    """A finished folder."""

    folder: Path
    manifest: Manifest | None
    """None for a checkpoint."""


@dataclass(frozen=True)
class Plan:
    """What is to be made."""

    what: str
    out: Path
    shape: Shape
    named: str
    """What the shape is called."""
    seed: int
    profile: Profile
    tokenizer: JsonTokenizer
    folder: Path
    """Where it is built."""

    @property
    def weights(self) -> RandomWeights:
        """The same ones whatever is made of them."""
        return RandomWeights(self.shape, self.seed, Script.ask(self.profile, self.tokenizer))


def shape_of(given: str) -> tuple[str, Shape]:
    """A name of `SHAPES`, or the path of a config.json or its folder: what to call it, and the shape; raises `EdgeGuardError`."""
    if given in SHAPES:
        return given, SHAPES[given]
    path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise InputError(f"There is no shape {given!r}: give {', '.join(SHAPES)}, or the path of a config.json.")
    return path.resolve().parent.name, Shape.from_config(read_json(path))


def synthesize(what: str, out: Path, *, shape: str = "llama-guard-2", seed: int = 0, tell: Callable[[str], None] = lambda _: None,
               progress: Progress | None = None) -> Made:
    """Make the folder `out` with random weights: an artifact that a guard loads, or a checkpoint that can be converted.

    `what` is one of `WHATS`, `shape` as in `shape_of`. `tell` gets one sentence with the room needed, `progress(stage, done, total)`.
    Built as `out`.partial and renamed. Raises `InputError` for a wrong choice, `ConversionError` for lack of room, `StoreError`,
    `RuntimeMissingError`.
    """
    out, told = Path(out), progress or (lambda _stage, _done, _total: None)
    if what not in WHATS:
        raise InputError(f"There is no {what!r} to make; there are {', '.join(WHATS)}.")
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder.")
    named, sizes = shape_of(shape)
    if what.startswith("gguf-") and (odd := set(tensor_types(sizes, what[5:]).values()) - {*blocks.GGUF, "F32"}):
        raise InputError(f"A shape of {sizes.hidden} x {sizes.ffn} makes {', '.join(sorted(odd))} of {what[5:]}; use multiples of 256.")
    tell(f"This {room.check(_needs(what, sizes), out)}.")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tokenizer(partial / "tokenizer.json")
        tokenizer = JsonTokenizer.load(partial / "tokenizer.json")
        plan = Plan(what, out, sizes, named, seed, profiles.get(PROFILE), tokenizer, partial)
        check_vocabulary(plan.weights, tokenizer.vocab_size)
        manifest = _make(plan, told)
        partial.rename(out)
    except EdgeGuardError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StoreError(f"{partial} could not be written: {error.strerror or error}.") from error
    return Made(out, manifest)


def _needs(what: str, shape: Shape) -> room.Needs:
    """Room for what is made. Of a GGUF or a checkpoint only pieces are in memory; a graph is loaded once, for its prefixes."""
    kind, _, precision = what.partition("-")
    size = 2 * shape.parameters + room.Contents().tokenizer if what == CHECKPOINT else room.artifact_bytes(shape, kind, precision)
    return room.Needs(size, size, room.BASE + (size * 6 // 5 if kind == "onnx" else 0))


def _make(plan: Plan, progress: Progress) -> Manifest | None:
    """Everything inside the partial folder."""
    kind, _, precision = plan.what.partition("-")
    if plan.what == CHECKPOINT:
        checkpoint.write(plan.weights, plan.folder, progress)
        return None
    rows = _rows(plan) if kind == "onnx" else ()
    types = _onnx(plan, precision, rows, progress) if kind == "onnx" else _gguf(plan, precision, progress)
    manifest = Manifest(
        name=f"random-{plan.named}-{precision}", kind=cast(Kind, kind), profile=plan.profile.name, precision=precision,
        weights=f"model.{kind}", files=records(plan.folder, progress), shape=plan.shape, head_ids=rows, builder=__version__, types=types,
        source={"kind": "random", "name": f"random weights of the shape {plan.named}; their verdicts mean nothing", "seed": plan.seed},
        probe={"random": True},
    )
    if kind == "onnx":
        manifest = _with_prefixes(plan, manifest, progress)
    manifest.write(plan.folder)
    return manifest


def _gguf(plan: Plan, precision: str, progress: Progress) -> dict[str, int]:
    from edgeguard.convert.gguf_file import write_gguf

    weights = plan.weights

    def made(name: str, kind: str, index: Rows) -> NDArray[np.uint8]:
        return blocks.GGUF[kind](weights.values(name, index), weights.scale(name))

    return write_gguf(weights, plan.folder / "tokenizer.json", plan.folder / "model.gguf", type=precision, blocks=made,
                      name=f"random-{plan.named}", progress=progress)


def _onnx(plan: Plan, precision: str, rows: tuple[int, ...], progress: Progress) -> dict[str, int]:
    from edgeguard.convert.guard_graph import Precision, build

    weights = plan.weights

    def quantised(name: str) -> QuantisedTensor | None:
        if name in (EMBEDDING, HEAD) or name.endswith("norm.weight"):
            return None
        how = blocks.int4_blocks if precision == "int4" else blocks.int8_rows
        return how(weights.values(name), weights.scale(name))

    return build(weights, plan.folder, precision=cast(Precision, precision), head_ids=rows, quantised=quantised, progress=progress)


def _rows(plan: Plan) -> tuple[int, ...]:
    """The head's: all that answers can hold, and as many others as in a converted model, here the first ones."""
    answers = Answers.build(plan.profile, [category.code for category in plan.profile.policy.categories], plan.tokenizer)
    return probe.head_rows(probe.needed_rows(plan.profile, plan.tokenizer, answers), np.zeros((1, plan.shape.vocab), np.float32))


def _with_prefixes(plan: Plan, manifest: Manifest, progress: Progress) -> Manifest:
    """With the keys and values of the default policy's prefixes, by the artifact itself."""
    prefixes = role_prefixes(plan.profile, plan.tokenizer)
    kept = []
    for done, (role, ids) in enumerate(prefixes.items()):
        progress("prefixes", done, len(prefixes))
        path = plan.folder / f"prefix-{role}.npz"
        save_prefix(path, *gate_pieces.keys_and_values(Artifact(plan.folder, manifest), ids))
        kept.append((PrefixRecord(role, ids, path.name, (made := record(path)).sha256), made))
    files = {**manifest.files, **{prefix.file: made for prefix, made in kept}}
    return replace(manifest, files=files, prefixes=tuple(prefix for prefix, _ in kept))
