"""A session of ONNX Runtime: device, threads, exact 8-bit kernels, cancelling, and one place where its errors become ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.base import Run
from edgeguard.backends.onnx_protobuf import FLOAT, ExternalTensor, check_external, int8_product
from edgeguard.errors import DeviceError, EdgeGuardError, InferenceError, ModelFileError, ModelMemoryError, RuntimeMissingError
from edgeguard.machine import default_threads, no_telemetry, runtime_conflict, runtimes

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
CPU_ONLY = ("int8",)
"""Precisions whose kernels exist on the CPU only."""
QUANTISED = ("int8", "int4")
POLL = 0.01  # seconds between two looks at a call's cancel token
SILENT, ERRORS = 4, 3  # severities of ONNX Runtime's log
NO_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
BLOCK = 1 << 22  # numbers looked at together
PRECISE = {"session.x64quantprecision": "1"}
"""Makes kernels of CPUs without VNNI keep their intermediate sums apart, which otherwise saturate."""


class Session:
    """A loaded model, on the device that was granted.

    Raises `RuntimeMissingError`, `DeviceError` (a device asked for by name is not there), `ModelFileError`,
    `ModelMemoryError`, and `InferenceError` when this CPU's 8-bit kernels do not multiply exactly.
    """

    def __init__(self, model: Path, precision: str, device: str, threads: int | None) -> None:
        ort = _onnxruntime()
        tensors = check_external(model)
        if precision in QUANTISED:
            _check_finite(model, tensors)
        self.runtime = f"onnxruntime {ort.__version__}"
        self.threads = threads or default_threads()
        self._run_options = ort.RunOptions
        chosen = _devices(device, precision, ort.get_available_providers())
        entries = _exact_int8() if precision in QUANTISED and "cpu" in chosen else {}
        self.device, self._session = _granted(ort, model, chosen, _options(ort, self.threads, entries))
        self.types: dict[str, str] = {each.name: each.type for each in self._session.get_inputs()}
        """Names of the inputs and their types, as `tensor(float)`."""
        self.outputs: list[str] = [each.name for each in self._session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], run: Run) -> list[NDArray[Any]]:
        """The named outputs; raises `CancelledError`, `DeadlineError`, `InferenceError`."""
        run.check()
        options = self._run_options()
        options.log_severity_level = SILENT
        with _translated(run), _watched(run, options):
            return list(self._session.run(list(outputs), dict(feeds), options))


def _onnxruntime() -> Any:  # noqa: ANN401  a module without types
    no_telemetry()
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise RuntimeMissingError("ONNX Runtime", "cpu") from error
    except ImportError as error:
        raise RuntimeMissingError("ONNX Runtime", "cpu", str(error)) from error
    if hasattr(ort, "disable_telemetry_events"):
        ort.disable_telemetry_events()
    return ort


def _devices(device: str, precision: str, available: Sequence[str]) -> list[str]:
    """Devices to try, in order; more than one for `auto` only. Raises `DeviceError` for one that cannot be had."""
    there = [name for name, provider in PROVIDERS.items() if provider in available]
    if device == "auto":
        return [name for name in ("cuda", "cpu") if name in there and not (name != "cpu" and precision in CPU_ONLY)]
    if device not in there:
        conflict = runtime_conflict(runtimes())
        advice = 'Install it with: pip install "edgeguard[cuda]"' if device == "cuda" else "Choose one of these, or auto."
        raise DeviceError(f"The device {device!r} was asked for; ONNX Runtime offers {', '.join(there)}. {conflict or advice}")
    if device != "cpu" and precision in CPU_ONLY:
        raise DeviceError(f"{precision} artifacts run on the cpu only, not on {device}; take an fp16 or int4 artifact there.")
    return [device]


def _granted(ort: Any, model: Path, devices: Sequence[str], options: Any) -> tuple[str, Any]:  # noqa: ANN401
    """The first device that is granted, and the session on it; raises `DeviceError` when the last one is not."""
    for device in devices:
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        providers = list(dict.fromkeys([PROVIDERS[device], PROVIDERS["cpu"]]))
        try:
            with _translated(loading=model):
                session = ort.InferenceSession(str(model), options, providers=providers)
        except (ModelFileError, ModelMemoryError):
            if device == devices[-1]:
                raise
            continue
        if PROVIDERS[device] in session.get_providers():
            return device, session
    conflict = runtime_conflict(runtimes()) or "Its driver or libraries are missing or of another version."
    raise DeviceError(f"The device {devices[-1]!r} was asked for and not granted. {conflict}")


def _options(ort: Any, threads: int, entries: Mapping[str, str]) -> Any:  # noqa: ANN401
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = ERRORS
    # waiting threads that spin gain nothing measurable here and take the cores from other processes
    for key, value in {"session.intra_op.allow_spinning": "0", **entries}.items():
        options.add_session_config_entry(key, value)
    return options


def _check_finite(model: Path, tensors: Sequence[ExternalTensor]) -> None:
    """Refuse norms and scales that are not finite: quantising activations would turn a NaN into an ordinary number."""
    for tensor in tensors:
        if tensor.type != FLOAT:
            continue
        try:
            count = -1 if tensor.length is None else tensor.length // 4
            shape = None if count < 0 else (count,)
            values = np.memmap(model.parent / tensor.location, "<f4", "r", tensor.offset, shape)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{tensor.name} does not fit into {tensor.location}; the file is damaged or cut off.") from error
        if not all(np.isfinite(values[start : start + BLOCK]).all() for start in range(0, len(values), BLOCK)):
            raise ModelFileError(f"{tensor.name} in {model.parent / tensor.location} is damaged: not all its numbers are finite.")


def _exact_int8() -> Mapping[str, str]:
    """The session entries with which this CPU's 8-bit products are exact: none, if it can; raises `InferenceError`."""
    entries: Mapping[str, str]
    for entries in ({}, PRECISE):
        if is_exact(entries):
            return entries
    raise InferenceError("The 8-bit kernels of this CPU saturate and give wrong sums; take an fp32 artifact or a GGUF.")


def is_exact(entries: Mapping[str, str]) -> bool:
    """Try the 8-bit kernels on the largest numbers there are, one token and many: no product may saturate."""
    ort = _onnxruntime()
    weights = np.empty((576, 64), np.int8)
    weights[:, ::3], weights[:, 1::3], weights[:, 2::3] = 127, -128, 1
    weights[1::2, 2::3] = -128
    activations = np.full((48, 576), 255, np.uint8)
    activations[1::3], activations[2::3, ::2] = 0, 0
    with _translated():
        session = ort.InferenceSession(int8_product(weights), _options(ort, 1, entries), providers=[PROVIDERS["cpu"]])
        found = [session.run(None, {"a": activations[:tokens]})[0] for tokens in (1, len(activations))]
    wanted = (activations.astype(np.int64) - 128) @ weights.astype(np.int64)
    return all(np.array_equal(product, wanted[: len(product)]) for product in found)


@contextmanager
def _watched(run: Run, options: Any) -> Iterator[None]:  # noqa: ANN401
    """While the runtime works, look at the cancel token and stop it between two operators."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL):
            if run.stopped:
                options.terminate = True
                return

    thread = threading.Thread(target=watch, name="edgeguard-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _translated(run: Run | None = None, loading: Path | None = None) -> Iterator[None]:
    """The one place where ONNX Runtime's errors, which share no base class, become edgeguard's."""
    try:
        yield
    except EdgeGuardError:
        raise
    except Exception as error:
        if run is not None:
            run.check()
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY):
            raise ModelMemoryError(f"ONNX Runtime ran out of memory: {error}") from error
        if loading is not None:
            raise ModelFileError(f"ONNX Runtime cannot load {loading}: {error}") from error
        raise InferenceError(f"ONNX Runtime failed: {error}") from error
