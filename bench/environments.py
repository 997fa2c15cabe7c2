"""Environments of other runtimes: which packages they need, and making them with venv and pip, on request alone.

Some peers cannot live with edgeguard or with each other (optimum-onnx holds transformers at 4.57, the builder of onnxruntime-genai
wants transformers 5), so each environment is a folder with a Python of its own. Those that agree share one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import StoreError
from edgeguard.store import offline, write_text

READY = "environment.json"
LAST_LINES = 5
Told = Callable[[str], object]
Run = Callable[[Sequence[str], Path], None]


@dataclass(frozen=True)
class Environment:
    """A Python with packages."""

    name: str
    requirements: tuple[str, ...]
    """For pip, as ranges; of edgeguard's own Python: its extras."""
    modules: tuple[str, ...]
    """Imports that must be there."""
    download: float
    """GB that pip brings at most, where nothing is in its cache."""
    disk: float
    """GB of the folder."""
    own: bool = False
    """The Python that runs edgeguard; nothing is made."""

    def python(self, folder: Path) -> Path:
        """The interpreter; `folder` holds all environments."""
        if self.own:
            return Path(sys.executable)
        return folder / self.name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def ready(self, folder: Path) -> bool:
        """It was made to its end, of these requirements, and its Python is still there."""
        if self.own:
            from importlib.util import find_spec

            return all(find_spec(module) is not None for module in self.modules)
        try:
            record = json.loads((folder / self.name / READY).read_text(encoding="utf-8"))
            return bool(record["requirements"] == list(self.requirements)) and self.python(folder).exists()
        except (OSError, ValueError, KeyError, TypeError):
            return False


OWN = Environment("own", ("edgeguard[bench,optimum]",), ("llama_cpp", "optimum.onnxruntime", "torch"), 0.0, 0.0, own=True)
GENAI = Environment(
    "genai",
    ("onnxruntime-genai>=0.18,<0.19", "openvino-genai>=2026.4,<2027", "transformers>=5,<6", "torch>=2.6,<2.14", "onnx>=1.18,<2",
     "onnx-ir>=0.1,<2", "psutil>=5.9,<8"),
    ("onnxruntime_genai", "openvino_genai", "transformers", "onnx_ir"), 3.0, 1.5)


def run(command: Sequence[str], log: Path) -> None:
    """Run to the end, output into `log`; raises `StoreError` with the last lines when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False).returncode  # noqa: S603  ours
    if status:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        raise StoreError(f"{Path(command[0]).name} failed with status {status}; all of its output is in {log}. "
                         f"It ended: {' / '.join(lines)}")


def make(environment: Environment, folder: Path, told: Told, execute: Run = run) -> None:
    """Make the environment, or nothing if it is ready; says beforehand what will be downloaded.

    A folder that an earlier try left behind goes first. Raises `StoreError` when the network is forbidden, there is no room or pip fails.
    """
    if environment.ready(folder):
        told(f"{environment.name}: ready")
        return
    if environment.own:
        raise StoreError("This Python lacks packages that peers need. Install them with: "
                         + " ".join(f'pip install "{each}"' for each in environment.requirements))
    if offline():
        raise StoreError(f"The environment {environment.name} needs downloads, and the network is forbidden "
                         "(EDGEGUARD_OFFLINE, HF_HUB_OFFLINE).")
    place = folder / environment.name
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 2 * environment.disk * 1e9:
        raise StoreError(f"The environment {environment.name} takes about {environment.disk:.1f} GB and as much while it is made; "
                         f"{folder} has {free / 1e9:.1f} GB free.")
    told(f"{environment.name}: pip will download {', '.join(environment.requirements)} and what they need, "
         f"up to {environment.download:.1f} GB, into {place}")
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True, symlinks=os.name != "nt")
    python = str(environment.python(folder))
    execute((python, "-m", "pip", "install", "--disable-pip-version-check", *environment.requirements), folder / f"{environment.name}.log")
    execute((python, "-c", "import " + ", ".join(environment.modules)), folder / f"{environment.name}.log")
    write_text(place / READY, json.dumps({"requirements": environment.requirements}) + "\n")
    told(f"{environment.name}: made")
