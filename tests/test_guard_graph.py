from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.backends.base import Node, Run
from edgeguard.backends.packing import merge, passes
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.convert import guard_graph
from edgeguard.convert.guard_graph import build
from edgeguard.convert.quantize import Int4Blocks, Int8Rows, QuantisedTensor, int4_blocks, int8_rows
from edgeguard.errors import ConversionError
from edgeguard.weights import SafetensorsWeights, Weights, expected

SHAPE = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=300, context=512, rope_theta=1e4, rms_eps=1e-5,
              tied=False)
HEAD = (3, 17, 250, 299)
IDS = [5, 9, 200, 31, 5, 77, 250]
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}


class RandomWeights:
    """Weights out of thin air."""

    def __init__(self, shape: Shape, damaged: str = "") -> None:
        self.shape = shape
        random = np.random.default_rng(0)
        self._tensors = {
            name: (1 + 0.2 * random.standard_normal(size) if len(size) == 1 else random.standard_normal(size) / np.sqrt(size[1]))
            .astype(np.float32) for name, size in expected(shape).items()
        }
        if damaged:
            self._tensors[damaged].flat[1] = np.nan

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name].copy()

    def rows(self, name: str, index: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self._tensors[name][index].copy()

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        return self._tensors[name], "F32"


class Overlay(RandomWeights):
    """Random weights, linear layers replaced by what a quantised graph really multiplies with."""

    def __init__(self, shape: Shape, stored: Callable[[str], QuantisedTensor | None]) -> None:
        super().__init__(shape)
        for name in self.names():
            tensor = stored(name)
            self._tensors[name] = tensor.dequantised() if tensor else self._tensors[name]


def run_graph(folder: Path, shape: Shape, ids: list[int], past: int = 0) -> dict[str, NDArray[Any]]:
    """The graph's outputs for one sequence whose first `past` tokens are evaluated before."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact products without VNNI too
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def feeds(node: Node | None, tokens: list[int], state: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tree = merge([(node, tokens)], shape.context)
        (part,) = passes(tree, shape.heads, {node: np.arange(past)} if node else {}, past if node else 0)
        plan = {name: getattr(part, name) for name in ("queries", "places", "keys", "rows", "lanes")}
        keys = [f"past_{kind}_{layer}" for layer in range(shape.layers) for kind in ("key", "value")]
        return {"ids": tree.ids, "positions": tree.positions, **plan, **dict(zip(keys, state, strict=True))}

    state = [np.empty((0, shape.kv_heads, shape.head_dim), np.float32)] * 2 * shape.layers
    node = None
    if past:
        _, *state = session.run(names, feeds(None, ids[:past], state))
        node = Node(past, np.empty(0, np.float32))
    return dict(zip(names, session.run(names, feeds(node, ids[past:], state)), strict=True))


def wanted(weights: Weights) -> NDArray[np.float32]:
    return ReferenceBackend(weights).open(IDS, Run()).logits[list(HEAD)]


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("change", [
    {}, {"tied": True}, {"kv_heads": 4}, {"heads": 2, "head_dim": 32, "kv_heads": 1}, {"head_dim": 32}, {"rope_scaling": SCALING},
])
def test_fp32_equals_the_reference(change: dict[str, Any], past: int, tmp_path: Path) -> None:
    weights = RandomWeights(replace(SHAPE, **change))
    build(weights, tmp_path, precision="fp32", head_ids=HEAD)
    outputs = run_graph(tmp_path, weights.shape, IDS, past)
    np.testing.assert_allclose(outputs["logits"][0], wanted(weights), atol=1e-5)
    state: Any = ReferenceBackend(weights).open(IDS, Run()).state
    for layer, (key, value) in enumerate(state):
        np.testing.assert_allclose(outputs[f"new_key_{layer}"], key[:, past:].swapaxes(0, 1), atol=1e-5)
        np.testing.assert_allclose(outputs[f"new_value_{layer}"], value[:, past:].swapaxes(0, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "gqa"])
def test_fp32_equals_transformers(name: str, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    build(weights := SafetensorsWeights(tiny_llama(name)), tmp_path, precision="fp32", head_ids=HEAD)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama(name), dtype=torch.float32)(torch.tensor([IDS])).logits
    np.testing.assert_allclose(run_graph(tmp_path, weights.shape, IDS)["logits"][0], logits[0, -1, list(HEAD)], atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("int8", 0.05), ("int4", 0.05)])
def test_lower_precisions_multiply_with_what_they_store(precision: Any, tolerance: float, tmp_path: Path) -> None:
    """Held against the reference on the dequantised weights: what is left is the rounding of activations."""
    def stored(name: str) -> QuantisedTensor | None:
        if precision == "fp16" or name == "lm_head.weight" or "norm" in name or "embed" in name:
            return None
        quantise = int4_blocks if precision == "int4" else int8_rows
        return quantise(name, RandomWeights(SHAPE).tensor(name))

    build(RandomWeights(SHAPE), tmp_path, precision=precision, head_ids=HEAD)
    np.testing.assert_allclose(run_graph(tmp_path, SHAPE, IDS)["logits"][0], wanted(Overlay(SHAPE, stored)), atol=tolerance)


@pytest.mark.parametrize(("outlier", "kind"), [
    ("input_layernorm", "self_attn.v_proj"), ("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"),
])
def test_layers_near_the_input_bear_outliers(outlier: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read with one large channel in it keeps of the others what 16 bits hold."""
    weights, layer = RandomWeights(shape := replace(SHAPE, layers=1)), "model.layers.0."
    weights._tensors[f"{layer}{outlier}.weight"][5] *= 300
    for name in ("q", "k"):  # attention is to all tokens alike, so that only values depend on what it reads
        weights._tensors[f"{layer}self_attn.{name}_proj.weight"][:] = 0
    stored = RandomWeights(shape)
    stored._tensors = {name: int8_rows(name, tensor).dequantised() if name.endswith("_proj.weight") else tensor
                       for name, tensor in weights._tensors.items()}
    error = {}
    for fine in ((f"{kind}.weight",), ()):
        monkeypatch.setattr(guard_graph, "FINE", fine)
        build(weights, tmp_path / str(fine), precision="int8", head_ids=HEAD)
        error[bool(fine)] = np.abs(run_graph(tmp_path / str(fine), shape, IDS)["logits"][0] - wanted(stored)).max()
    assert error[True] < 0.5 * error[False]


def test_the_first_quarter_reads_finely() -> None:
    def count(layers: int) -> int:
        return sum(guard_graph.reads_finely(f"model.layers.{layer}.mlp.down_proj.weight", layers) for layer in range(layers))

    assert [count(layers) for layers in (1, 2, 18, 32)] == [1, 1, 5, 8]
    kinds = [name.removeprefix("model.layers.0.") for name in expected(SHAPE) if "layers.0." in name and "proj" in name]
    assert {kind for kind in kinds if guard_graph.reads_finely(f"model.layers.7.{kind}", 32)} == {
        kind for kind in kinds if "self_attn" in kind or "down_proj" in kind}
    assert not any(guard_graph.reads_finely(f"model.layers.8.{kind}", 32) for kind in kinds)


def test_a_token_of_zeros_reads_as_zeros(tmp_path: Path) -> None:
    """Its largest magnitude is none to divide by."""
    weights = RandomWeights(SHAPE)
    weights._tensors["model.embed_tokens.weight"][IDS[1]] = 0
    build(weights, tmp_path, precision="int8", head_ids=HEAD)
    np.testing.assert_allclose(run_graph(tmp_path, SHAPE, IDS)["logits"][0], wanted(weights), atol=0.1)


@pytest.mark.parametrize(("precision", "types"), [
    ("fp32", {"float32": 21}), ("fp16", {"float16": 15, "float32": 6}), ("int8", {"int8": 14, "float16": 1, "float32": 6}),
    ("int4", {"int4": 14, "float16": 1, "float32": 6}),
])
def test_types_written_and_progress(precision: Any, types: dict[str, int], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    found = build(RandomWeights(SHAPE), tmp_path, precision=precision, head_ids=HEAD, progress=lambda *each: told.append(each))
    assert found == types
    assert [stage for stage, _, _ in told] == ["graph"] * 21
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1] == ("graph", SHAPE.parameters, SHAPE.parameters)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_given_tensors_are_stored_as_they_are(tmp_path: Path) -> None:
    """A layer may have more bits than the rest, and the head its quantised values."""
    import onnx

    weights = RandomWeights(SHAPE)
    down, head = "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
    given: dict[str, QuantisedTensor] = {
        down: Int8Rows(np.full((64, 96), 3, np.int8), np.full(64, 0.5, np.float32)),
        head: Int4Blocks(np.full((300, 64), 10, np.uint8), np.full((300, 2), 0.25, np.float32)),
    }
    types = build(weights, tmp_path, precision="int4", head_ids=HEAD, quantised=given.get)
    assert types == {"int8": 1, "int4": 13, "float16": 1, "float32": 6}
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for start in range(0, 96, 24):
        assert (tensors[f"{down}.{start}"] == 3).all() and tensors[f"{down}.{start}"].shape == (24, 64)
    assert (tensors[f"{down}.scale"] == 0.5).all()
    assert tensors[head].shape == (4, 64) and (tensors[head] == 0.5).all()


def test_head_rows_are_those_asked_for_or_all(tmp_path: Path) -> None:
    weights = RandomWeights(SHAPE)
    build(weights, tmp_path / "some", precision="fp32", head_ids=HEAD)
    build(weights, tmp_path / "all", precision="fp32", head_ids=())
    some, every = (run_graph(tmp_path / name, SHAPE, IDS)["logits"] for name in ("some", "all"))
    assert every.shape == (1, 300)
    np.testing.assert_allclose(some, every[:, list(HEAD)], atol=1e-6)


def test_large_tensors_begin_on_pages(tmp_path: Path) -> None:
    import onnx

    build(RandomWeights(SHAPE), tmp_path, precision="fp32", head_ids=HEAD)
    for tensor in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert int(entries["offset"]) % (4096 if int(entries["length"]) >= 4096 else 64) == 0


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_damaged_weights_leave_no_file(precision: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=name):
        build(RandomWeights(SHAPE, name), tmp_path, precision=precision, head_ids=[0, 1])
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    weights = RandomWeights(SHAPE)
    weights._tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(ConversionError, match=r"up_proj.* float16"):
        build(weights, tmp_path, precision="fp16", head_ids=HEAD)
