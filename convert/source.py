"""What is converted: a Hugging Face folder, a hub id, or a GGUF, as weights, a tokenizer and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import ModelFileError, ModelMismatchError, ModelNotFoundError
from edgeguard.store import Artifact, Model, locate, pull, resolve
from edgeguard.store.catalogue import HUB_ID
from edgeguard.store.files import Progress
from edgeguard.weights import SafetensorsWeights, Weights

READS = "the path of a Hugging Face folder or of a .gguf file, the name of an installed model, or a hub id (ORG/NAME)"
WANTED = ("*.safetensors", "config.json", "tokenizer.json", "LICENSE*", "USE_POLICY*")


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that can be converted."""

    kind: str
    """`folder` or `gguf`."""
    name: str
    """The hub id, or the name of the artifact, of the folder, or of the file without its ending."""
    path: Path
    """The folder or the file."""
    weights: Weights
    tokenizer: Path | None
    """A tokenizer.json; None for a GGUF that carries its vocabulary inside and has none beside it."""
    profile: str | None = None
    """Name of the one that an artifact was made for; other sources do not say."""

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

    @property
    def files(self) -> list[Path]:
        """What its hash is of: a GGUF, or a folder's weights and config.json in the order of their names."""
        return [self.path] if self.kind == "gguf" else sorted([*self.path.glob("*.safetensors"), self.path / "config.json"])


def open_source(given: str | Path, tokenizer: Path | None = None, progress: Progress | None = None,
                before_weights: Callable[[Path, int], None] | None = None) -> Source:
    """Find and open a source; a hub id that is not installed is fetched; `tokenizer` is used instead of the source's own.

    `before_weights` may refuse a download (`store.pull`).
    Raises `ModelNotFoundError` when there is nothing of that name, `ModelFileError` when it is no model that can be
    converted, `StoreError` when the hub cannot be reached or refuses.
    """
    if tokenizer is not None and not tokenizer.is_file():
        raise ModelFileError(f"{tokenizer} is missing; a tokenizer is the path of a tokenizer.json.")
    def check(folder: Path, coming: int) -> None:
        _check_beside(str(given), folder, tokenizer)
        if before_weights:
            before_weights(folder, coming)

    model = _find(given, progress, check)
    if model.kind == "gguf":
        from edgeguard.convert.gguf_source import GgufWeights

        if isinstance(model, Artifact):
            name, tokenizer = model.name.removesuffix(f"-{model.manifest.precision}"), tokenizer or model.tokenizer
            profile = model.manifest.profile
        else:
            name, profile = model.weights.stem, None
        return Source("gguf", name, model.weights, GgufWeights(model.weights), tokenizer, profile)
    folder = model.folder
    beside = folder / "tokenizer.json"
    _check_beside(str(folder), folder, tokenizer)
    name = str(given) if _is_hub_id(given) else folder.resolve().name
    return Source("folder", name, folder, SafetensorsWeights(folder), tokenizer or beside)


def _check_beside(name: str, folder: Path, tokenizer: Path | None) -> None:
    """Raises `ModelFileError` when a folder lacks what a conversion needs beside weights."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{name} has no config.json, so it is no Hugging Face model.")
    if tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise ModelFileError(f"{name} has no tokenizer.json; give the path of one (--tokenizer).")


def check_vocabulary(weights: Weights, tokens: int) -> None:
    """Raises `ModelMismatchError` when the tokenizer has ids that the embedding has no rows for."""
    if tokens > weights.shape.vocab:
        raise ModelMismatchError(
            f"The tokenizer has {tokens} tokens, the model embeds only {weights.shape.vocab}; they do not belong together."
        )


def _find(given: str | Path, progress: Progress | None, before_weights: Callable[[Path, int], None]) -> Model:
    try:
        locate(given)
    except ModelNotFoundError:
        if not _is_hub_id(given):
            raise ModelNotFoundError(f"There is no {str(given)[:80]!r} to convert. Give {READS}.") from None
        pull(str(given), progress=progress, include=WANTED, before_weights=before_weights)
    return resolve(given, ("hf", "gguf"))


def _is_hub_id(given: str | Path) -> bool:
    return isinstance(given, str) and HUB_ID.fullmatch(given) is not None and not Path(given).exists()
