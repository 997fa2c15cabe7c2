"""The manifest of an artifact: one folder is one converted model, and `manifest.json` names and hashes all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from edgeguard import strict_json
from edgeguard.architecture import Shape
from edgeguard.calibration import Calibration
from edgeguard.errors import ModelFileError
from edgeguard.store.files import FileRecord, write_text
from edgeguard.verdict import Role

FORMAT = 1
MANIFEST = "manifest.json"
MAX_BYTES = 16 << 20  # the ids of a whole vocabulary and four 8K prefixes stay far below
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
MAX_TEXT = 128  # characters of a name
MAX_NUMBER = 1 << 53  # what every reader of JSON keeps exactly
SHA256 = re.compile(r"[0-9a-f]{64}")

Kind = Literal["onnx", "gguf"]
T = TypeVar("T")


@dataclass(frozen=True)
class PrefixRecord:
    """Keys and values of a prompt's head, computed in full precision at conversion."""

    role: Role
    """Whose turn is judged after it."""
    ids: tuple[int, ...]
    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of an artifact without opening its weights."""

    name: str
    kind: Kind
    profile: str
    """Name of the profile that the model was trained for."""
    precision: str
    """`fp32`, `fp16`, `int8`, `int4`, `q8_0`, ..."""
    weights: str
    """The main file: `model.onnx` or `model.gguf`."""
    files: Mapping[str, FileRecord]
    """Every file of the artifact but the manifest."""
    shape: Shape
    head_ids: tuple[int, ...] = ()
    """Token ids of the head's rows, ascending; empty for the whole vocabulary."""
    prefixes: tuple[PrefixRecord, ...] = ()
    tokenizer: str = "tokenizer.json"
    source: Mapping[str, Any] = field(default_factory=dict)
    """`kind`, `name` and `sha256` of what it was converted from."""
    builder: str = ""
    """Version of edgeguard that made it."""
    types: Mapping[str, int] = field(default_factory=dict)
    """How many tensors are stored in each type."""
    probe: Mapping[str, Any] = field(default_factory=dict)
    """What the source's full head showed: BOS, surface forms, mass."""
    gate: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the comparison with the source."""
    licence: str = ""
    conversion: Mapping[str, Any] = field(default_factory=dict)
    """What it took to make it: `memory`, peaks in bytes. Old manifests have none."""
    calibration: Calibration | None = None
    """Fitted for these weights; none stands in the manifest of an artifact without one."""

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """From a folder's manifest.json; raises `ModelFileError` naming the first thing that is wrong with it."""
        path = Path(folder) / MANIFEST
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ModelFileError(f"{path} is larger than {MAX_BYTES} bytes; that is no manifest.")
            data = strict_json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, ModelFileError):
                raise
            reason = str(error) if isinstance(error, strict_json.DuplicateKeyError) else type(error).__name__
            raise ModelFileError(f"{path} cannot be read as a manifest: {reason}. Install the model again.") from error
        try:
            return cls.from_dict(data)
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """From plain values; raises `ModelFileError`."""
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        if not isinstance(data, dict) or type(found) is not int or found != FORMAT:  # True would equal 1
            raise ModelFileError(f"manifest format {repr(found)[:40]} is unknown; this version of edgeguard reads format {FORMAT}.")
        read = _Reader(data)
        manifest = cls(
            name=read("name", _text),
            kind=read("kind", _kind),
            profile=read("profile", _text),
            precision=read("precision", _text),
            weights=read("weights", _file_name),
            files=read("files", _files),
            shape=read("shape", _shape),
            head_ids=read("head_ids", _ids),
            prefixes=read("prefixes", _prefixes),
            tokenizer=read("tokenizer", _file_name),
            licence=read("licence", _string),
            builder=read("builder", _string),
            **{name: read(name, _mapping) for name in ("source", "types", "probe", "gate")},
            conversion=read("conversion", _mapping) if "conversion" in data else {},
            calibration=read("calibration", Calibration.from_dict) if "calibration" in data else None,
        )
        read.done()
        manifest._check()
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` gives the same manifest back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "calibration"}
        return {
            "format": FORMAT,
            **plain,
            "files": {name: vars(record) for name, record in sorted(self.files.items())},
            "shape": self.shape.to_dict(),
            "head_ids": list(self.head_ids),
            "prefixes": [{**vars(prefix), "ids": list(prefix.ids)} for prefix in self.prefixes],
            **{name: dict(plain[name]) for name in ("source", "types", "probe", "gate", "conversion")},
            **({"calibration": asdict(self.calibration)} if self.calibration else {}),
        }

    def write(self, folder: str | Path) -> Path:
        """Write manifest.json by rename, after the same checks that reading makes."""
        plain = self.to_dict()
        Manifest.from_dict(plain)
        return write_text(Path(folder) / MANIFEST, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")

    def prefix(self, role: Role) -> PrefixRecord | None:
        """The prefix kept for conversations in which `role` is judged."""
        return next((prefix for prefix in self.prefixes if prefix.role == role), None)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def _check(self) -> None:
        wanted = {self.weights, self.tokenizer, *(prefix.file for prefix in self.prefixes)}
        if missing := sorted(wanted - self.files.keys()):
            raise ModelFileError(f"'files' does not list {', '.join(missing)}.")
        if any(later <= earlier for earlier, later in zip(self.head_ids, self.head_ids[1:], strict=False)):
            raise ModelFileError("'head_ids' must ascend.")
        ids = (*self.head_ids, *(token for prefix in self.prefixes for token in prefix.ids))
        if ids and max(ids) >= self.shape.vocab:
            raise ModelFileError(f"token id {max(ids)} is beyond the vocabulary of {self.shape.vocab}.")
        if len({prefix.role for prefix in self.prefixes}) < len(self.prefixes):
            raise ModelFileError("'prefixes' has two entries for one role.")
        for prefix in self.prefixes:
            if prefix.sha256 != self.files[prefix.file].sha256:
                raise ModelFileError(f"'prefixes' and 'files' give different hashes for {prefix.file}.")


@dataclass(frozen=True)
class Artifact:
    """A folder with a manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: str | Path) -> Artifact:
        """Of a folder; raises `ModelFileError`."""
        return cls(Path(folder), Manifest.read(folder))

    def path(self, name: str) -> Path:
        """Of one of its files; raises `ModelFileError` when the manifest does not list it."""
        if name not in self.manifest.files:
            raise ModelFileError(f"{self.folder} has no file {name!r} in its manifest.")
        return self.folder / name

    @property
    def name(self) -> str:
        """Of the model."""
        return self.manifest.name

    @property
    def kind(self) -> Kind:
        """`onnx` or `gguf`."""
        return self.manifest.kind

    @property
    def weights(self) -> Path:
        """The main file."""
        return self.path(self.manifest.weights)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json."""
        return self.path(self.manifest.tokenizer)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self.manifest.size


class _Reader:
    """Takes the fields of one mapping, each by its own rule, and complains about what is left."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data, self.taken = data, {"format"}

    def __call__(self, name: str, rule: Callable[[Any], T]) -> T:
        self.taken.add(name)
        if name not in self.data:
            raise ModelFileError(f"{name!r} is missing.")
        try:
            return rule(self.data[name])
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelFileError(f"{name!r} is wrong: {error}") from error

    def done(self) -> None:
        if unknown := sorted(self.data.keys() - self.taken):
            raise ModelFileError(f"unknown fields {', '.join(map(repr, unknown))}.")


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is needed, not {type(value).__name__}.")
    return value


def _text(value: object) -> str:
    """Such as a terminal shows on one line."""
    text = _string(value)
    if not text.strip():
        raise ValueError("it is blank.")
    if len(text) > MAX_TEXT or not text.isprintable():
        raise ValueError(f"{text[:40]!r} is longer than {MAX_TEXT} characters or cannot be printed on one line.")
    return text


def _kind(value: object) -> Kind:
    if value not in ("onnx", "gguf"):
        raise ValueError(f"{value!r} is neither 'onnx' nor 'gguf'.")
    return value


def _role(value: object) -> Role:
    if value not in ("user", "assistant"):
        raise ValueError(f"{value!r} is neither 'user' nor 'assistant'.")
    return value


def _file_name(value: object) -> str:
    if not PLAIN_NAME.fullmatch(_string(value)) or value == MANIFEST:
        raise ValueError(f"{value!r} is not a plain file name inside the artifact.")
    return cast(str, value)


def _sha256(value: object) -> str:
    if not SHA256.fullmatch(_string(value)):
        raise ValueError(f"{value!r} is not a SHA-256.")
    return cast(str, value)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{repr(value)[:40]} is not a count.")
    return value


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError("a list of token ids is needed.")
    return tuple(map(_number, value))


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("a mapping is needed.")
    return value


def _files(value: object) -> dict[str, FileRecord]:
    def record(entry: object) -> FileRecord:
        read = _Reader(_mapping(entry))
        made = FileRecord(read("sha256", _sha256), read("size", _number))
        read.done()
        return made

    return {_file_name(name): record(entry) for name, entry in _mapping(value).items()}


def _prefixes(value: object) -> tuple[PrefixRecord, ...]:
    def record(entry: object) -> PrefixRecord:
        read = _Reader(_mapping(entry))
        made = PrefixRecord(read("role", _role), read("ids", _ids), read("file", _file_name), read("sha256", _sha256))
        read.done()
        return made

    if not isinstance(value, list):
        raise TypeError("a list is needed.")
    return tuple(map(record, value))


def _shape(value: object) -> Shape:
    shape = Shape(**_mapping(value))
    shape.check()
    return shape
