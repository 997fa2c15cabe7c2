"""What `edgeguard calibrate` fitted on a user's own rows, for one model and profile.

It is the user's decision: unlike what `tune` measured it cannot be made again, and a record that is damaged is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from edgeguard import strict_json
from edgeguard.calibration import Calibration
from edgeguard.errors import StoreError
from edgeguard.store.catalogue import home
from edgeguard.store.files import locked, write_text

FORMAT = 1
MAX_BYTES = 1 << 16


def calibration_path(model: str, profile: str) -> Path:
    """Where the record of a model lies, by its digest and the profile that it is judged with."""
    return home() / ".config" / "calibrated" / f"{model}.{profile}.json"


def read_calibration(model: str, profile: str) -> Calibration | None:
    """The user's for this model and profile, if there is one; raises `StoreError` for one that cannot be read.

    None as well for a model without a digest, for which none can be stored.
    """
    path = calibration_path(model, profile)
    try:
        if not model or not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError("it is no small file")
        data = strict_json.loads(path.read_text(encoding="utf-8"))
        if data != {**_key(model, profile), "calibration": data["calibration"]}:
            raise ValueError("it is another model's, or of another format")
        return Calibration.from_dict(data["calibration"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise StoreError(
            f"The calibration {path} cannot be read ({reason}), so it is not known which scores are meant. Run edgeguard calibrate "
            "again, or with --forget."
        ) from error


def any_calibration() -> bool:
    """Whether there is one of any model."""
    return any((home() / ".config" / "calibrated").glob("*.json"))


def check_calibrations() -> None:
    """Raises `StoreError` where none could be written."""
    with _changing(calibration_path("", "")):
        pass


def write_calibration(model: str, profile: str, calibration: Calibration) -> Path:
    """Keep it in place of any other of this model and profile; raises `StoreError`."""
    path = calibration_path(model, profile)
    data = {**_key(model, profile), "calibration": asdict(calibration)}
    with _changing(path):
        return write_text(path, json.dumps(data, indent=1) + "\n")


def forget_calibration(model: str, profile: str) -> bool:
    """Remove it, readable or not; False when there is none. Raises `StoreError`."""
    path = calibration_path(model, profile)
    with _changing(path):
        found = path.exists()
        path.unlink(missing_ok=True)
    return found


def _key(model: str, profile: str) -> dict[str, object]:
    return {"format": FORMAT, "model": model, "profile": profile}


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    try:
        with locked(path.parent / ".lock", what="the calibrations"):
            yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}. Set EDGEGUARD_HOME.") from error
