"""llama.cpp itself: the library silenced, its devices, and one loaded model with its context. Knows no nodes."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends import huge_pages
from edgeguard.backends.base import FloatArray, Run
from edgeguard.errors import DeviceError, InferenceError, ModelFileError, ModelMemoryError, RuntimeMissingError
from edgeguard.store.files import Unchanged

SEQUENCES = 64
"""Sequences in the cache at once; each costs room for one row of logits."""
CHUNK = 256
"""Tokens that llama.cpp computes at once; a longer pass is cut into these."""
CELL_STEP = 256
"""llama.cpp rounds the cache up to this many cells."""
POLL = 0.005
"""Seconds between two looks at the cancel token."""
LANES = 16
"""Most numbers that a CPU adds side by side; see `Session.lay_out`."""
ROWS = 8
"""Tokens that kernels take together; what is left over goes another way and is rounded otherwise, so none is left over."""
MARGIN = 512
"""Cells beyond the longest sequence, for the gaps that `lay_out` leaves."""
HOLD, SPARE = 2 * SEQUENCES, 2 * SEQUENCES + 1
"""Sequence ids for cells that are taken while a pass is laid out; `SEQUENCES` + i holds the gaps around sequence i."""
ALL_LAYERS = 9999
KV_TYPES = {"f32": 0}
"""ggml type of the cache for a weight type: float32 costs nothing where the weights are float32, else float16 (1) halves it."""

# device asked for -> names of ggml's backends that are it
DEVICES = {"cuda": ("cuda",), "metal": ("metal", "mtl"), "vulkan": ("vulkan",), "rocm": ("rocm", "hip"), "sycl": ("sycl",)}
GPU_TYPES = (1, 2)  # ggml_backend_dev_type: a card of its own, or one that shares the machine's memory
LOG_ERROR = 4


@dataclass
class Batch:
    """Tokens of one pass. A token that belongs to several sequences stands there once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[list[int]] = field(default_factory=list)
    """Sequence ids of each token."""
    ends: list[int] = field(default_factory=list)
    """Places whose logits are asked for."""
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    """Neighbouring tokens that one entry brought: its sequence id, the position of the first, how many."""

    @property
    def cells(self) -> int:
        """Cells that the pass takes with the gaps around its runs."""
        return sum(blocks(start, length) for _, start, length in self.runs) * LANES

    def add(self, token: int, position: int) -> int:
        """A new token, yet without owners; gives its place."""
        self.tokens.append(token)
        self.positions.append(position)
        self.owners.append([])
        return len(self.tokens) - 1


def blocks(start: int, length: int) -> int:
    """Blocks of LANES positions that a run of tokens touches."""
    return (start + length - 1) // LANES - start // LANES + 1


class Session:
    """A loaded model with its context: the only place that calls llama.cpp."""

    def __init__(self, path: Path, *, device: int | None, threads: int, context: int, precision: str, repack: bool = True) -> None:
        llama = library()
        self._llama, self.threads = llama, threads
        errors.clear()
        self._file = Unchanged([path])
        model = _load(llama, path, device, repack)
        self.cells = -(-(context + MARGIN) // CELL_STEP) * CELL_STEP
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = self.cells
        params.n_ubatch = min(CHUNK, self.cells)
        params.n_seq_max = params.n_outputs_max = 2 * SEQUENCES + 2
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.type_k = params.type_v = KV_TYPES.get(precision, 1)
        params.offload_kqv = params.op_offload = device is not None
        params.no_perf = True
        params.flash_attn_type = 0  # rounds sums to float16 on CPUs: 0.01 of difference where this has 0.00001
        context_pointer = llama.llama_init_from_model(model, params)
        if not context_pointer:
            llama.llama_model_free(model)
            raise ModelMemoryError(f"llama.cpp has no room for {self.cells} tokens of context{told()}. Ask for less context.")
        self._context, self._memory = context_pointer, llama.llama_get_memory(context_pointer)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._worker = ThreadPoolExecutor(1, "edgeguard-llama")
        self._process = os.getpid()
        # a native callback: one in Python would wait for the interpreter's lock at every operation of the graph
        self._stop = ctypes.create_string_buffer(2)
        self._strlen = llama.ggml_abort_callback(ctypes.cast(_libc().strlen, ctypes.c_void_p).value)
        llama.llama_set_abort_callback(context_pointer, self._strlen, ctypes.addressof(self._stop))
        self.close = weakref.finalize(self, _free, llama, (model, context_pointer), self._worker, self._process, self._file)
        # copying cells to other devices is slow, and they add in another order
        self._filler = self._make_filler() if device is None else None

    def copy(self, source: int, target: int) -> None:
        """Give one sequence the cells of another."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget(self, sequence: int) -> None:
        """Take a sequence and the gaps around its tokens out of the cache."""
        if self.close.alive:
            self._remove(sequence, SEQUENCES + sequence)

    def lay_out(self, batch: Batch) -> bool:
        """Take cells so that the next pass puts every token into one that equals its position modulo LANES.

        llama.cpp fills the lowest free cells. A CPU adds up attention in lanes of neighbouring cells, so where a token lies
        decides how sums are rounded, and quantised activations make large differences of that. With this order a token's
        result does not depend on what else is in the cache, as long as it lies behind its ancestors, which only an older
        root that was closed before them can change. Gaps are filled with cells that no token looks at, copied from a state:
        nothing is computed. False when there is no room; then nothing has changed.
        """
        self._check_alive()
        if self._filler is None:
            return True
        for owner, start, length in batch.runs:
            lead, end, last = start % LANES, (start + length) % LANES, blocks(start, length) - 1
            for block in range(last + 1):
                if not self._llama.llama_state_seq_set_data(self._context, self._filler, len(self._filler), SPARE):
                    self._remove(SPARE, HOLD, *(SEQUENCES + taken for taken, _, _ in batch.runs))
                    return False
                self.copy(SPARE, HOLD)
                if block == 0 and lead:
                    self._llama.llama_memory_seq_cp(self._memory, SPARE, SEQUENCES + owner, 0, lead)
                if block == last and end:
                    self._llama.llama_memory_seq_cp(self._memory, SPARE, SEQUENCES + owner, end, LANES)
        self._remove(SPARE, HOLD)
        return True

    def _make_filler(self) -> Any:  # noqa: ANN401, a ctypes array
        """State of LANES cells, for `lay_out`."""
        batch = Batch(owners=[[HOLD]] * LANES, tokens=[0] * LANES, positions=list(range(LANES)))
        if not self.decode(batch, Run()):
            raise InferenceError(f"llama.cpp finds no room in an empty cache{told()}.")
        return self._taken_out(HOLD)

    def _taken_out(self, sequence: int) -> Any:  # noqa: ANN401, a ctypes array
        """The state of a sequence, which then leaves the cache."""
        size = self._llama.llama_state_seq_get_size(self._context, sequence)
        state = (ctypes.c_uint8 * size)()
        self._llama.llama_state_seq_get_data(self._context, state, size, sequence)
        self._remove(sequence)
        return state

    def save(self, sequence: int, length: int) -> list[NDArray[np.uint8]]:
        """The cells of a root of `length` tokens, in the pieces that `restore` takes."""
        pieces = []
        for start, stop in self._pieces(length):
            self._llama.llama_memory_seq_cp(self._memory, sequence, SPARE, start, stop)
            pieces.append(np.frombuffer(self._taken_out(SPARE), np.uint8))
        return pieces

    def restore(self, sequence: int, length: int, pieces: Sequence[NDArray[np.uint8]]) -> bool:
        """Put a root back into the cells that evaluating it would take; False when it does not fit: then nothing has changed.

        One block of LANES after another, each into the lowest free cells, of which `lay_out` has left exactly these.
        """
        spans = self._pieces(length)
        if len(pieces) != len(spans) or not self.lay_out(Batch(runs=[(sequence, 0, length)])):
            return False
        for (start, stop), piece in zip(spans, pieces, strict=True):
            pointer = piece.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            read = self._llama.llama_state_seq_set_data(self._context, pointer, len(piece), SPARE)
            held = [bound(self._memory, SPARE) for bound in (self._llama.llama_memory_seq_pos_min, self._llama.llama_memory_seq_pos_max)]
            if read != len(piece) or held != [start, stop - 1]:
                self._remove(SPARE)
                self.forget(sequence)
                return False
            self.copy(SPARE, sequence)
        self._remove(SPARE)
        return True

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """First position and end of each part of a saved root; whole where cells are not laid out."""
        step = length if self._filler is None else LANES
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def _check_alive(self) -> None:
        if not self.close.alive or os.getpid() != self._process:
            raise InferenceError("The model was shut down, or this process was forked after it was loaded. Load it again.")

    def _remove(self, *sequences: int) -> None:
        for sequence in sequences:
            self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def decode(self, batch: Batch, run: Run) -> bool:
        """Evaluate; False when the cache has no room, and then nothing has changed.

        Waits in this thread while a worker computes, so that a cancel token, a deadline and Ctrl-C are all seen.
        """
        run.check()
        self._check_alive()
        self._file.check()
        errors.clear()
        native, _arrays = _native(self._llama, batch)
        self._stop[0] = b"\0"
        job = self._worker.submit(self._llama.llama_decode, self._context, native)
        try:
            while not wait_for([job], POLL).done:
                if run.stopped:
                    self._stop[0] = b"\1"
        except BaseException:
            self._stop[0] = b"\1"
            wait_for([job])
            raise
        finally:
            self._remove(SPARE)
        code = job.result()
        if code == 2:
            run.check()
        if code not in (0, 1):
            raise InferenceError(f"llama.cpp failed with status {code}{told()}.")
        self._file.check()  # what is not repacked is read during the pass
        return bool(code == 0)

    def logits(self, place: int) -> FloatArray:
        """A copy of the row (vocab,) after the token at `place` of the last batch."""
        pointer = self._llama.llama_get_logits_ith(self._context, place)
        if not pointer:
            raise InferenceError(f"llama.cpp gave no logits{told()}.")
        row: FloatArray = np.ctypeslib.as_array(pointer, (self._vocab,)).copy()
        if not np.isfinite(row).all():
            raise InferenceError("The model gave logits that are not finite; its weights are damaged.")
        return row


def _free(llama: Any, pointers: tuple[Any, Any], worker: ThreadPoolExecutor, process: int, file: Unchanged) -> None:  # noqa: ANN401
    """End a session; in a forked child its threads are gone and nothing may be touched."""
    if os.getpid() == process:
        model, context = pointers
        worker.shutdown()
        llama.llama_free(context)
        llama.llama_model_free(model)
        file.close()


def _load(llama: Any, path: Path, device: int | None, repack: bool) -> Any:  # noqa: ANN401, a ctypes pointer
    params = llama.llama_model_default_params()
    params.use_extra_bufts = repack
    devices = (ctypes.c_void_p * 2)(device, None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = 0 if device is None else ALL_LAYERS
    before = huge_pages.regions()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        if any("alloc" in line for line in errors):
            raise ModelMemoryError(f"{path} does not fit into memory{told()}.")
        raise ModelFileError(f"llama.cpp cannot load {path}{told()}.")
    if device is None:
        huge_pages.gather(before)
    return model


def _native(llama: Any, batch: Batch) -> tuple[Any, list[NDArray[Any]]]:  # noqa: ANN401, a ctypes structure
    """llama_batch over NumPy arrays, which have to live as long as it is used; filled up to whole ROWS with spare tokens."""
    spare = -len(batch.tokens) % ROWS
    owners = batch.owners + [[SPARE]] * spare
    counts = np.array([len(own) for own in owners], np.int32)
    flat = np.array([sequence for own in owners for sequence in own], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.uint64)
    pointers = np.uint64(flat.ctypes.data) + starts * np.uint64(flat.itemsize)
    tokens = np.array(batch.tokens + [0] * spare, np.int32)
    positions = np.array(batch.positions + list(range(spare)), np.int32)
    arrays = [tokens, positions, counts, pointers, _wanted(len(tokens), batch.ends), flat]
    kinds = dict(llama.llama_batch._fields_)
    names = ("token", "pos", "n_seq_id", "seq_id", "logits")
    fields = {name: ctypes.cast(values.ctypes.data, kinds[name]) for name, values in zip(names, arrays, strict=False)}
    return llama.llama_batch(n_tokens=len(tokens), **fields), arrays


def _wanted(tokens: int, ends: Sequence[int]) -> NDArray[np.int8]:
    """1 for each token whose logits are computed: those asked for, and in each chunk others up to whole ROWS."""
    wanted = np.zeros(tokens, np.int8)
    wanted[np.array(ends, np.int64)] = 1
    for start in range(0, tokens, CHUNK):
        chunk = wanted[start:start + CHUNK]
        chunk[np.flatnonzero(chunk == 0)[:-int(chunk.sum()) % ROWS]] = 1
    return wanted


errors: deque[str] = deque(maxlen=4)
"""The last error lines of llama.cpp, for the messages of exceptions."""
_callbacks: list[Any] = []  # what native code was given must never be freed


def told() -> str:
    """What llama.cpp said of the failure, as a part of a sentence."""
    return f" ({'; '.join(errors)})" if errors else ""


def library() -> Any:  # noqa: ANN401, the untyped package
    """llama_cpp, silenced; raises `RuntimeMissingError`."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise RuntimeMissingError("llama-cpp-python", "llama") from None
    except (ImportError, OSError, RuntimeError) as error:  # its native library
        raise RuntimeMissingError("llama-cpp-python", "llama", str(error)) from error
    if not _callbacks:
        def keep(level: int, text: bytes, _: object) -> None:
            if level == LOG_ERROR:
                errors.append(text.decode("utf-8", "replace").strip())

        _callbacks.append(llama_cpp.llama_log_callback(keep))
        llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_callbacks[0], None)
    return llama_cpp


def build(llama: Any) -> str:  # noqa: ANN401
    """The package's version and what the library was built for and found on this processor."""
    return f"llama-cpp-python {llama.__version__}; {llama.llama_print_system_info().decode('utf-8', 'replace').strip()}"


def _libc() -> Any:  # noqa: ANN401, a ctypes library
    return ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)


def devices(llama: Any) -> dict[str, int]:  # noqa: ANN401
    """GPUs by the name of ggml's backend in lower case, as ggml lists them; handles that llama.cpp takes."""
    if not llama.llama_supports_gpu_offload():
        return {}
    from llama_cpp import _ctypes_extensions, _ggml

    libraries = [_ggml.libggml, _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)]

    def call(name: str, result: type, *arguments: object) -> Any:  # noqa: ANN401, what `result` says
        function = next(getattr(one, name) for one in libraries if hasattr(one, name))
        function.restype = result
        return function(*arguments)

    found: dict[str, int] = {}
    for index in range(call("ggml_backend_dev_count", ctypes.c_size_t)):
        device = ctypes.c_void_p(call("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t(index)))
        if call("ggml_backend_dev_type", ctypes.c_int, device) in GPU_TYPES:
            registry = ctypes.c_void_p(call("ggml_backend_dev_backend_reg", ctypes.c_void_p, device))
            name = call("ggml_backend_reg_name", ctypes.c_char_p, registry).decode().lower()
            found.setdefault(name, device.value or 0)
    return found


def choose_device(asked: str, found: dict[str, int]) -> tuple[str, int | None]:
    """The name and handle of the device; only `auto` falls back."""
    there = {name: found[alias] for name, aliases in DEVICES.items() for alias in aliases if alias in found}
    if asked == "auto":
        return next(iter(there.items()), ("cpu", None))
    if asked == "cpu":
        return "cpu", None
    if asked not in there:
        raise DeviceError(f"llama.cpp has no device {asked!r} here, only {['cpu', *there]}. llama-cpp-python is built for one kind "
                          "of device; another build of it may be needed.")
    return asked, there[asked]
