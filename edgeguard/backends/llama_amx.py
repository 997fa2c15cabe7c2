"""Whether llama.cpp's AMX code works as it was compiled here; if not, the whole process dies at its first product.

GCC 12.2 and older drop the stores of AMX's tile configuration (https://github.com/ggml-org/llama.cpp/pull/26954), and nothing in a
build tells which compiler made it. So another process tries it, once for each build; `python -m edgeguard.backends.llama_amx` is that one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeguard.backends.base import Run
from edgeguard.backends.llama_native import Batch, Session, build, library
from edgeguard.errors import StoreError
from edgeguard.store.catalogue import built_in_folder, cache_folder
from edgeguard.store.files import write_text

TOKENS, CONTEXT = 32, 256
SECONDS = 120
WORKS, DIES = "works\n", "dies\n"


def works(llama: Any) -> bool:  # noqa: ANN401, the untyped package
    """True where AMX is not used, or was tried by another process; a program without a Python of its own cannot try, so it goes without."""
    if "AMX_INT8 = 1" not in build(llama):
        return True
    kept = cache_folder() / "llama-amx" / _key(llama)
    try:
        if (said := kept.read_text(encoding="ascii")) in (WORKS, DIES):
            return said == WORKS
    except (OSError, ValueError):
        pass
    if getattr(sys, "frozen", False):
        return False
    status = _status()
    if status is not None:
        with suppress(OSError, StoreError):  # not kept, the next process tries again
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, DIES if status else WORKS)
    return status == 0


def _status() -> int | None:
    """Exit status of the process that tries; None when it could not say."""
    nowhere = subprocess.DEVNULL
    try:
        done = subprocess.run([sys.executable, "-m", __name__],  # noqa: S603, this Python and this file
                              stdin=nowhere, stdout=nowhere, stderr=nowhere, timeout=SECONDS, check=False)
        return done.returncode
    except (OSError, subprocess.TimeoutExpired):
        return None


def _key(llama: Any) -> str:  # noqa: ANN401
    """Of this build: what it says of itself, and the size and time of its files."""
    libraries = (Path(llama.__file__).parent / "lib").glob("*ggml*")
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in libraries)
    return hashlib.sha256(repr((build(llama), files)).encode()).hexdigest()[:32]


def main() -> None:
    """Evaluate a few tokens of the built-in model with every kernel that llama.cpp wants to use."""
    library()
    weights = built_in_folder() / "gguf" / "model.gguf"
    session = Session(weights, device=None, threads=1, context=CONTEXT, precision="q8_0")
    batch = Batch()
    for position in range(TOKENS):
        batch.owners[batch.add(position, position)].append(0)
    batch.ends.append(TOKENS - 1)
    session.decode(batch, Run())
    session.logits(TOKENS - 1)


if __name__ == "__main__":
    main()
