"""Models from the hub into the home folder and out of it again; the only module that uses the network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edgeguard.errors import EdgeGuardError, ModelNotFoundError, RuntimeMissingError, StoreError
from edgeguard.store.catalogue import BUILT_IN, HUB_ID, Entry, entry, home, installed_name, offline, scan
from edgeguard.store.files import Differences, FileRecord, Progress, compare, locked, record, write_text
from edgeguard.store.manifest import MANIFEST, Artifact

RECORD = "download.json"
# no pickles and no Python: only what edgeguard reads, and the licence
INCLUDE = (
    "*.json", "*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data", "*.npz", "tokenizer.model",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.md",
)  # fmt: skip
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".onnx_data")
PATH = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*")


def pull(hub_id: str, revision: str | None = None, progress: Progress | None = None, *, include: Sequence[str] = (),
         before_weights: Callable[[Path, int], None] | None = None) -> Entry:
    """Fetch a model from the hub into `home()`; a broken-off download goes on where it stopped.

    `revision` is a branch, tag or commit; `include` narrows the files by patterns (`*Q4_K_M.gguf`); `before_weights` is called
    when all other files are there, with their folder and the bytes that are to come, and may raise. Raises `StoreError`
    when offline, refused, out of space, or when a file is not what the hub announced; `RuntimeMissingError`.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise ModelNotFoundError(f"{hub_id[:80]!r} is not a hub id; it has the form ORG/NAME.")
    if offline():
        raise StoreError(f"{hub_id} was not fetched: EDGEGUARD_OFFLINE or HF_HUB_OFFLINE is set. Unset it, or copy the files.")
    name = installed_name(hub_id)
    target, begun = home() / name, home() / f"{name}.partial"
    with locked(_lock(name)):
        if target.exists():
            raise StoreError(f"{hub_id} is installed at {target}. Remove it first: edgeguard models remove {name}")
        with _hub(hub_id):
            commit, wanted = _contents(hub_id, revision, include or INCLUDE)
            _remove_others(begun, wanted)
            _need_space(hub_id, begun, wanted)
            fetch = partial(_fetch, hub_id, commit, into=begun, progress=progress)
            got = {path: fetch(path, want) for path, want in wanted.items() if not path.endswith(WEIGHTS)}
        if before_weights:
            before_weights(begun, _need_space(hub_id, begun, wanted))
        with _hub(hub_id):
            got |= {path: fetch(path, want) for path, want in wanted.items() if path.endswith(WEIGHTS)}
            shutil.rmtree(begun / ".cache", ignore_errors=True)
            scan(begun)  # what is no model must not get the final name
            _write_record(begun, hub_id, commit, got)
            begun.rename(target)
    return entry(name)


def remove(name: str) -> Path:
    """Delete an installed model and give the folder it had; raises `StoreError` for the built-in one."""
    if name == BUILT_IN:
        raise StoreError(f"{name} is part of edgeguard and cannot be removed.")
    folder = entry(name).folder
    with locked(_lock(folder.name)):
        doomed = folder.with_name(f"{folder.name}.removed.partial")
        try:
            if folder.is_symlink():  # what it points to is not ours
                folder.unlink()
                return folder
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise StoreError(f"{folder} could not be removed: {error.strerror}.") from error
    return folder


def verify(place: Path, progress: Progress | None = None) -> list[tuple[Path, Differences]]:
    """Hash every file of the model or models in a folder anew, and name what differs from what was recorded.

    Raises `StoreError` when there is no record to hold the files against.
    """
    if (place / RECORD).is_file():
        recorded = [(place, _read_record(place / RECORD), RECORD)]
    else:
        artifacts = (model for model in scan(place) if isinstance(model, Artifact))
        recorded = [(artifact.folder, dict(artifact.manifest.files), MANIFEST) for artifact in artifacts]
    if not recorded:
        raise StoreError(f"{place} has no manifest, so there is nothing to verify it against.")
    return [(folder, compare(folder, files, own, progress)) for folder, files, own in recorded]


def _lock(name: str) -> Path:
    return home() / ".locks" / f"{name}.lock"


class Announced(NamedTuple):
    """What the hub says of a file; empty where it does not."""

    size: int
    sha256: str
    blob: str
    """SHA-1 as git has it, of files without a SHA-256."""

    def is_that_of(self, path: Path, found: FileRecord) -> bool:
        """Whether a file is what was announced."""
        if self.sha256 or not self.blob:
            return found.sha256 == (self.sha256 or found.sha256)
        data = path.read_bytes()  # small ones: the hub keeps large ones by SHA-256
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == self.blob


def _contents(hub_id: str, revision: str | None, patterns: Sequence[str]) -> tuple[str, dict[str, Announced]]:
    """The commit, and what is announced of each file that is wanted."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    files = {str(file.rfilename): file for file in info.siblings or ()}
    wanted = {path: Announced(int(file.size or 0), str(file.lfs.sha256) if file.lfs else "", str(getattr(file, "blob_id", "") or ""))
              for path, file in files.items()
              if PATH.fullmatch(path) and not path.startswith("original/") and any(fnmatch(path, pattern) for pattern in patterns)}
    if not any(path.endswith(WEIGHTS) for path in wanted):
        hint = f" Its GGUF files are fetched by: edgeguard models pull {hub_id} --include '*Q8_0.gguf'"
        raise StoreError(f"{hub_id} has no weights that fit {', '.join(patterns)}."
                         f"{hint if any(path.endswith('.gguf') for path in files) else ''}")
    return str(info.sha), wanted


def _remove_others(begun: Path, wanted: Mapping[str, Announced]) -> None:
    """What a download of another commit or other patterns has left there: it would be taken for a part of this model."""
    shas = {each.sha256 or each.blob for each in wanted.values()} - {""}
    for path in [path for path in begun.rglob("*") if path.is_file()]:
        name = path.relative_to(begun).as_posix()
        # huggingface_hub keeps its own records there, and parts of files by their hashes
        kept = name.startswith(".cache/") and (not name.endswith(".incomplete") or any(sha in path.name for sha in shas))
        if name not in wanted and not kept:
            path.unlink()


def _need_space(hub_id: str, begun: Path, wanted: Mapping[str, Announced]) -> int:
    """The bytes that are not there yet."""
    begun.mkdir(parents=True, exist_ok=True)
    have = sum(path.stat().st_size for path in begun.rglob("*") if path.is_file())
    need, free = sum(each.size for each in wanted.values()) - have, shutil.disk_usage(begun).free
    if need > free:
        raise StoreError(f"{hub_id} needs {need / 1e9:.1f} GB more, {begun.parent} has {free / 1e9:.1f} GB free.")
    return max(0, need)


def _fetch(
    hub_id: str, commit: str, path: str, announced: Announced, *, into: Path, progress: Progress | None
) -> FileRecord:
    import huggingface_hub

    if progress:
        progress(path, 0, announced.size)
    huggingface_hub.hf_hub_download(hub_id, path, revision=commit, local_dir=into)
    got = record(into / path, progress)
    if not announced.is_that_of(into / path, got):
        (into / path).unlink()
        raise StoreError(f"{path} of {hub_id} is not what the hub announced (its hash differs). Try again.")
    return got


@contextmanager
def _hub(hub_id: str) -> Iterator[None]:
    """Needs huggingface_hub, keeps it quiet, and puts its errors into words."""
    try:
        from huggingface_hub import utils
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "huggingface_hub"
        raise RuntimeMissingError("huggingface_hub", "convert", "" if absent else str(error)) from error
    quiet = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    except EdgeGuardError:
        raise
    except utils.GatedRepoError as error:
        raise StoreError(
            f"{hub_id} is gated. Accept its licence at https://huggingface.co/{hub_id}, then log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from error
    except utils.RepositoryNotFoundError as error:
        raise StoreError(f"{hub_id} is not on the hub, or private: check the name, or log in with `hf auth login`.") from error
    except utils.RevisionNotFoundError as error:
        raise StoreError(f"{hub_id} has no such revision.") from error
    except utils.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise StoreError(f"The hub answered with status {status} for {hub_id}. {_advice(status)}") from error
    except Exception as error:  # the transport below changes between releases (requests, httpx), and so do its errors
        if isinstance(error, OSError) and error.strerror:
            raise StoreError(f"{hub_id} could not be written: {error.strerror}.") from error
        raise StoreError(f"{hub_id} could not be fetched ({type(error).__name__}). Is the network reachable?") from error
    finally:
        if not quiet:
            utils.enable_progress_bars()


def _advice(status: object) -> str:
    if status in (401, 403):
        return "Log in with `hf auth login` or set HF_TOKEN, and accept the model's licence on its page."
    return "Too many requests: wait a few minutes." if status == 429 else "Try again later."


def _write_record(folder: Path, hub_id: str, commit: str, files: Mapping[str, FileRecord]) -> None:
    plain = {"format": 1, "hub_id": hub_id, "commit": commit, "files": {name: vars(files[name]) for name in sorted(files)}}
    write_text(folder / RECORD, json.dumps(plain, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, FileRecord]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(str(entry["sha256"]), int(entry["size"])) for name, entry in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged; pull the model again.") from error
    if bad := [name for name in files if not PATH.fullmatch(name)]:
        raise StoreError(f"{path} names a file outside its folder: {bad[0]!r}.")
    return files
