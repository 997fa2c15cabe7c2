"""Manifests, hashes, folders, locks, downloads: the only room that touches disk layout and network; no inference."""

from edgeguard.store.catalogue import (
    BareModel,
    Entry,
    Model,
    built_in_folder,
    check_files,
    entry,
    home,
    locate,
    models,
    offline,
    resolve,
    scan,
)
from edgeguard.store.download import pull, remove, verify
from edgeguard.store.files import Differences, FileRecord, Progress, record, records, sha256, write_text
from edgeguard.store.manifest import Artifact, Kind, Manifest, PrefixRecord

__all__ = [
    "Artifact",
    "BareModel",
    "Differences",
    "Entry",
    "FileRecord",
    "Kind",
    "Manifest",
    "Model",
    "PrefixRecord",
    "Progress",
    "built_in_folder",
    "check_files",
    "entry",
    "home",
    "locate",
    "models",
    "offline",
    "pull",
    "record",
    "records",
    "remove",
    "resolve",
    "scan",
    "sha256",
    "verify",
    "write_text",
]
