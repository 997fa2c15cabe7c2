"""llama.cpp behind the contract, held against the reference twin.

Stated tolerances on answer logits of a few units: float32 1e-4, float16 weights 0.05; packed and alone are equal bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.backends import llama_native
from edgeguard.backends.base import Node, Run
from edgeguard.backends.llama import LlamaBackend, merged
from edgeguard.backends.llama_native import SEQUENCES, choose_device
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.convert.gguf_file import write_gguf
from edgeguard.errors import (
    CancelledError,
    ContextLengthError,
    DeadlineError,
    DeviceError,
    InferenceError,
    ModelFileError,
    ModelMismatchError,
)
from edgeguard.store import PrefixCache
from edgeguard.weights import SafetensorsWeights

RANDOM = np.random.default_rng(0)


def ids(count: int) -> list[int]:
    return [int(index) for index in RANDOM.integers(0, 128000, count)]


PREFIX = [128000, *ids(36)]
MESSAGES = [ids(count) for count in (40, 3, 1, 77, 16)]
MESSAGES.append(MESSAGES[0][:5] + ids(14))  # begins like another one


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`model(shape, type)` is a GGUF."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(name: str, kind: str) -> Path:
        path = folder / f"{name}-{kind}.gguf"
        if not path.exists():
            source = tiny_llama(name)
            write_gguf(SafetensorsWeights(source), source / "tokenizer.json", path, type=kind, threads=1)
        return path

    return make


@pytest.fixture
def load(model: Callable[[str, str], Path]) -> Iterator[Callable[..., LlamaBackend]]:
    loaded: list[LlamaBackend] = []

    def make(name: str, kind: str, context: int = 1024, **options: Any) -> LlamaBackend:
        loaded.append(LlamaBackend(model(name, kind), threads=1, context=context, **options))
        return loaded[-1]

    yield make
    for backend in loaded:
        backend.shutdown()


def alone(backend: LlamaBackend, root: Node, message: list[int]) -> np.ndarray:
    node = backend.extend([(root, message)], Run())[0]
    backend.close(node)
    return node.logits


@pytest.mark.parametrize(("name", "kind", "tolerance"), [
    ("plain", "f32", 1e-4), ("gqa", "f32", 1e-4), ("plain", "f16", 0.05), ("gqa", "f16", 0.05),
])
def test_answers_like_the_reference(load: Callable[..., LlamaBackend], tiny_llama: Callable[[str], Path], name: str, kind: str,
                                    tolerance: float) -> None:
    backend, reference = load(name, kind), ReferenceBackend(SafetensorsWeights(tiny_llama(name)))
    info = backend.info
    assert (info.name, info.device, info.precision, info.threads, info.context, len(info.head_ids)) == (
        "llama", "cpu", kind, 1, 1024, 128256)
    root, wanted = backend.open(PREFIX, Run()), reference.open(PREFIX, Run())
    np.testing.assert_allclose(root.logits, wanted.logits, atol=tolerance)
    nodes = backend.extend([(root, message) for message in MESSAGES], Run())
    for node, expected in zip(nodes, reference.extend([(wanted, message) for message in MESSAGES], Run()), strict=True):
        assert (node.length, node.parent) == (expected.length, root)
        np.testing.assert_allclose(node.logits, expected.logits, atol=tolerance)
    deeper = backend.extend([(nodes[3], [7, 8]), (nodes[0], [9])], Run())
    again = backend.extend([(root, MESSAGES[3] + [7, 8])], Run())[0]
    np.testing.assert_allclose(deeper[0].logits, again.logits, atol=tolerance)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q4_k_m"])
def test_packed_is_alone_bit_for_bit(load: Callable[..., LlamaBackend], kind: str) -> None:
    backend = load("wide", kind)
    root = backend.open(PREFIX, Run())
    single = [alone(backend, root, message) for message in MESSAGES]
    packed = backend.extend([(root, message) for message in MESSAGES], Run())
    for node, logits in zip(packed, single, strict=True):
        np.testing.assert_array_equal(node.logits, logits)
    assert np.ptp(single[0]) > 1  # it does answer


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_kept_prefix_gives_what_a_new_one_gives_bit_for_bit(load: Callable[..., LlamaBackend], kind: str) -> None:
    backend = load("wide", kind)
    first = backend.open(PREFIX, Run())
    other = backend.open(ids(21), Run())
    kept = backend.extend([(first, MESSAGES[0]), (other, MESSAGES[3]), (first, MESSAGES[1])], Run())
    new = backend.open(PREFIX, Run())
    np.testing.assert_array_equal(new.logits, first.logits)
    np.testing.assert_array_equal(alone(backend, new, MESSAGES[0]), kept[0].logits)
    for node in (*kept, other, other):
        backend.close(node)
    np.testing.assert_array_equal(alone(backend, first, MESSAGES[1]), kept[2].logits)
    fresh = load("wide", kind)
    np.testing.assert_array_equal(alone(fresh, fresh.open(PREFIX, Run()), MESSAGES[1]), kept[2].logits)


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_k_m"])
def test_a_restored_prefix_lies_where_an_evaluated_one_would(load: Callable[..., LlamaBackend], tmp_path: Path, kind: str) -> None:
    cache = PrefixCache(tmp_path, {})
    backend = load("wide", kind, cache=cache)
    root = backend.open(PREFIX, Run())
    wanted = [alone(backend, root, message) for message in MESSAGES]
    again = load("wide", kind, cache=cache)
    other = again.open(ids(21), Run())
    holes = again.extend([(other, ids(count)) for count in (30, 50, 5)], Run())
    for node in holes[::2]:  # what is free lies in pieces
        again.close(node)
    restored = again.open(PREFIX, Run())
    np.testing.assert_array_equal(restored.logits, root.logits)
    for node, logits in zip(again.extend([(restored, message) for message in MESSAGES], Run()), wanted, strict=True):
        np.testing.assert_array_equal(node.logits, logits)


def test_a_prefix_that_finds_no_room_is_evaluated(load: Callable[..., LlamaBackend], tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path, {})
    wanted = load("plain", "f32", 512, cache=cache).open(PREFIX, Run())
    backend = load("plain", "f32", 512, cache=cache)
    for count in (500, 500):  # the cache has room for one of these beside nothing else
        backend.open(ids(count), Run())
    root = backend.open(PREFIX, Run())
    np.testing.assert_array_equal(root.logits, wanted.logits)
    assert backend.extend([(root, [5])], Run())[0].length == len(PREFIX) + 1


def test_weights_that_stay_mapped_answer_alike(load: Callable[..., LlamaBackend]) -> None:
    packed, mapped = load("wide", "q4_0"), load("wide", "q4_0", repack=False)
    wanted = packed.open(PREFIX, Run()).logits
    assert np.ptp(wanted) > 3
    np.testing.assert_allclose(mapped.open(PREFIX, Run()).logits, wanted, atol=0.2)  # activations are rounded in other blocks


def test_beginnings_in_common_are_evaluated_once() -> None:
    root = Node(10, np.zeros(1, np.float32))
    batch = merged([(root, [1, 2, 3]), (root, [1, 2, 4, 5]), (None, [1]), (root, [1, 2])], [20, 21, 22, 23])
    assert batch.tokens == [1, 2, 3, 4, 5, 1]
    assert batch.positions == [10, 11, 12, 12, 13, 0]
    assert batch.owners == [[20, 21, 23], [20, 21, 23], [20], [21], [21], [22]]
    assert batch.ends == [2, 4, 5, 1]
    assert batch.runs == [(20, 10, 3), (21, 12, 2), (22, 0, 1)]
    long = list(range(100, 130))  # a text: parts from another one between blocks of 16 positions, here at 16
    batch = merged([(root, long), (root, [*long[:20], 7]), (root, long[:9])], [20, 21, 22])
    assert len(batch.tokens) == 30 + 15
    assert batch.runs == [(20, 10, 30), (21, 16, 15)]
    assert [batch.positions[end] for end in batch.ends] == [39, 30, 18]


def test_more_than_the_cache_holds_is_split_and_comes_back(load: Callable[..., LlamaBackend]) -> None:
    backend = load("plain", "f32", 512)
    root = backend.open(PREFIX, Run())
    messages = [ids(30) for _ in range(SEQUENCES + 20)]  # more than there are sequence ids, and than cells
    nodes = backend.extend([(root, message) for message in messages], Run())
    wide = load("plain", "f32", 8192)
    whole = wide.open(PREFIX, Run())
    for place in (0, 1, 50, len(nodes) - 1):
        np.testing.assert_array_equal(nodes[place].logits, alone(wide, whole, messages[place]))
        deeper = backend.extend([(nodes[place], [5, 6])], Run())[0]  # some of them have left the cache
        np.testing.assert_allclose(deeper.logits, alone(wide, whole, messages[place] + [5, 6]), atol=1e-4)
    for node in nodes:
        backend.close(node)
    again = backend.extend([(root, messages[0])], Run())[0]
    np.testing.assert_array_equal(again.logits, nodes[0].logits)


def test_the_whole_context_fits_in_any_number_of_parts(load: Callable[..., LlamaBackend]) -> None:
    backend = load("gqa", "f32", 512)
    backend.open(ids(300), Run())  # has to leave
    text = ids(512)
    whole = backend.open(text, Run())
    node = backend.open(text[:4], Run())
    for start in range(4, 512, 4):
        node = backend.extend([(node, text[start:start + 4])], Run())[0]
    assert node.length == 512
    np.testing.assert_allclose(node.logits, whole.logits, atol=1e-4)
    with pytest.raises(ContextLengthError, match="513"):
        backend.extend([(node, [1])], Run())


def test_bad_calls(load: Callable[..., LlamaBackend]) -> None:
    backend = load("plain", "f32")
    with pytest.raises(ContextLengthError, match="1025"):
        backend.open([1] * 1025, Run())
    with pytest.raises(ModelMismatchError, match="vocabulary"):
        backend.open([128256], Run())
    with pytest.raises(ValueError, match="at least one"):
        backend.open([], Run())
    with pytest.raises(ValueError, match="another backend"):
        backend.extend([(Node(3, np.zeros(3, np.float32)), [1])], Run())
    assert backend.extend([], Run()) == []
    backend.shutdown()
    backend.shutdown()
    with pytest.raises(InferenceError, match="shut down"):
        backend.open(PREFIX, Run())


def test_a_stopped_call_leaves_older_nodes_valid(load: Callable[..., LlamaBackend]) -> None:
    backend = load("wide", "f32", 8192)
    root = backend.open(PREFIX, Run())
    expected = alone(backend, root, MESSAGES[0])
    stopped = Run()
    stopped.cancel()
    with pytest.raises(CancelledError):
        backend.extend([(root, MESSAGES[0])], stopped)
    with pytest.raises(DeadlineError):
        backend.extend([(root, ids(6000))], Run.within(0.2))  # in the middle of the pass
    run = Run()
    threading.Timer(0.2, run.cancel).start()
    started = time.monotonic()
    with pytest.raises(CancelledError):
        backend.extend([(root, ids(2000)), (root, ids(3000))], run)
    assert time.monotonic() - started < 5
    np.testing.assert_array_equal(alone(backend, root, MESSAGES[0]), expected)


def test_logits_that_are_not_finite_are_no_answer(load: Callable[..., LlamaBackend], model: Callable[[str, str], Path],
                                                  tmp_path: Path) -> None:
    from edgeguard.gguf_check import check_gguf

    path = tmp_path / "nan.gguf"
    data = bytearray(model("plain", "f32").read_bytes())
    at = check_gguf(model("plain", "f32")).tensors["output_norm.weight"].offset
    data[at:at + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    backend = LlamaBackend(path, threads=1, context=256)
    with pytest.raises(InferenceError, match="finite"):
        backend.open(PREFIX, Run())
    backend.shutdown()


def test_a_file_that_is_written_to_while_it_is_used_is_an_error(model: Callable[[str, str], Path], tmp_path: Path) -> None:
    path = tmp_path / "used.gguf"
    shutil.copy(model("plain", "f32"), path)
    backend = LlamaBackend(path, device="cpu", threads=1, context=256, repack=False)
    prefix = backend.open(PREFIX, Run())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ModelFileError, match="written to while it was in use"):
        backend.extend([(prefix, MESSAGES[0])], Run())
    backend.shutdown()


def test_damaged_files_never_reach_native_code(model: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_native, "_load", lambda *_: pytest.fail("native code saw the file"))
    data = model("plain", "f16").read_bytes()
    for length in (0, 3, 100, 5_000_000, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            LlamaBackend(tmp_path / "cut.gguf", threads=1)


def test_what_llama_cpp_refuses_is_told(model: Callable[[str, str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = model("plain", "f16").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelFileError, match="ffn_up"):
        LlamaBackend(tmp_path / "odd.gguf", threads=1)
    assert capfd.readouterr() == ("", "")


def test_only_auto_falls_back() -> None:
    assert choose_device("auto", {}) == ("cpu", None)
    assert choose_device("auto", {"mtl": 5}) == ("metal", 5)
    assert choose_device("cuda", {"cuda": 7, "vulkan": 8}) == ("cuda", 7)
    assert choose_device("cpu", {"cuda": 7}) == ("cpu", None)
    for name in ("cuda", "metal", "tpu"):
        with pytest.raises(DeviceError, match=name):
            choose_device(name, {"vulkan": 8})


def test_the_interpreter_may_end_with_a_model_loaded(model: Callable[[str, str], Path]) -> None:
    code = ("import sys; from pathlib import Path; from edgeguard.backends.llama import LlamaBackend\n"
            "from edgeguard.backends.base import Run\n"
            "backend = LlamaBackend(Path(sys.argv[1]), threads=1, context=256); node = backend.open([1, 2, 3], Run()); print(node.length)")
    done = subprocess.run([sys.executable, "-c", code, str(model("plain", "f16"))], capture_output=True, text=True, timeout=120,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
