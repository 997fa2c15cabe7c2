"""Our own AMX kernel gives the bits of ONNX Runtime's, for every shape, and refuses what it is not made for."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeguard.backends import kernels
from edgeguard.backends.kernels import Kernel, kernel, own_kernel
from edgeguard.machine import cpu

RUNTIMES = kernel(cpu(), "int8")
MINE = own_kernel(RUNTIMES)
pytestmark = pytest.mark.skipif(MINE is None, reason="this processor has no AMX, or edgeguard was installed without a compiler")


def test_it_is_built_of_the_file_that_is_here() -> None:
    """An installation that does not compile leaves an older library where it was."""
    assert MINE is not None and MINE.library is not None
    source = Path(kernels.__file__).with_name("amx.c")
    assert MINE.library.stat().st_mtime >= source.stat().st_mtime, "install edgeguard again"


def product(weights: NDArray[np.int8], scales: NDArray[np.float32], *, zero_point: int = 128, constant: bool = True,
            step: float | NDArray[np.float32] = 0.37) -> bytes:
    """A model of one product."""
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "step", "scales", "zero"], ["y"], domain="com.microsoft")
    kept = {"b": weights, "step": np.float32(step), "scales": scales, "zero": np.uint8(zero_point)}
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, None)]
    if not constant:
        inputs.append(helper.make_tensor_value_info("b", TensorProto.INT8, list(kept.pop("b").shape)))
    graph = helper.make_graph([node], "product", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(np.asarray(value), name) for name, value in kept.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 9
    return bytes(model.SerializeToString())


def session(model: bytes, by: Kernel | None, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if by is not None:
        options.register_custom_ops_library(str(by.library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def drawn(seed: int, depth: int, columns: int, *sizes: int) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    return weights, rng.standard_normal(columns).astype(np.float32), rng.integers(0, 256, (*sizes, depth)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 300), st.integers(1, 200))
def test_the_bits_are_those_of_the_runtime(seed: int, depth: int, columns: int, tokens: int) -> None:
    weights, scales, a = drawn(seed, depth, columns, tokens)
    model = product(weights, scales)
    wanted, found = (session(model, by).run(None, {"a": a})[0] for by in (None, MINE))
    assert found.dtype == np.float32 and np.array_equal(wanted, found)


@pytest.mark.parametrize(("depth", "columns", "sizes"), [
    (14336, 48, (74, 2)), (4096, 4096, (77,)), (9000, 40, (300,)), (4097, 1025, (1,)), (64, 16, (0,)), (4160, 32, (2, 3, 5)),
])
def test_long_rows_many_tokens_and_further_sizes(depth: int, columns: int, sizes: tuple[int, ...]) -> None:
    weights, scales, a = drawn(7, depth, columns, *sizes)
    sums = (a.astype(np.int64) - 128) @ weights.astype(np.int64)
    wanted = sums.astype(np.float32) * (np.float32(0.37) * scales)
    found = session(product(weights, scales), MINE).run(None, {"a": a})[0]
    assert found.shape == (*sizes, columns) and np.array_equal(found, wanted)


def test_the_largest_numbers_do_not_saturate() -> None:
    """The deepest sums of an 8B model, 14,336 products of 255 - 128 and -128."""
    weights, scales = np.full((14336, 16), -128, np.int8), np.ones(16, np.float32)
    for byte in (0, 255):
        found = session(product(weights, scales), MINE).run(None, {"a": np.full((3, 14336), byte, np.uint8)})[0]
        assert (found == np.float32((byte - 128) * -128 * 14336) * np.float32(0.37)).all()


def test_sessions_and_threads_do_not_disturb_each_other() -> None:
    weights, scales, a = drawn(3, 640, 512, 90)
    shared = session(product(weights, scales), MINE, threads=3)
    wanted = shared.run(None, {"a": a})[0]
    wrong: list[int] = []

    def work(place: int) -> None:
        own_session = shared if place % 2 else session(product(weights, scales), MINE, threads=1)
        wrong.extend(place for _ in range(20) if not np.array_equal(own_session.run(None, {"a": a})[0], wanted))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))  # raises what a thread raised
    assert not wrong


def test_a_session_may_end_before_another() -> None:
    weights, scales, a = drawn(5, 256, 64, 20)
    model = product(weights, scales)
    sessions = [session(model, MINE) for _ in range(3)]
    wanted = sessions[0].run(None, {"a": a})[0]
    while sessions:
        assert np.array_equal(sessions.pop().run(None, {"a": a})[0], wanted)


def test_what_it_is_not_made_for_is_an_error() -> None:
    weights, scales, a = drawn(1, 96, 32, 4)
    with pytest.raises(Exception, match="zero point other than 128"):
        session(product(weights, scales, zero_point=3), MINE)
    for wrong in (product(weights, scales[:1]), product(weights, scales, step=np.ones(2, np.float32))):
        with pytest.raises(Exception, match="scales of another shape"):
            session(wrong, MINE).run(None, {"a": a})
    with pytest.raises(Exception, match="not constant"):
        session(product(weights, scales, constant=False), MINE)
    with pytest.raises(Exception, match="another width"):
        session(product(weights, scales), MINE).run(None, {"a": a[:, :64]})


def test_tiles_of_the_thread_are_left_as_they_were(tmp_path: Path) -> None:
    """llama.cpp sets them once for a thread and never looks again."""
    program = tmp_path / "tiles.c"
    program.write_text(TILES)
    library = tmp_path / "tiles.so"
    compiled = subprocess.run(["cc", "-shared", "-fPIC", "-o", library, program], capture_output=True, check=False)
    if compiled.returncode:
        pytest.skip("no compiler here")
    tiles = ctypes.CDLL(str(library))
    weights, scales, a = drawn(4, 128, 64, 40)
    run = session(product(weights, scales), MINE, threads=1)
    run.run(None, {"a": a})
    tiles.set()
    run.run(None, {"a": a})
    assert tiles.rows() == 7
    tiles.release()


TILES = """
static struct { unsigned char palette, start, rest[14]; unsigned short bytes[16]; unsigned char rows[16]; } ours, found;
void set(void) { ours.palette = 1; ours.bytes[0] = 64; ours.rows[0] = 7; __asm__ volatile("ldtilecfg %0" ::"m"(ours) : "memory"); }
int rows(void) { __asm__ volatile("sttilecfg %0" : "=m"(found)::"memory"); return found.palette == 1 ? found.rows[0] : -1; }
void release(void) { __asm__ volatile("tilerelease"); }
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the library is for Linux")
def test_memory_is_given_back() -> None:
    import psutil

    weights, scales, a = drawn(2, 4096, 4096, 8)
    model, sizes = product(weights, scales), []
    for _ in range(6):
        session(model, MINE).run(None, {"a": a})
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[1] < 2 * weights.nbytes
