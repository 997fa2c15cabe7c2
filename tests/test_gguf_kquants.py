"""The mixes and the bytes of quantised GGUF files, held against llama.cpp's own `llama_model_quantize`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_gguf import SHAPE, RandomWeights
from tokenizers import Tokenizer
from vocabularies import write_smollm

from edgeguard.architecture import Shape
from edgeguard.backends.llama_native import library
from edgeguard.convert import gguf_quantize
from edgeguard.convert.gguf_file import gguf_name, write_gguf
from edgeguard.convert.gguf_mix import MIXES, more_bits
from edgeguard.convert.gguf_source import GgufWeights
from edgeguard.convert.quantize import weighing_of
from edgeguard.errors import ConversionError
from edgeguard.gguf_check import FILE_TYPES, GgufHeader, check_gguf
from edgeguard.weights import expected

FTYPES = {name: number for number, name in FILE_TYPES.items()}
QUANTISED = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
# the cheapest models that still show a rule
SMALL = replace(SHAPE, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=256)  # K-quants in the down projection only
MODELS = {
    "wide": replace(SHAPE, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=256),
    "wide, tied, 8 heads share": replace(SHAPE, hidden=256, heads=8, kv_heads=1, head_dim=32, ffn=256, tied=True),
    "narrow": replace(SHAPE, hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160),
    "narrow, tied": replace(SHAPE, hidden=64, heads=4, kv_heads=1, head_dim=16, ffn=256, tied=True),
    "odd": replace(SHAPE, hidden=80, heads=4, kv_heads=4, head_dim=20, ffn=256),
}
LAYERS = (1, 5, 16, 26, 32, 33, 80)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smollm(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def llama_quantised(source: Path, out: Path, kind: str, importance: Mapping[str, NDArray[np.float32]] | None = None) -> GgufHeader:
    """What llama.cpp makes of a GGUF with floats; `importance` is by its own names of tensors."""
    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[kind], 1
    if importance:
        matrix = (llama.llama_model_imatrix_data * (len(importance) + 1))()  # an empty one ends it
        for entry, (name, values) in zip(matrix, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = matrix
    assert llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) == 0
    return check_gguf(out)


def tensor_bytes(header: GgufHeader) -> dict[str, tuple[str, bytes]]:
    data = header.path.read_bytes()
    return {name: (tensor.type, data[tensor.offset:tensor.offset + tensor.nbytes]) for name, tensor in header.tensors.items()}


def assert_as_llama_cpp(shape: Shape, tokenizer: Path, folder: Path, kind: str) -> dict[str, int]:
    """Types and bytes of all tensors are equal; gives the number of tensors of each type."""
    weights = RandomWeights(replace(shape, vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    write_gguf(weights, tokenizer, folder / "float.gguf", type="f32")
    wanted = llama_quantised(folder / "float.gguf", folder / "llama.gguf", kind)
    types = write_gguf(weights, tokenizer, folder / "ours.gguf", type=kind, threads=2)
    ours = check_gguf(folder / "ours.gguf")
    assert {name: tensor.type for name, tensor in ours.tensors.items()} == {name: each.type for name, each in wanted.tensors.items()}
    assert tensor_bytes(ours) == tensor_bytes(wanted)
    assert (ours.precision, ours.metadata["general.file_type"]) == (kind, FTYPES[kind])
    return types


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("model", list(MODELS))
def test_types_and_bytes_are_those_of_llama_cpp(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str,
                                                kind: str) -> None:
    monkeypatch.setattr("edgeguard.convert.gguf_file.PIECE", 100_000)  # several pieces a tensor, the last one shorter
    assert_as_llama_cpp(MODELS[model], tokenizer, tmp_path, kind)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m"])
def test_the_mix_depends_on_the_number_of_layers(tokenizer: Path, tmp_path: Path, kind: str, layers: int) -> None:
    types = assert_as_llama_cpp(replace(SMALL, layers=layers), tokenizer, tmp_path, kind)
    assert types["Q6_K"] == sum(more_bits(layer, layers) for layer in range(layers))
    # the one model whose values llama.cpp never keeps in 4 bits; Q5_1 is what narrow rows have instead of Q5_K
    assert ("Q5_1" in types) == (kind == "q5_k_m" or layers == 80)


def test_a_half_precision_source_is_quantised_from_its_own_values(tokenizer: Path, tmp_path: Path) -> None:
    """As llama.cpp widens a file of bfloat16 before it quantises, so do we."""
    weights = RandomWeights(replace(MODELS["wide"], vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    write_gguf(weights, tokenizer, tmp_path / "bf16.gguf", type="bf16")
    wanted = llama_quantised(tmp_path / "bf16.gguf", tmp_path / "llama.gguf", "q4_k_m")
    write_gguf(GgufWeights(tmp_path / "bf16.gguf"), tokenizer, tmp_path / "ours.gguf", type="q4_k_m", threads=1)
    assert tensor_bytes(check_gguf(tmp_path / "ours.gguf")) == tensor_bytes(wanted)


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_importance_is_llama_cpps_importance_matrix(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    shape = replace(MODELS["wide"], layers=1, vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size())
    weights, random = RandomWeights(shape), np.random.default_rng(1)
    importance = {name: random.exponential(1, size[1]).astype(np.float32)
                  for name, size in expected(shape).items() if "layers" in name and len(size) == 2}
    write_gguf(weights, tokenizer, tmp_path / "float.gguf", type="f32")
    wanted = llama_quantised(tmp_path / "float.gguf", tmp_path / "llama.gguf", kind,
                             {gguf_name(name): weighing_of(values) for name, values in importance.items()})
    write_gguf(weights, tokenizer, tmp_path / "ours.gguf", type=kind, threads=1, importance=importance.get)
    ours = tensor_bytes(check_gguf(tmp_path / "ours.gguf"))
    assert ours == tensor_bytes(wanted)
    write_gguf(weights, tokenizer, tmp_path / "plain.gguf", type=kind, threads=1)
    plain = tensor_bytes(check_gguf(tmp_path / "plain.gguf"))
    assert {name for name in ours if ours[name] != plain[name]} == {gguf_name(name) for name in importance}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_read_back_is_near_the_source(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    weights = RandomWeights(replace(MODELS["wide"], vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    write_gguf(weights, tokenizer, tmp_path / "m.gguf", type=kind, threads=1)
    made = GgufWeights(tmp_path / "m.gguf")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        error = np.abs(made.tensor(name) - weights.tensor(name)).mean() / np.abs(weights.tensor(name)).mean()
        assert error < {"q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06}.get(kind, 0.15)


def test_few_rows_are_in_memory_at_any_time(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is asked for whole, and the reader runs ahead of the writer by a few pieces only."""
    weights = RandomWeights(replace(MODELS["wide"], vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    asked: list[int] = []
    rows = weights.rows

    def counted(name: str, index: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        part = rows(name, index)
        asked.append(part.size)
        return part

    monkeypatch.setattr(weights, "rows", counted)
    monkeypatch.setattr(weights, "tensor", None)
    monkeypatch.setattr("edgeguard.convert.gguf_file.PIECE", 4096)
    write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="q4_k_m", threads=2)
    assert max(asked) == 4096
    assert sum(asked) == sum(values.size for values in weights.values.values())


@pytest.mark.parametrize(("kind", "value"), [
    ("q4_k_m", np.nan), ("q4_k_m", np.inf), ("q4_k_m", -np.inf), ("q8_0", np.nan), ("f16", np.nan), ("bf16", np.inf), ("f32", np.nan),
])
def test_a_damaged_weight_stops_the_conversion(tokenizer: Path, tmp_path: Path, kind: str, value: float) -> None:
    weights = RandomWeights(replace(SMALL, vocab=Tokenizer.from_file(str(tokenizer)).get_vocab_size()))
    weights.values["model.layers.1.mlp.down_proj.weight"][7, 3] = value
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        write_gguf(weights, tokenizer, tmp_path / "m.gguf", type=kind, threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "value"), [("Q8_0", 1e8), ("Q4_K", 1e30), ("F16", 1e5), ("BF16", 3.4e38)])
def test_a_weight_that_a_type_cannot_hold(kind: str, value: float) -> None:
    values: NDArray[np.float32] = np.full((2, 256), 0.5, np.float32)
    gguf_quantize.quantise("some.weight", kind, values)
    values[1, 9] = value
    with pytest.raises(ConversionError, match=r"some\.weight"):
        gguf_quantize.quantise("some.weight", kind, values)


def test_every_mix_has_a_file_type() -> None:
    assert set(MIXES) <= set(FTYPES)


def test_a_ggml_without_the_function_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeguard.errors import RuntimeMissingError

    load: Callable[..., object] = lambda *_: object()  # noqa: E731
    monkeypatch.setattr("llama_cpp._ctypes_extensions.load_shared_library", load)
    gguf_quantize._native.cache_clear()
    with pytest.raises(RuntimeMissingError, match="ggml_quantize_chunk"):
        gguf_quantize.quantise("x", "Q8_0", np.zeros((1, 32), np.float32))
    gguf_quantize._native.cache_clear()
