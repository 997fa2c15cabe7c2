"""What is converted: a Hugging Face folder, a hub id, or a GGUF, as weights, a tokenizer and the files beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeguard.convert.prefixes import Progress
from edgeguard.errors import ConversionError, ModelFileError, ModelNotFoundError, RuntimeMissingError, StoreError
from edgeguard.store.files import sha256
from edgeguard.weights import SafetensorsWeights, Weights

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.safetensors", "config.json", "tokenizer.json", "LICENSE*", "USE_POLICY*", "NOTICE*"]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that can be converted."""

    kind: str
    """`folder`, `hub` or `gguf`."""
    name: str
    """The hub id, or the name of the folder or file without its ending."""
    path: Path
    """The folder or the file."""
    weights: Weights
    tokenizer: Path | None
    """Its tokenizer.json; None for a GGUF, which carries the vocabulary inside."""

    @property
    def folder(self) -> Path:
        """Where licence texts would lie."""
        return self.path.parent if self.kind == "gguf" else self.path

    def write_tokenizer(self, path: Path) -> None:
        """Copy the tokenizer.json, or write the one that the GGUF's vocabulary amounts to."""
        if self.tokenizer is not None:
            path.write_bytes(self.tokenizer.read_bytes())
            return
        from edgeguard.convert.gguf_source import tokenizer_json

        path.write_text(json.dumps(tokenizer_json(self.path), ensure_ascii=False), encoding="utf-8")

    def sha256(self, progress: Progress | None = None) -> str:
        """Of a GGUF's bytes; of a folder, over the hashes of its weights and config.json in the order of their names."""
        if self.kind == "gguf":
            return sha256(self.path, progress)
        files = sorted([*self.path.glob("*.safetensors"), self.path / "config.json"])
        return hashlib.sha256("".join(f"{file.name} {sha256(file, progress)}\n" for file in files).encode()).hexdigest()

    def close(self) -> None:
        """Let go of a mapped file, where the weights hold one."""
        shut: Callable[[], None] | None = getattr(self.weights, "close", None)
        if shut:
            shut()


def open_source(given: str | Path, tokenizer: Path | None = None, *, offline: bool = False) -> Source:
    """Find and open a source; `tokenizer` is a tokenizer.json to use instead of its own.

    Raises `ModelNotFoundError` when there is nothing of that name, `ModelFileError` when it is no model that can be
    converted, `StoreError` when the hub cannot be reached or refuses.
    """
    path = Path(given)
    if tokenizer is not None and not tokenizer.is_file():
        raise ModelFileError(f"{tokenizer} is missing; --tokenizer takes the path of a tokenizer.json.")
    if path.is_dir():
        return _folder("folder", path.resolve().name, path, tokenizer)
    if path.is_file():
        return _gguf(path, tokenizer)
    if isinstance(given, str) and HUB_ID.fullmatch(given):
        return _folder("hub", given, _download(given, offline), tokenizer)
    raise ModelNotFoundError(f"{given} is no folder, no .gguf file and no hub id of the form owner/name.")


def _folder(kind: str, name: str, path: Path, tokenizer: Path | None) -> Source:
    inside = path / "tokenizer.json"
    if tokenizer is None and not inside.is_file():
        raise ModelFileError(f"{path} has no tokenizer.json; give one with --tokenizer.")
    return Source(kind, name, path, SafetensorsWeights(path), tokenizer or inside)


def _gguf(path: Path, tokenizer: Path | None) -> Source:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file. Convert from a GGUF, a Hugging Face folder or a hub id.")
    from edgeguard.convert.gguf_source import GgufWeights

    return Source("gguf", path.stem, path, GgufWeights(path), tokenizer)


def _download(name: str, offline: bool) -> Path:
    """The hub's snapshot of a repository; every refusal is told with what to do about it."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise RuntimeMissingError("huggingface_hub (it fetches models by hub id)", "convert") from None
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=offline))
    except errors.GatedRepoError:
        raise StoreError(f"The hub does not give out {name} without consent. Accept its licence on https://huggingface.co/{name}, "
                         "then log in with: huggingface-cli login") from None
    except errors.RepositoryNotFoundError:
        raise StoreError(f"The hub has no {name}, or it is private and you are not logged in (huggingface-cli login).") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise StoreError(f"{name} is not in the hub's local cache and the hub cannot be reached (no network, or offline mode is "
                         "on). Download it where there is a network and give its folder.") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        hint = {401: " Log in with: huggingface-cli login", 403: f" Ask for access on https://huggingface.co/{name}"}
        raise StoreError(f"The hub answered {status} for {name}.{hint.get(status, '')}") from None
    except OSError as error:
        raise StoreError(f"{name} could not be downloaded: {error}") from None


def check_vocabulary(weights: Weights, tokens: int) -> None:
    """Raises `ConversionError` when the tokenizer has ids that the embedding has no rows for."""
    if tokens > weights.shape.vocab:
        raise ConversionError(f"The tokenizer has {tokens} tokens, the model embeds {weights.shape.vocab}; they do not belong together.")
