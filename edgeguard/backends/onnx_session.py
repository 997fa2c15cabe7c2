"""A session of ONNX Runtime: device, threads, right kernels, cancelling, and one place where its errors become ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends import fused, huge_pages
from edgeguard.backends.base import Run
from edgeguard.backends.kernels import FLOAT as FLOAT_KERNEL
from edgeguard.backends.kernels import QUANTISED, Kernel, libraries, tried
from edgeguard.backends.onnx_protobuf import FLOAT, OWN_DOMAIN, ExternalTensor, check_external, domains
from edgeguard.errors import DeviceError, EdgeGuardError, InferenceError, ModelFileError, ModelMemoryError, RuntimeMissingError
from edgeguard.machine import cpu, default_threads, no_telemetry, runtime_conflict, runtimes
from edgeguard.store.files import Unchanged

T = TypeVar("T")

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
CPU_ONLY = ("int8",)
"""Precisions whose kernels exist on the CPU only."""
POLL = 0.01  # seconds between two looks at a call's cancel token
SILENT = 4  # severity of ONNX Runtime's log: what goes wrong is raised
NO_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
BLOCK = 1 << 22  # numbers looked at together
TRIAL_THREADS = 2  # that kernels are tried with: two share a product otherwise than one


class Session:
    """A loaded model, on the device that was granted.

    `entries` are added to the session's configuration, `optimised` says that the model is one that ONNX Runtime has written,
    `written` is where it shall write it. Unless the files are `checked` by their hashes, scales are looked through. A guard graph
    whose weights come from memory may be multiplied by kernels of our `own`, where there are some; `plain`: nothing of our own is used.
    `loading` can stop the loading. Raises `CancelledError` then, `RuntimeMissingError`, `DeviceError` (a device asked for by name
    is not there), `ModelFileError`, `ModelMemoryError`, and `InferenceError` when this CPU's 8-bit kernels do not multiply exactly.
    """

    def __init__(self, model: Path, precision: str, device: str, threads: int | None, *,
                 entries: Mapping[str, str] | None = None, optimised: bool = False, written: Path | None = None,
                 checked: bool = False, own: bool = False, plain: bool = False, loading: Run | None = None) -> None:
        ort = _onnxruntime()
        tensors = check_external(model)
        if precision in QUANTISED and not checked:
            _check_finite(model, tensors)
        self.runtime = f"onnxruntime {ort.__version__}"
        self.build = build()
        self.threads = threads or default_threads()
        self._run_options = ort.RunOptions
        chosen = _devices(device, precision, ort.get_available_providers())
        self.kernel = _kernel(model, precision, entries or {}, own=own, plain=plain) if "cpu" in chosen else FLOAT_KERNEL
        """Of the CPU; the one for floats on other devices."""
        loading = loading or Run()
        # on other devices the runtime's kernels do what is left for the CPU: a library's operators would be taken instead of the device's
        elsewhere = replace(self.kernel, library=None, fused=None)
        options = {each: _options(ort, self.threads, self.kernel if each == "cpu" else elsewhere, entries or {}) for each in chosen}
        for each in options.values():
            if optimised:
                each.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            if written:
                each.optimized_model_filepath = str(written)
        before = huge_pages.regions()
        self._files = Unchanged({model, *(model.parent / tensor.location for tensor in tensors)})
        self.device, self._session = _stoppable(lambda: _granted(ort, model, options, loading), loading,
                                                lambda: [each.set_load_cancellation_flag(True) for each in options.values()])
        if self.device == "cpu":
            huge_pages.gather(before)
        else:
            self.kernel = FLOAT_KERNEL
        lost = [f"the {self.device}: {each} was not granted" for each in chosen[: chosen.index(self.device)]]
        self.fallbacks = (*lost, *self.kernel.fallbacks)
        """What was wanted first and was not to be had."""
        self.types: dict[str, str] = {each.name: each.type for each in self._session.get_inputs()}
        """Names of the inputs and their types, as `tensor(float)`."""
        self.shapes: dict[str, list[int | str]] = {each.name: each.shape for each in self._session.get_inputs()}
        """Their sizes, a free one by its name."""
        self.outputs: list[str] = [each.name for each in self._session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], run: Run) -> list[NDArray[Any]]:
        """The named outputs; raises `CancelledError`, `DeadlineError`, `InferenceError`, `ModelFileError` (its files were written to)."""
        run.check()
        self._files.check()
        options = self._run_options()
        options.log_severity_level = SILENT
        with _translated(run):
            found = _stoppable(lambda: list(self._session.run(list(outputs), dict(feeds), options)), run,
                               partial(setattr, options, "terminate", True))
        self._files.check()  # their pages are read during the pass
        return found


def build() -> str:
    """ONNX Runtime's version and how it was built, and which operator libraries of our own there are."""
    ort = _onnxruntime()
    return f"onnxruntime {ort.__version__}; {ort.get_build_info()}; operators {libraries()}"


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


def _granted(ort: Any, model: Path, options: Mapping[str, Any], run: Run) -> tuple[str, Any]:  # noqa: ANN401
    """The first device that is granted, and the session on it; raises `DeviceError` when the last one is not."""
    devices = list(options)
    for device in devices:
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        providers = list(dict.fromkeys([PROVIDERS[device], PROVIDERS["cpu"]]))
        try:
            with _translated(run, loading=model):
                session = ort.InferenceSession(str(model), options[device], providers=providers)
        except (ModelFileError, ModelMemoryError):
            if device == devices[-1]:
                raise
            continue
        if PROVIDERS[device] in session.get_providers():
            return device, session
    conflict = runtime_conflict(runtimes()) or "Its driver or libraries are missing or of another version."
    raise DeviceError(f"The device {devices[-1]!r} was asked for and not granted. {conflict}")


def _options(ort: Any, threads: int, kernel: Kernel, entries: Mapping[str, str]) -> Any:  # noqa: ANN401
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = SILENT
    # a pass of the mini has hundreds of operators of microseconds: sleeping between them costs a quarter of its time;
    # between two passes threads sleep, for the sake of other processes
    spinning = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}
    for key, value in {**spinning, **kernel.entries, **entries}.items():
        options.add_session_config_entry(key, value)
    for library in filter(None, (kernel.library, kernel.fused)):
        options.register_custom_ops_library(str(library))
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


def _kernel(model: Path, precision: str, entries: Mapping[str, str], *, own: bool, plain: bool) -> Kernel:
    """What is right for this model on this CPU."""
    found = tried(cpu(), precision, partial(_multiplied, entries), own=own)
    if plain or OWN_DOMAIN not in domains(model):
        return found
    library, lost = fused.tried(cpu(), partial(_computed, entries))
    name = f"{found.name}, fused" if library else found.name
    return replace(found, name=name, fused=library, fallbacks=tuple(dict.fromkeys([*found.fallbacks, *lost])))


def _multiplied(entries: Mapping[str, str], trial: bytes, kernel: Kernel, activations: NDArray[Any]) -> NDArray[np.float32]:
    return _computed(entries, trial, kernel, {"a": activations})["y"]


def _computed(entries: Mapping[str, str], trial: bytes, kernel: Kernel, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Runs the tiny models that kernels are tried with, in the configuration that the session will have."""
    ort = _onnxruntime()
    with _translated():
        session = ort.InferenceSession(trial, _options(ort, TRIAL_THREADS, kernel, entries), providers=[PROVIDERS["cpu"]])
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(given)), strict=True))


def _stoppable(call: Callable[[], T], run: Run, stop: Callable[[], object]) -> T:
    """The result of a call of the runtime, which `stop` ends between two operators, or two weights: when `run` is stopped, or by Ctrl-C.

    Python sees Ctrl-C between its own steps only, so the call has a thread of its own, and this one looks at the cancel token.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name=f"{threading.current_thread().name}-call", daemon=True).start()
    try:
        while not wait([outcome], POLL).done:
            if run.stopped:
                stop()
    finally:
        if not outcome.done():  # after Ctrl-C
            stop()
            wait([outcome])
    return outcome.result()


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
            raise ModelMemoryError(f"ONNX Runtime ran out of memory; free some, or take a smaller precision. It said: {error}") from error
        if loading is not None:
            raise ModelFileError(f"ONNX Runtime cannot load {loading}: {error}") from error
        raise InferenceError(f"ONNX Runtime failed: {error}") from error
