"""Our own kernel for this processor gives what ONNX Runtime's gives, for every shape, and refuses what it is not made for."""

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

RUNTIMES, MINE, MINE_4 = kernel(cpu(), "int8"), own_kernel(cpu(), "int8"), own_kernel(cpu(), "int4")
pytestmark = pytest.mark.skipif(MINE is None, reason="no own kernel for this processor, or no compiler when edgeguard was installed")
four_bits = pytest.mark.skipif(MINE_4 is None, reason="there is no own kernel of 4 bits for this processor")


def test_it_is_built_of_the_files_that_are_here() -> None:
    """An installation that does not compile leaves an older library where it was."""
    assert MINE is not None and MINE.library is not None
    folder = Path(kernels.__file__).parent
    sources = (folder / f"{MINE.name.split()[-1]}.c", folder / "custom_op.h", folder / "product.h")
    assert MINE.library.stat().st_mtime >= max(source.stat().st_mtime for source in sources), "install edgeguard again"


def product(weights: NDArray[np.int8], scales: NDArray[np.float32], *, zero_point: int = 128, constant: bool = True,
            step: float | NDArray[np.float32] = 0.37, point: int | None = 0) -> bytes:
    """A model of one product of bytes; the weights' zero point is a `point`, or left out."""
    kept = {"b": weights, "step": np.float32(step), "scales": scales, "zero": np.uint8(zero_point)}
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, None)]
    if not constant:
        inputs.append(helper.make_tensor_value_info("b", TensorProto.INT8, list(kept.pop("b").shape)))
    names = ["a", "b", "step", "scales", "zero"]
    if point is not None:
        kept["point"] = np.int8(point)
        names.append("point")
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
    return model(node, inputs, kept)


def model(node: Any, inputs: list[Any], kept: dict[str, Any]) -> bytes:
    graph = helper.make_graph([node], "product", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(np.asarray(value), name) for name, value in kept.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])
    made.ir_version = 9
    return bytes(made.SerializeToString())


def session(model: bytes, by: Kernel | None, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if by is not None:
        options.register_custom_ops_library(str(by.library))
    for key, value in RUNTIMES.entries.items() if by is None else ():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def drawn(seed: int, depth: int, columns: int, *sizes: int) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    return weights, rng.standard_normal(columns).astype(np.float32), rng.integers(0, 256, (*sizes, depth)).astype(np.uint8)


def test_the_weights_zero_point_may_be_left_out() -> None:
    weights, scales, a = drawn(2, 96, 32, 4)
    without, given_one = (session(product(weights, scales, point=point), MINE).run(None, {"a": a})[0] for point in (None, 0))
    assert np.array_equal(without, given_one)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
def test_the_bits_are_those_of_the_runtime(seed: int, depth: int, columns: int, tokens: int) -> None:
    weights, scales, a = drawn(seed, depth, columns, tokens)
    given_model = product(weights, scales)
    wanted, found = (session(given_model, by).run(None, {"a": a})[0] for by in (None, MINE))
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
    sessions = [session(product(weights, scales), MINE) for _ in range(3)]
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
    with pytest.raises(Exception, match="a zero point other than 0"):
        session(product(weights, scales, point=1), MINE).run(None, {"a": a})
    with pytest.raises(Exception, match="another width"):
        session(product(weights, scales), MINE).run(None, {"a": a[:, :64]})


def product_4(weights: NDArray[np.uint8], scales: NDArray[np.float32], *, inputs: int = 3, **other: Any) -> bytes:
    """A model of one product by weights 0 to 15 (N, K) in blocks of 32."""
    columns, depth = weights.shape
    packed = (weights[:, ::2] | weights[:, 1::2] << 4).reshape(columns, depth // 32, 16)
    numbers = {"K": depth, "N": columns, "bits": 4, "block_size": 32, "accuracy_level": 4, **other}
    kept = {"b": packed, "scales": scales, "zeros": np.full((columns, -(-depth // 64)), 0x88, np.uint8)}
    names = list(kept)[: inputs - 1]
    node = helper.make_node("MatMulNBits", ["a", *names], ["y"], domain="com.microsoft", **numbers)
    return model(node, [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)], {name: kept[name] for name in names})


def drawn_4(seed: int, blocks: int, columns: int, *sizes: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 16, (columns, 32 * blocks)).astype(np.uint8)
    return weights, rng.standard_normal((columns, blocks)).astype(np.float32), rng.standard_normal((*sizes, 32 * blocks)).astype(np.float32)


def multiplied_4(weights: NDArray[np.uint8], scales: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float64]:
    """What activations in 127ths of each block's largest magnitude give."""
    blocks = a.reshape(len(a), a.shape[1] // 32, 32)
    steps = np.abs(blocks).max(2, keepdims=True) / np.float32(127)
    whole = np.rint(blocks * np.divide(np.float32(127), np.abs(blocks).max(2, keepdims=True), where=steps > 0, out=np.zeros_like(steps)))
    values = (whole.astype(np.float64) * steps).reshape(a.shape)
    return values @ ((weights.astype(np.float64) - 8) * np.repeat(scales, 32, 1)).T


@four_bits
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 100), st.integers(1, 300))
def test_products_of_4_bits_are_those_of_their_definition(seed: int, blocks: int, columns: int, tokens: int) -> None:
    weights, scales, a = drawn_4(seed, blocks, columns, tokens)
    found = session(product_4(weights, scales), MINE_4).run(None, {"a": a})[0]
    wanted = multiplied_4(weights, scales, a)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    runtimes = session(product_4(weights, scales), None).run(None, {"a": a})[0]
    assert np.abs(found - runtimes).max() <= 1e-5 * np.abs(wanted).max(), "as the runtime's accuracy level 4 has it"


@four_bits
@pytest.mark.parametrize(("columns", "depth", "sizes"), [
    (48, 14336, (37, 2)), (1025, 4096, (77,)), (40, 64, (600,)), (16, 32, (0,)), (33, 96, (2, 3, 5)),
])
def test_4_bits_with_long_rows_many_tokens_and_further_sizes(columns: int, depth: int, sizes: tuple[int, ...]) -> None:
    weights, scales, a = drawn_4(7, depth // 32, columns, *sizes)
    found = session(product_4(weights, scales), MINE_4).run(None, {"a": a})[0]
    wanted = multiplied_4(weights, scales, a.reshape(-1, depth))
    assert found.shape == (*sizes, columns)
    assert np.abs(found.reshape(wanted.shape) - wanted).max(initial=0) <= 1e-5 * np.abs(wanted).max(initial=0)


@four_bits
def test_the_largest_products_of_4_bits_do_not_overflow() -> None:
    for weight in (0, 15):
        for sign in (-1, 1):
            weights, a = np.full((16, 14336), weight, np.uint8), np.full((7, 14336), sign, np.float32)
            found = session(product_4(weights, np.ones((16, 448), np.float32)), MINE_4).run(None, {"a": a})[0]
            assert found == pytest.approx(np.full((7, 16), sign * (weight - 8) * 14336))


@four_bits
def test_a_token_depends_on_no_other_token() -> None:
    weights, scales, a = drawn_4(9, 20, 50, 90)
    run = session(product_4(weights, scales), MINE_4)
    whole = run.run(None, {"a": a})[0]
    for first, last in ((0, 1), (3, 10), (40, 90)):
        assert np.array_equal(run.run(None, {"a": a[first:last]})[0], whole[first:last])


@four_bits
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_stays_so_in_its_token_only(bad: float) -> None:
    weights, scales, a = drawn_4(2, 3, 20, 9)
    a[4, 40] = bad
    found = session(product_4(weights, scales), MINE_4).run(None, {"a": a})[0]
    assert not np.isfinite(found[4]).any() and np.isfinite(np.delete(found, 4, 0)).all()


@four_bits
def test_tiny_and_zero_activations_give_nothing() -> None:
    weights, scales, a = drawn_4(2, 2, 20, 3)
    for value in (0, 1e-40, -1e-38):
        a[1] = value
        found = session(product_4(weights, scales), MINE_4).run(None, {"a": a})[0]
        assert np.abs(found[1]).max() < 1e-25 and np.abs(found[0]).max() > 0.1


@four_bits
def test_4_bits_that_it_is_not_made_for_are_an_error() -> None:
    weights, scales, a = drawn_4(1, 4, 32, 4)
    with pytest.raises(Exception, match="edgeguard: scales of another shape"):
        session(product_4(weights, scales[:, :2]), MINE_4)
    with pytest.raises(Exception, match="edgeguard: weights of another shape"):
        session(product_4(weights, scales, K=96), MINE_4)
    with pytest.raises(Exception, match="edgeguard: weights of other than 4 bits in blocks of 32"):
        session(product_4(weights, scales, block_size=16), MINE_4)
    with pytest.raises(Exception, match="edgeguard: activations of other than 8 bits"):
        session(product_4(weights, scales, accuracy_level=1), MINE_4)
    with pytest.raises(Exception, match="MatMulNBits"):  # zero points: the runtime refuses the node
        session(product_4(weights, scales, inputs=4), MINE_4)
    with pytest.raises(Exception, match="another width"):
        session(product_4(weights, scales), MINE_4).run(None, {"a": a[:, :64]})


@pytest.mark.skipif(RUNTIMES.name != "amx", reason="this processor has no AMX")
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
