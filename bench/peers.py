"""Other runtimes that judge with the same source weights: a table of who they are, and how each gets its model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from edgeguard.architecture import Shape
from edgeguard.bench import environments
from edgeguard.bench.artifacts import Measured
from edgeguard.bench.contenders import Contender, Setting
from edgeguard.bench.driver import WORKERS, Program
from edgeguard.bench.environments import GENAI, OWN, Environment, Run, Told
from edgeguard.bench.suite import Peers
from edgeguard.errors import EdgeGuardError, InputError, ModelMemoryError, ModelNotFoundError, StoreError
from edgeguard.store.catalogue import cache_folder

CONTEXT = 8192  # tokens, as a guard model's caller sets
BASE = 0.7e9  # bytes of a process before any weight
Form = Literal["as it is", "genai", "optimum"]


@dataclass(frozen=True)
class Peer:
    """One other way to a verdict."""

    name: str
    """Of its cells and on the command line."""
    title: str
    """For people."""
    script: str
    """In the workers' folder, run by the environment's Python."""
    environment: Environment
    reads: str
    """`hf`: the source folder; else the precision of a GGUF artifact."""
    precision: str
    form: Form
    """How its model is made of what it reads."""
    running: float
    """Bytes of memory for each parameter while it judges, context included. A guess for an 8B, from the size of its weights and what
    the mini took; never measured at that size."""
    making: float = 0.0
    """The same while its model is prepared. Only onnxruntime-genai's was measured, on the mini: 464 MB above its imports for 54 M
    parameters; optimum's is a guess."""
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps: bool = True
    """It keeps the common prefix from call to call."""

    def memory(self, shape: Shape, *, making: bool = False) -> float:
        """Bytes that it takes with a model of this shape."""
        return BASE + shape.parameters * (self.making if making else self.running)


_LLAMA = ("llama_cpp_python.py", OWN)
_OPENVINO = ("openvino_llm.py", GENAI)
_TRANSFORMERS = ("transformers_generate.py", OWN)
PEERS = {
    peer.name: peer for peer in (
        # llama-cpp-python with the library's own way of keeping the prefix is level L0 of the ladder, with q4_k_m and q8_0
        Peer("llama-cpp-python-q4_0", "llama-cpp-python q4_0", *_LLAMA, "q4_0", "q4_0", "as it is", 1.3),
        Peer("llama-cpp-python-q4_k_m-cache", "llama-cpp-python q4_k_m, its LlamaRAMCache", *_LLAMA, "q4_k_m", "q4_k_m", "as it is", 1.3,
             options={"reuse": "cache"}),
        Peer("llama-cpp-python-q4_k_m-state", "llama-cpp-python q4_k_m, state restored", *_LLAMA, "q4_k_m", "q4_k_m", "as it is", 1.3,
             options={"reuse": "state"}),
        Peer("onnxruntime-genai-int4", "onnxruntime-genai int4, its builder's defaults, rewound to the prefix", "ort_genai.py", GENAI, "hf",
             "int4", "genai", 1.7, 8.6),
        Peer("openvino-q8_0", "openvino-genai int8 (GGUF q8_0), prefix caching", *_OPENVINO, "q8_0", "q8_0", "as it is", 2.4),
        Peer("openvino-q4_k_m", "openvino-genai GGUF q4_k_m, prefix caching", *_OPENVINO, "q4_k_m", "q4_k_m", "as it is", 2.4),
        Peer("optimum-fp32", "optimum ORTModelForCausalLM fp32", "optimum_ort.py", OWN, "hf", "fp32", "optimum", 5.5, 12.0, keeps=False),
        Peer("transformers-fp32", "transformers generate fp32", *_TRANSFORMERS, "hf", "fp32", "as it is", 4.6, keeps=False),
        Peer("kept-transformers-fp32", "transformers generate fp32, cache cut back to the prefix", *_TRANSFORMERS, "hf", "fp32",
             "as it is", 4.6, options={"reuse": "prefix"}),
        Peer("transformers-bf16", "transformers generate bf16", *_TRANSFORMERS, "hf", "bf16", "as it is", 2.3,
             options={"dtype": "bfloat16"}, keeps=False),
    )
}


def named(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, or all; raises `InputError` for a name that there is not."""
    if unknown := [name for name in names if name not in PEERS]:
        raise InputError(f"There is no peer {unknown[0]!r}; there are {', '.join(PEERS)}.")
    return [PEERS[name] for name in names] if names else list(PEERS.values())


def default_folder() -> Path:
    """Where environments and prepared models lie."""
    return cache_folder() / "peers"


def source(peer: Peer, model: Measured) -> Path:
    """The file or folder that the peer's model is made of, the built-in model's folder written or not; raises `ModelNotFoundError`."""
    if peer.reads == "hf":
        if not model.source:
            raise ModelNotFoundError(f"{peer.name} is made of the source weights, a Hugging Face folder `master` beside the artifacts; "
                                     f"{model.name} has none.")
        return Path(model.source)
    artifact = model.found.get(f"gguf-{peer.reads}")
    if artifact is None or not artifact.weights.is_file():
        raise ModelNotFoundError(f"{peer.name} reads a GGUF of type {peer.reads}, which {model.name} does not have here; make it with: "
                                 f"edgeguard convert SOURCE --to gguf --precision {peer.reads} --out FOLDER")
    return artifact.weights


def check_memory(peer: Peer, shape: Shape, memory: float, *, making: bool = False) -> None:
    """Raises `ModelMemoryError` when a machine with so many bytes is too small for it."""
    if (needed := peer.memory(shape, making=making)) > memory:
        raise ModelMemoryError(f"{peer.title} needs about {needed / 1e9:.0f} GB of memory {'to be prepared' if making else 'to run'}; "
                               f"this machine has {memory / 1e9:.0f} GB.")


def prepared(peer: Peer, origin: Path, folder: Path) -> Path:
    """Where the peer's model lies, made or not; its name changes with the origin's files."""
    if peer.form == "as it is":
        return origin
    files = sorted(each for each in origin.iterdir() if each.is_file()) if origin.is_dir() else [origin]
    stamp = [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files]
    digest = hashlib.sha256(json.dumps([str(origin.resolve()), stamp, peer.environment.requirements]).encode()).hexdigest()[:16]
    return folder / "models" / f"{peer.form}-{digest}"


def prepare(peer: Peer, origin: Path, folder: Path, told: Told, execute: Run = environments.run) -> Path:
    """Make the peer's model, or nothing if it is there; written beside and renamed. Raises `StoreError` with the tool's last lines."""
    place = prepared(peer, origin, folder)
    if place.exists():
        return place
    told(f"{peer.name}: its model is being made of {origin}")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    command = COMMANDS[peer.form](str(peer.environment.python(folder)), str(origin), str(partial))
    execute(command, place.with_name(place.name + ".log"))
    if not partial.exists():
        raise StoreError(f"The model of {peer.name} was not written; the tool's output is in {place.parent}.")
    partial.replace(place)
    return place


COMMANDS: Mapping[str, Callable[[str, str, str], tuple[str, ...]]] = {
    # -m is asked for and unused where -i is given; the cache is not, as nothing is downloaded
    "genai": lambda python, origin, out: (python, "-m", "onnxruntime_genai.models.builder", "-m", "guard", "-i", origin, "-o", out,
                                          "-p", "int4", "-e", "cpu", "-c", out),
    "optimum": lambda python, origin, out: (python, "-m", "optimum.exporters.onnx", "--model", origin,
                                            "--task", "text-generation-with-past", out),
}
"""Python, origin, place to write to."""


def program(peer: Peer, model: Path, folder: Path, setting: Setting, context: int) -> Program:
    """What is started and what it loads."""
    options = {"context": context, "precision": peer.precision, **peer.options}
    command = (str(peer.environment.python(folder)), str(WORKERS / peer.script))
    return Program(peer.title, command, str(model), setting.threads, options)


def contender(peer: Peer, model: Measured, setting: Setting, folder: Path, memory: float) -> Contender:
    """The peer with its model, or with the reason why it cannot take part."""
    context = min(CONTEXT, model.shape.context)
    place, missing = Path(), None
    try:
        check_memory(peer, model.shape, memory)
        place = _found(peer, model, folder, memory)
        if not place.exists():
            check_memory(peer, model.shape, memory, making=True)
        if not place.exists() or not peer.environment.ready(folder):
            raise StoreError(f"{peer.title} is not set up; make it with: edgeguard bench peers --make {peer.name}")
    except EdgeGuardError as error:
        missing = str(error)
    return Contender(f"peers/{peer.name}", program(peer, place, folder, setting, context), peer.precision,
                     0 if missing else _size(place), missing, edgeguard=False, keeps=peer.keeps)


def _found(peer: Peer, model: Measured, folder: Path, memory: float) -> Path:
    """Where its model lies or will lie; where there is nothing to make it of, room for the making is asked first."""
    try:
        origin = source(peer, model)
        return prepared(peer, origin, folder) if origin.exists() else origin
    except ModelNotFoundError:
        check_memory(peer, model.shape, memory, making=True)
        raise


def taking_part(model: Measured, setting: Setting, run_folder: Path) -> Peers:
    """All peers of a run; those that are not set up or do not fit stand there with the reason. `peers` in the run's folder goes first."""
    own = run_folder / "peers"
    place = own if own.is_dir() else default_folder()
    memory = psutil.virtual_memory().total
    pythons = {"openvino": str(GENAI.python(place))} if GENAI.ready(place) else {}
    return Peers([contender(peer, model, setting, place, memory) for peer in PEERS.values()], pythons)


def _size(place: Path) -> int:
    return sum(each.stat().st_size for each in place.iterdir() if each.is_file()) if place.is_dir() else place.stat().st_size
