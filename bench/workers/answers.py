"""What the workers of peers share; only the standard library, for the Python of any environment."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Clock:
    """Seconds of the work alone: what stands in `with clock.running():` counts, reading results between does not."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


class Row(Protocol):
    """Logits of one position, of whatever library."""

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401  a number of the library's own kind
        """The logit of a token."""


def unsafe_share(logits: Row, answers: Mapping[str, Sequence[int]]) -> float:
    """P(unsafe) between the two answers' first tokens, of one row of logits that takes an index. Raises ValueError for NaN."""
    rows = {name: [float(logits[i]) for i in ids] for name, ids in answers.items()}
    most = max(value for row in rows.values() for value in row)
    weights = {name: sum(math.exp(value - most) for value in row) for name, row in rows.items()}
    share = weights["unsafe"] / sum(weights.values())
    if math.isnan(share):
        raise ValueError("the logits are not numbers")
    return share


def size(path: str | Path, *endings: str) -> int:
    """Bytes of a file, or of the files of a folder that end so (all of them, if no ending is given)."""
    place = Path(path)
    files = [place] if place.is_file() else [each for each in place.iterdir() if each.is_file() and each.name.endswith(endings or ("",))]
    return sum(each.stat().st_size for each in files)


def versions(*packages: str) -> str:
    """`name 1.2, other 3.4`, as installed."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
