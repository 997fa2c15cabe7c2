"""Our kernels for what lies between products give what the functions give that ONNX Runtime takes apart, and refuse what does not fit."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from test_guard_graph import HEAD, IDS, SHAPE, RandomWeights, run_graph
from test_kernels import RECORDED

from edgeguard.backends import fused, kernels, onnx_session
from edgeguard.backends.onnx_protobuf import domains, int8_product
from edgeguard.backends.onnx_session import Session
from edgeguard.convert import functions
from edgeguard.convert.guard_graph import build
from edgeguard.convert.onnx_writer import OPSETS, Function
from edgeguard.errors import InferenceError
from edgeguard.machine import cpu

Values = Mapping[str, NDArray[Any]]
LIBRARY = fused.built() if fused.fits(cpu()) else None
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="not for this processor, or no compiler when edgeguard was installed")
SETTINGS = settings(max_examples=40, deadline=None)


def test_it_is_built_of_the_files_that_are_here() -> None:
    """An installation that does not compile leaves an older library where it was."""
    assert LIBRARY is not None
    sources = [Path(fused.__file__).parent / name for name in ("fused.c", "fused.h", "fused_loops.h", "custom_op.h")]
    assert LIBRARY.stat().st_mtime >= max(source.stat().st_mtime for source in sources), "install edgeguard again"


def results(function: Function, given: Values, *, ours: bool, threads: int = 2, **attributes: float) -> list[NDArray[Any]]:
    """Of a graph of one function, by our kernel or taken apart."""
    opsets = [helper.make_opsetid(domain, version) for domain, version in {**OPSETS, "edgeguard": 1}.items()]
    made = function.proto(onnx)
    names = [f"y{place}" for place in range(len(made.output))]
    node = helper.make_node(function.name, function.inputs, names, domain="edgeguard", **attributes)
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
              for name, value in given.items()]
    graph = helper.make_graph([node], "one", inputs, [helper.ValueInfoProto(name=name) for name in node.output])
    model = helper.make_model(graph, functions=[made], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if ours:
        options.register_custom_ops_library(str(LIBRARY))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(given)))


def drawn(seed: int, *sizes: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 150), st.integers(-100, 100))
def test_bytes_and_steps_are_those_of_the_runtime(seed: int, tokens: int, quarter: int, power: int) -> None:
    rows = drawn(seed, tokens, functions.PARTS * quarter) * np.float32(2.0**power)
    rows[0], rows[tokens // 2, 0] = 0, 1e4
    plainly, in_parts = functions.QUANTISE, functions.quantise_parts(functions.PARTS * quarter)
    for function, parts in ((plainly, 1), (in_parts, functions.PARTS), (functions.QUANTISE_FINELY, 1)):
        given = {"rows": rows, "zeros": np.full(tokens * parts, 128, np.uint8)}
        for wanted, found in zip(results(function, given, ours=False), results(function, given, ours=True), strict=True):
            assert wanted.dtype == found.dtype and wanted.shape == found.shape and np.array_equal(wanted, found)


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.floats(-3, 3))
def test_sums_and_gates_are_those_of_the_runtime(seed: int, tokens: int, width: int, power: float) -> None:
    scale = np.float32(10**power)
    steps = {"steps": np.abs(drawn(seed, tokens, functions.PARTS, 1))}
    parts = {f"product_{part}": drawn(seed + part, tokens, 1, width) * scale for part in range(functions.PARTS)}
    finely = {"steps": np.abs(drawn(seed, tokens, functions.TERMS, 1)), "product": drawn(seed, tokens, functions.TERMS, width) * scale}
    gated = {"gate": drawn(seed, tokens, width) * scale, "up": drawn(seed + 1, tokens, width)}
    for function, inputs in ((functions.COMBINE_PARTS, {**steps, **parts}), (functions.COMBINE_FINELY, finely), (functions.GATE, gated),
                             (functions.GATE_IN_STEPS, {**gated, "steps": np.abs(drawn(seed, tokens, 1))})):
        (wanted,), (found,) = (results(function, inputs, ours=ours) for ours in (False, True))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(8, 600), st.floats(-3, 3), st.sampled_from([1e-5, 1e-6, 0.5]))
def test_norms_are_those_of_the_runtime(seed: int, tokens: int, width: int, power: float, epsilon: float) -> None:
    rows = {"residual": drawn(seed, tokens, width) * np.float32(10**power), "change": drawn(seed + 1, tokens, width),
            "weight": drawn(seed + 2, width)}
    for function, inputs in ((functions.NORM, rows), (functions.NORM_IN_STEPS, {**rows, "steps": np.abs(drawn(seed, tokens, 1))})):
        wanted, found = (results(function, inputs, ours=ours, epsilon=epsilon) for ours in (False, True))
        for one, other, size in zip(wanted, found, (1, 10 ** max(power, 0)), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * size)


def lanes(seed: int, heads: int, kv_heads: int, width: int, past: int, counts: Sequence[int],
          seen: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Attention of some tokens in each lane, to as many keys as are said of its first; keys are drawn, of the past and of the pass."""
    random, tokens, depth, columns = np.random.default_rng(seed), sum(counts), max(2, *counts), 64 * (1 + (max(seen) + max(counts)) // 64)
    starts = np.cumsum([0, *counts])
    queries = np.stack([np.minimum(start + np.arange(depth), start + count - 1) for start, count in zip(starts, counts, strict=False)])
    limits = np.asarray(seen)[:, None] + np.arange(depth)
    mask = np.where(np.arange(columns) < limits[:, :, None], 0, -np.inf).astype(np.float32)
    places = np.concatenate([lane * depth + np.arange(count) for lane, count in enumerate(counts)])
    angles = random.uniform(0, 6, (tokens, width // 2))
    turns = {"at": np.arange(tokens)[None], "cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    asked = {"asked_at": turns["at"], "asked_cosines": turns["sines"], "asked_sines": turns["cosines"]}  # others than those of the keys
    return {
        "query": drawn(seed, tokens, heads * width), "key": drawn(seed + 1, tokens, kv_heads * width),
        "value": drawn(seed + 2, tokens, kv_heads * width), "past_key": drawn(seed + 3, past, kv_heads, width),
        "past_value": drawn(seed + 4, past, kv_heads, width), **asked, **turns,
        "queries": queries, "places": places, "keys": random.integers(0, past + tokens, (len(counts), columns)),
        "mask": np.tile(mask, (1, heads // kv_heads, 1)),
    }


def attended(given: Values, *, ours: bool, threads: int = 2) -> list[NDArray[Any]]:
    kv_heads, width = given["past_key"].shape[1:]
    function = functions.attention(given["query"].shape[1] // width, kv_heads, width, in_steps="steps" in given)
    return results(function, given, ours=ours, threads=threads)


PINNED = {
    "Quantise": "3d9d779c", "QuantiseParts": "23d82aa0", "QuantiseFinely": "7b17e266", "CombineParts": "c737afc5",
    "CombineFinely": "98905684", "Gate": "00cf9026", "GateInSteps": "a5cfdd8a", "Norm": "7d7d196b",
    "NormInSteps": "6c8493ff", "Attention": "ecad4902", "AttentionInSteps": "220734a7",
}
HEADS = [(1, 1), (6, 2), (4, 4), (9, 3), (8, 1), (110, 1)]


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.sampled_from(HEADS), st.sampled_from([8, 16, 40, 64, 128]),
       st.integers(0, 200), st.lists(st.tuples(st.integers(1, 60), st.integers(1, 150)), min_size=1, max_size=5))
def test_attention_is_that_of_the_runtime(seed: int, heads: tuple[int, int], width: int, past: int, each: list[tuple[int, int]]) -> None:
    given = lanes(seed, *heads, width, past, *zip(*each, strict=True))
    if seed % 2:
        given |= {name: np.abs(drawn(len(name), len(given["query"]), 1)) for name in ("query_steps", "steps")}
    for wanted, found in zip(attended(given, ours=False), attended(given, ours=True), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=3e-5)


def test_many_keys_and_scores_far_apart() -> None:
    """Tokens of a long conversation are taken in small stretches; shares that are next to nothing are 0."""
    given = lanes(3, 8, 2, 64, 7000, [40, 3], [6900, 5])
    given["query"] *= 30
    for wanted, found in zip(attended(given, ours=False), attended(given, ours=True), strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads() -> None:
    whole = lanes(5, 6, 2, 64, 90, [50, 7], [60, 33])
    wanted = attended(whole, ours=True)[0]
    for threads in (1, 3):
        assert np.array_equal(attended(whole, ours=True, threads=threads)[0], wanted)
    for token in (0, 23, 49, 52, 56):
        lane, row = divmod(int(whole["places"][token]), whole["queries"].shape[1])
        alone = {**whole, "query": whole["query"][[token]], "asked_at": whole["asked_at"][:, [token]],
                 "queries": np.zeros((1, 1), np.int64), "places": np.zeros(1, np.int64), "keys": whole["keys"][[lane]],
                 "mask": whole["mask"].reshape(2, 3, -1, whole["keys"].shape[1])[lane, :, row][None]}
        assert np.array_equal(attended(alone, ours=True)[0][0], wanted[token])


@pytest.mark.parametrize("bad", fused.BROKEN, ids=lambda bad: f"{bad.view(np.uint32):x}")
def test_what_is_not_finite_stays_so(bad: np.float32) -> None:
    """A NaN that became an ordinary number could end as `safe`; whole words, for a NaN has many."""
    rows, at = drawn(1, 9, 40), (4, 13)
    rows[at] = bad
    for function, parts in ((functions.QUANTISE, 1), (functions.quantise_parts(40), functions.PARTS), (functions.QUANTISE_FINELY, 1)):
        given = {"rows": rows, "zeros": np.full(9 * parts, 128, np.uint8)}
        for ours in (True, False):
            *_, steps = results(function, given, ours=ours)
            assert list(np.flatnonzero(~np.isfinite(steps).all((*range(1, steps.ndim),)))) == [4]
    (gated,) = results(functions.GATE, {"gate": rows, "up": drawn(2, 9, 40)}, ours=True)
    assert not np.isfinite(gated[at])
    normed, summed = results(functions.NORM, {"residual": rows, "change": drawn(2, 9, 40), "weight": drawn(3, 40)}, ours=True, epsilon=1e-5)
    assert not np.isfinite(normed[4]).any() and not np.isfinite(summed[at])
    for name, token in (("query", 2), ("key", 2), ("value", 2), ("past_key", 0), ("past_value", 0)):
        lane = lanes(7, 2, 1, 64, 1, [3], [4])
        lane["keys"][0, :4], lane["query"] = np.arange(4), np.abs(lane["query"])
        lane[name][token].flat[5] = bad
        lost = bad == -np.inf and "key" in name  # a key that is infinitely far is not attended to
        assert lost or not np.isfinite(attended(lane, ours=True)[0][2]).all(), name


def test_what_is_not_there_is_not_read() -> None:
    given = lanes(9, 4, 2, 16, 5, [3], [4])
    for name, value in (("keys", 8), ("keys", -1), ("queries", 3), ("places", 3), ("asked_at", 3), ("at", -1)):
        changed = {**given, name: np.full_like(given[name], value)}
        with pytest.raises(Exception, match="a token that is not there"):
            attended(changed, ours=True)
    for name in ("past_value", "value", "mask", "cosines", "asked_sines", "places"):
        cut = (slice(None),) * (given[name].ndim - 1)
        with pytest.raises(Exception, match="other sizes"):
            attended({**given, name: given[name][(*cut, slice(1))]}, ours=True)


def test_masks_and_zero_points_of_other_kinds_are_errors() -> None:
    given = lanes(2, 4, 2, 16, 5, [3], [4])
    for change in ({2: -np.inf}, {-1: -1.0}, {-1: np.nan}):
        mask = given["mask"].copy()
        mask[0, 1, [*change]] = [*change.values()]
        with pytest.raises(Exception, match="a mask of another kind"):
            attended({**given, "mask": mask}, ours=True)
    with pytest.raises(Exception, match="a zero point other than 128"):
        results(functions.QUANTISE, {"rows": drawn(1, 3, 8), "zeros": np.array([128, 127, 128], np.uint8)}, ours=True)


def test_a_token_that_sees_nothing_is_not_finite() -> None:
    given = lanes(2, 4, 2, 16, 5, [3], [4])
    given["mask"][:] = -np.inf
    assert not np.isfinite(attended(given, ours=True)[0]).any()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("change", [{}, {"kv_heads": 4}, {"head_dim": 64}])
def test_a_guard_graph_answers_the_same(precision: Any, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(weights := RandomWeights(replace(SHAPE, **change)), tmp_path, precision=precision, head_ids=HEAD)
    plain, options = run_graph(tmp_path, weights.shape, IDS, 3), ort.SessionOptions

    def with_library() -> Any:
        made = options()
        made.register_custom_ops_library(str(LIBRARY))
        return made

    monkeypatch.setattr(ort, "SessionOptions", with_library)
    ours = run_graph(tmp_path, weights.shape, IDS, 3)
    for name, value in plain.items():
        # a sum on the edge between two steps may be rounded to the other one
        np.testing.assert_allclose(ours[name], value, atol=1e-5 if precision == "fp32" else 0.05, err_msg=name)


def compiled(folder: Path, file: str, right: str, wrong: str) -> Path:
    """The library with something else in one of its files."""
    for source in Path(fused.__file__).parent.glob("*.[ch]"):
        text = source.read_text(encoding="utf-8")
        assert source.name != file or right in text
        (folder / source.name).write_text(text.replace(right, wrong) if source.name == file else text, encoding="utf-8")
    subprocess.run(["gcc", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "fused.c", "-o", "other.so", "-lm"], check=True, cwd=folder)
    return folder / "other.so"


def meaning(function: Any) -> str:
    """A mark of all that its nodes compute."""
    nodes = [(node.domain, node.op_type, list(node.input), list(node.output), [each.SerializeToString(deterministic=True)
                                                                              for each in node.attribute]) for node in function.node]
    return hashlib.sha256(repr((list(function.input), list(function.output), nodes)).encode()).hexdigest()[:8]


def test_what_a_function_means_is_what_its_name_says() -> None:
    """Kernels are found by name: one whose body becomes another gets another name, and stands here as what it is."""
    made = [functions.QUANTISE, functions.quantise_parts(96), functions.QUANTISE_FINELY, functions.COMBINE_PARTS, functions.COMBINE_FINELY,
            functions.GATE, functions.GATE_IN_STEPS, functions.NORM, functions.NORM_IN_STEPS, functions.attention(4, 2, 16),
            functions.attention(4, 2, 16, in_steps=True)]
    assert {each.name: meaning(each.proto(onnx)) for each in made} == PINNED


class TestTrial:
    def compute(self, model: bytes, kernel: kernels.Kernel, given: Values) -> Values:
        return onnx_session._computed({}, model, kernel, given)

    def test_it_is_right_here(self) -> None:
        assert fused.tried(cpu(), self.compute) == (LIBRARY, ())

    @pytest.mark.parametrize("name", [name for node in fused.NODES for name in node.outputs if not name.startswith(("_", "broken"))])
    def test_one_wrong_number_is_refused(self, name: str) -> None:
        def wrong(model: bytes, kernel: kernels.Kernel, given: Values) -> Values:
            found = {key: value.copy() for key, value in self.compute(model, kernel, given).items()}
            found[name].flat[-1] += found[name].dtype.type(1)
            return found

        library, lost = fused.tried(cpu(), wrong)
        assert library is None and "wrong" in lost[0]

    @pytest.mark.skipif(shutil.which("gcc") is None, reason="needs GCC")
    @pytest.mark.parametrize(("file", "right", "wrong"), [
        ("fused.h", "a->padded; /* elsewhere", "a->head_dim / 2; /* elsewhere"),
        ("fused.h", "memset(copy + a->head_dim, 0,", "memset(copy + a->head_dim, 255,"),
        ("fused.h", "case 1: function(__VA_ARGS__, 1); break;", "case 1: break;"),
        ("fused.h", "case 2: function(__VA_ARGS__, 2); break;", "case 2: function(__VA_ARGS__, 1); break;"),
        ("fused.c", "memset(out + a->head_dim, 0,", "memset(out + a->head_dim, 255,"),
        ("fused_loops.h", "UNLESS_NAN(x, UNLESS_LESS", "(UNLESS_LESS"),
        ("fused_loops.h", "bits &= 0x7fffffff;", "bits &= 0x7f7fffff;"),
        ("fused_loops.h", " + 0 * total;", ";"),
        ("fused_loops.h", "count + epsilon)", "count)"),
        ("fused.c", "multiplier(a, QUERY_STEPS", "multiplier(a, STEPS"),
        ("fused.c", "a->in[ASKED_COSINES].data + place", "a->in[COSINES].data + place"),
        ("fused.c", "c->products[term] + (int64_t)row", "c->products[0] + (int64_t)row"),
        ("fused_loops.h", "shifted = steps + MAGIC", "shifted = steps + MAGIC + 1"),
    ])
    def test_a_faulty_library_is_refused(self, file: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The trial goes all ways through the library."""
        faulty = compiled(tmp_path, file, right, wrong)
        monkeypatch.setattr(fused, "built", lambda: faulty)
        library, lost = fused.tried(cpu(), self.compute)
        assert library is None and "wrong" in lost[0]

    @pytest.mark.skipif(shutil.which("gcc") is None or not {"avx512f", "avx512bw", "avx512vl"} <= cpu().flags, reason="needs GCC, AVX-512")
    def test_the_narrower_vectors_are_right_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = compiled(tmp_path, "fused.c", '__builtin_cpu_supports("avx512f")', "0")
        monkeypatch.setattr(fused, "built", lambda: library)
        assert fused.tried(cpu(), self.compute) == (library, ())

    def test_a_library_that_does_not_run_is_refused(self) -> None:
        def failing(*_: object) -> Values:
            raise InferenceError("no such operator")

        library, lost = fused.tried(cpu(), failing)
        assert library is None and "failed" in lost[0]

    def test_other_processors_have_none(self) -> None:
        assert fused.tried(RECORDED["neon"], self.compute) == (None, ()) and not fused.told(RECORDED["neon"])

    def test_one_that_was_not_built_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "FUSED", "edgeguard.backends._not_there")
        assert fused.tried(cpu(), self.compute) == (None, (kernels.NOT_BUILT,))
        assert fused.told(cpu())["fused"].reason == kernels.NOT_BUILT


def test_graphs_without_our_functions_do_without_them(tmp_path: Path) -> None:
    build(RandomWeights(SHAPE), tmp_path, precision="fp32", head_ids=HEAD)
    session = Session(model := tmp_path / "model.onnx", "fp32", "cpu", None)
    assert session.kernel.fused == LIBRARY and session.kernel.name == "float, fused" and "edgeguard" in domains(model)
    model.write_bytes(int8_product(np.ones((4, 4), np.int8), np.ones(4, np.float32)))
    assert Session(model, "fp32", "cpu", None).kernel == kernels.FLOAT and "edgeguard" not in domains(model)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_cpu_has_them_where_another_device_was_wanted_and_not_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` where the runtime has CUDA and the machine does not."""
    build(RandomWeights(SHAPE), tmp_path, precision="fp32", head_ids=HEAD)
    monkeypatch.setattr(onnx_session, "_devices", lambda *_: ["cuda", "cpu"])
    session = Session(tmp_path / "model.onnx", "fp32", "auto", None)
    assert (session.device, session.kernel.fused) == ("cpu", LIBRARY) and "cuda" in session.fallbacks[0]
