"""The independent export: optimum-onnx traces the checkpoint through transformers and shares no code with the guard graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from edgeguard.errors import ConversionError, RuntimeMissingError
from edgeguard.machine import no_telemetry
from edgeguard.store.files import Progress

TASK = "text-generation-with-past"
KEPT = ("model.onnx", "model.onnx_data", "config.json")


def export(source: Path, out: Path, progress: Progress | None = None) -> dict[str, int]:
    """Write model.onnx (and model.onnx_data) in float32 into `out`; returns how many tensors are stored in each type.

    The whole model is in memory meanwhile. Raises `RuntimeMissingError`, `ConversionError`.
    """
    try:
        no_telemetry()  # optimum imports ONNX Runtime
        from optimum.exporters.onnx import main_export
    except ImportError:
        raise RuntimeMissingError("optimum-onnx", "optimum") from None
    if progress:
        progress("optimum", 0, 1)
    folder = out / "export"
    try:
        with _silence():
            main_export(str(source), output=folder, task=TASK, dtype="fp32", library_name="transformers", no_post_process=True,
                        do_validation=False, local_files_only=True)
    except Exception as error:  # torch, transformers and optimum raise whatever they like
        raise ConversionError(f"optimum could not export {source}: {type(error).__name__}: {error}") from error
    for name in KEPT:
        if (folder / name).exists():
            (folder / name).rename(out / name)
    for rest in folder.iterdir():
        rest.unlink()
    folder.rmdir()
    if progress:
        progress("optimum", 1, 1)
    return _types(out / "model.onnx")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters print and warn about their own insides, to nobody's use."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _types(model: Path) -> dict[str, int]:
    """Counts of the stored tensors by type; small constants are not counted."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    names = (onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name for tensor in graph.initializer if len(tensor.dims) and
             max(tensor.dims) > 1)
    return dict(Counter(names))
