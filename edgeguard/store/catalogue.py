"""From a name or a path to a model's files; where models live; never the network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import platformdirs

import edgeguard
from edgeguard.errors import EdgeGuardError, ModelFileError, ModelNotFoundError
from edgeguard.store.files import Progress, Seen, check, mark
from edgeguard.store.manifest import MANIFEST, Artifact

BUILT_IN = "mini"
BUILT_IN_FOLDER = "mini-3"
"""Weights of another training lie in a folder of another name."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
READS = "an artifact folder (manifest.json), a .gguf file, an ONNX export (model.onnx with config.json) or a Hugging Face folder"


@dataclass(frozen=True)
class BareModel:
    """A model without a manifest: a lone GGUF, an ordinary ONNX export, or a Hugging Face folder."""

    kind: Literal["onnx", "gguf", "hf"]
    folder: Path
    weights: Path
    """The .gguf or .onnx file; for `hf` the folder itself."""

    @property
    def name(self) -> str:
        """Of the file or folder."""
        return self.weights.stem if self.kind == "gguf" else self.folder.resolve().name

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json beside it, or the GGUF, which has its vocabulary inside."""
        return self.weights if self.kind == "gguf" else self.folder / "tokenizer.json"

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        if self.kind == "gguf":
            return self.weights.stat().st_size
        suffixes = (".safetensors",) if self.kind == "hf" else (".onnx", ".data", ".onnx_data")
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.name.endswith(suffixes))


Model = Artifact | BareModel
Marks: TypeAlias = Mapping[Path, "list[int] | None"]


@dataclass(frozen=True)
class Entry:
    """A named model and what its folder holds."""

    name: str
    folder: Path
    built_in: bool
    models: tuple[Model, ...] = ()
    problem: str = ""
    """Why it cannot be read, or empty."""


def home() -> Path:
    """Where installed models live: $EDGEGUARD_HOME, else the system's folder for a user's data. Not made here."""
    given = os.environ.get("EDGEGUARD_HOME")
    return Path(given).expanduser() if given else Path(platformdirs.user_data_dir("edgeguard", appauthor=False))


def cache_folder() -> Path:
    """Where that lives which can be made again at any time: prefix states, prepacked weights, what `tune` measured."""
    return home() / ".cache"


def offline() -> bool:
    """True when $EDGEGUARD_OFFLINE or $HF_HUB_OFFLINE forbids the network."""
    asked = (os.environ.get(name, "").strip().lower() for name in ("EDGEGUARD_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value not in ("", "0", "false", "no", "off") for value in asked)


def built_in_folder() -> Path:
    """Of the model that came with the package, from a checkout or a wheel alike; raises `ModelNotFoundError`."""
    spec = importlib.util.find_spec("edgeguard.models")
    installed = spec.submodule_search_locations if spec else None
    # started in a checkout, Python takes the package from there, and the models stand beside it
    for place in (*(installed or ()), Path(edgeguard.__file__).parents[1] / "models"):
        if (folder := Path(place) / BUILT_IN_FOLDER).is_dir():
            return folder
    raise ModelNotFoundError("The built-in model is not part of this installation. Install edgeguard again.")


def models() -> list[Entry]:
    """The built-in model, then the installed ones by name; a damaged one is listed with its problem."""
    entries = []
    try:
        entries.append(_entry(BUILT_IN, built_in_folder(), built_in=True))
    except ModelNotFoundError as error:
        entries.append(Entry(BUILT_IN, Path(), built_in=True, problem=str(error)))
    if home().is_dir():
        entries += [_entry(folder.name, folder, built_in=False) for folder in sorted(home().iterdir()) if _installed(folder)]
    return entries


def entry(name: str) -> Entry:
    """One named model, built-in or installed; raises `ModelNotFoundError`."""
    wanted = installed_name(name)
    for known in models():
        if known.name == wanted:
            return known
    raise _not_found(name)


def installed_name(name: str) -> str:
    """The folder name of a model or hub id: `org/model` is kept as `org--model`; raises `ModelNotFoundError`."""
    plain = name.replace("/", "--") if HUB_ID.fullmatch(name) else name
    if not NAME.fullmatch(plain) or plain.endswith((".", ".partial")):
        raise ModelNotFoundError(f"{name[:80]!r} is not a model's name: letters, digits, '.', '_' and '-' make one.")
    return plain


def resolve(model: str | Path | None = None, kinds: Sequence[str] = ("onnx", "gguf")) -> Model:
    """The one model that is meant, of the first of `kinds` that is there.

    `model` is None for the built-in one, a name (built-in, then installed), or a path; a name wins over a folder of that
    name in the working directory, so write `./mini` for the folder. Raises `ModelNotFoundError` when nothing or more than
    one thing fits, and `ModelFileError` for what is not a model.
    """
    place = locate(model)
    found = scan(place)
    for kind in kinds:
        fitting = [each for each in found if each.kind == kind]
        if len(fitting) > 1:
            choices = ", ".join(str(each.weights) for each in fitting)
            raise ModelNotFoundError(f"{place} holds several {kind} models: {choices}. Give the path of one of them.")
        if fitting:
            return fitting[0]
    held = ", ".join(sorted({each.kind for each in found}))
    raise ModelNotFoundError(f"{place} holds a model of kind {held}, but {' or '.join(kinds)} is needed. Choose another backend.")


def locate(model: str | Path | None = None) -> Path:
    """The file or folder that a name or path stands for; raises `ModelNotFoundError`."""
    if model is None or model == BUILT_IN:
        return built_in_folder()
    if isinstance(model, str) and (HUB_ID.fullmatch(model) or NAME.fullmatch(model)):
        folder = home() / model.replace("/", "--")
        if _installed(folder) and not (HUB_ID.fullmatch(model) and _exists(Path(model))):
            return folder
    path = Path(model).expanduser()
    if not str(model).strip() or not _exists(path):
        raise _not_found(model)
    return path


def scan(place: Path) -> list[Model]:
    """Every model in a file, a folder or its sub-folders; raises `ModelFileError` when there is none."""
    if place.is_dir():
        found = _in_folder(place)
        if not (found and isinstance(found[0], Artifact)):  # a manifest speaks for the whole folder
            below = sorted(folder for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith("."))
            found += [each for folder in below for each in _in_folder(folder)]
    else:
        found = _of_file(place)
    if not found:
        raise ModelFileError(f"{place} is not a model. edgeguard reads {READS}.")
    return found


def check_files(model: Model, progress: Progress | None = None) -> Marks:
    """Before a load: sizes of an artifact's files, and their hashes when they were not seen before.

    Gives what tells the files that were checked, for `check_unmoved`. Raises `ModelFileError`. A model without a manifest has
    nothing to be held against.
    """
    before = _marks(model)
    if isinstance(model, Artifact):
        check(model.folder, model.manifest.files, Seen(home() / ".seen.json"), progress)
    return before


def _marks(model: Model) -> Marks:
    """Of all files that a model is loaded from, as they lie there now."""
    names = model.manifest.files if isinstance(model, Artifact) else ()
    paths = {*(model.folder / name for name in names), model.weights, model.tokenizer}
    found: dict[Path, list[int] | None] = dict.fromkeys(paths)
    for path in paths:
        with suppress(OSError):  # what lacks is told when it is read
            found[path] = mark(path)
    return found


def check_unmoved(model: Model, before: Marks) -> None:
    """Behind a load: raises `ModelFileError` when a file that `check_files` has checked is not surely the one that was opened."""
    now = _marks(model)
    for path in before:
        if now.get(path) != before[path]:
            raise ModelFileError(f"{path} was changed or replaced while it was being loaded, so it is not used. Load the model again.")


def digest(model: Model, *, known: bool = False) -> str:
    """What tells a model from every other: its manifest's hashes, or the SHA-256 of a bare GGUF, read once and remembered.

    With `known`, no file is read for it. Empty for other models without a manifest, and where nothing can be remembered.
    """
    if isinstance(model, Artifact):
        hashes = sorted((name, record.sha256) for name, record in model.manifest.files.items())
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    if model.kind != "gguf":
        return ""
    seen = Seen(home() / ".seen.json")
    return seen.recall(model.weights) if known else seen.once(model.weights)


def _in_folder(folder: Path) -> list[Model]:
    if (folder / MANIFEST).is_file():
        return [Artifact.read(folder)]
    found: list[Model] = [_gguf(path) for path in sorted(folder.glob("*.gguf")) if not LATER_PART.search(path.name)]
    if (folder / "config.json").is_file():
        found += [BareModel("onnx", folder, path) for path in sorted(folder.glob("*.onnx"))]
        found += [BareModel("hf", folder, folder)] * any(folder.glob("*.safetensors"))
    return found


def _of_file(path: Path) -> list[Model]:
    if (path.parent / MANIFEST).is_file():
        artifact = Artifact.read(path.parent)
        if path.name in (MANIFEST, artifact.manifest.weights):
            return [artifact]
    if path.suffix == ".gguf":
        return [_gguf(path)]
    if path.suffix == ".onnx" and (path.parent / "config.json").is_file():
        return [BareModel("onnx", path.parent, path)]
    return []


def _gguf(path: Path) -> BareModel:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file: it begins with {magic!r}.")
    return BareModel("gguf", path.parent, path)


def _entry(name: str, folder: Path, *, built_in: bool) -> Entry:
    try:
        return Entry(name, folder, built_in, tuple(scan(folder)))
    except (EdgeGuardError, OSError) as error:
        return Entry(name, folder, built_in, problem=str(error))


def _installed(folder: Path) -> bool:
    return bool(NAME.fullmatch(folder.name)) and not folder.name.endswith(".partial") and folder.is_dir()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not a path at all
        return False


def _not_found(model: str | Path) -> ModelNotFoundError:
    known = ", ".join(each.name for each in models() if not each.problem) or "none"
    return ModelNotFoundError(
        f"There is no model {str(model)[:80]!r}. Known: {known}. Give one of these names, or a path to {READS}; "
        "`edgeguard models pull ORG/NAME` fetches one from the hub."
    )
