"""Manifests, hashes, folders, locks, downloads: the only room that touches disk layout and network; no inference."""

from edgeguard.store.calibrated import calibration_path, forget_calibration, read_calibration, write_calibration
from edgeguard.store.catalogue import (
    BareModel,
    Entry,
    Model,
    built_in_folder,
    cache_folder,
    check_files,
    digest,
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
from edgeguard.store.prefix_cache import PrefixCache
from edgeguard.store.tuned import Candidate, Setting, Tuned, read_tuned, tuned_path, write_tuned

__all__ = [
    "Artifact",
    "BareModel",
    "Candidate",
    "Differences",
    "Entry",
    "FileRecord",
    "Kind",
    "Manifest",
    "Model",
    "PrefixCache",
    "PrefixRecord",
    "Progress",
    "Setting",
    "Tuned",
    "built_in_folder",
    "cache_folder",
    "calibration_path",
    "check_files",
    "digest",
    "entry",
    "forget_calibration",
    "home",
    "locate",
    "models",
    "offline",
    "pull",
    "read_calibration",
    "read_tuned",
    "record",
    "records",
    "remove",
    "resolve",
    "scan",
    "sha256",
    "tuned_path",
    "verify",
    "write_calibration",
    "write_text",
    "write_tuned",
]
