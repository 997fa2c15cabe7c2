"""Checkpoints to GGUF and back, vocabularies both ways, and llama.cpp's quantising."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from vocabularies import messages, write_llama_2, write_smollm

from edgeguard.architecture import Shape
from edgeguard.convert import gguf_tokenizer
from edgeguard.convert.gguf_file import rope_factors, write_gguf
from edgeguard.convert.gguf_quantize import TYPES, quantise_gguf
from edgeguard.convert.gguf_source import GgufWeights, tokenizer_json
from edgeguard.convert.quantize import Int4Blocks, Int8Rows, int4_blocks, int8_rows
from edgeguard.errors import ConversionError, ModelFileError, StoreError
from edgeguard.gguf_check import check_gguf
from edgeguard.weights import SafetensorsWeights, expected

SHAPE = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=0, context=128, rope_theta=10000.0, rms_eps=1e-5,
              tied=False)
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class RandomWeights:
    """A random checkpoint in memory."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        random = np.random.default_rng(5)
        self.values = {name: random.normal(0, 0.1, size).astype(np.float32) for name, size in expected(shape).items()}

    def names(self) -> list[str]:
        return sorted(self.values)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self.values[name]

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        return self.values[name], "F32"


@pytest.fixture
def small(tmp_path: Path) -> tuple[RandomWeights, Path]:
    tokenizer = write_smollm(tmp_path / "tokenizer.json")
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    return RandomWeights(replace(SHAPE, vocab=size + 5)), tokenizer  # the embedding may have rows to spare


@pytest.mark.parametrize("name", ["plain", "gqa"])
def test_float32_comes_back_exactly(tiny_llama: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = SafetensorsWeights(tiny_llama(name))
    types = write_gguf(source, tiny_llama(name) / "tokenizer.json", tmp_path / "m.gguf", type="f32", name=name)
    assert types == {"F32": len(expected(source.shape))}
    back = GgufWeights(tmp_path / "m.gguf")
    assert back.shape == source.shape
    assert back.names() == sorted(expected(source.shape))
    for tensor in back.names():
        np.testing.assert_array_equal(back.tensor(tensor), source.tensor(tensor))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("kind", "wanted"), [
    ("f16", lambda values: values.astype(np.float16).astype(np.float32)), ("bf16", None),
])
def test_half_types_round_to_the_nearest(small: tuple[RandomWeights, Path], tmp_path: Path, kind: Any, wanted: Any) -> None:
    import torch

    weights, tokenizer = small
    types = write_gguf(weights, tokenizer, tmp_path / "m.gguf", type=kind)
    assert types == {kind.upper(): 16, "F32": 5}
    back = GgufWeights(tmp_path / "m.gguf")
    assert back.header.precision == kind
    for name, values in weights.values.items():
        rounded = wanted(values) if wanted else torch.tensor(values).bfloat16().float().numpy()
        np.testing.assert_array_equal(back.tensor(name), values if values.ndim == 1 else rounded)


def test_quantised_values_come_back_exactly(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    made: dict[str, Int8Rows | Int4Blocks] = {}

    def quantised(name: str) -> Int8Rows | Int4Blocks | None:
        if weights.values[name].ndim == 1 or name == "lm_head.weight":
            return None
        assert name not in made, "each tensor is quantised once"
        made[name] = (int4_blocks if "mlp" in name or "k_proj" in name else int8_rows)(name, weights.values[name])
        return made[name]

    seen = []
    types = write_gguf(weights, tokenizer, tmp_path / "m.gguf", quantised=quantised, progress=lambda *step: seen.append(step))
    assert types == {"Q8_0": 7, "Q4_0": 8, "F16": 1, "F32": 5}
    assert (seen[0][:2], seen[-1]) == ((0, 21), (21, 21, ""))
    back = GgufWeights(tmp_path / "m.gguf")
    for name, tensor in made.items():
        np.testing.assert_array_equal(back.tensor(name), tensor.dequantised())
    # in llama.cpp's own reading of a block, too
    stored, kind = back.raw("model.layers.1.mlp.up_proj.weight")
    assert (kind, stored.shape) == ("Q4_0", (96, 64 // 32 * 18))


def test_rope_scaling_of_llama_3_comes_back(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    weights.shape = replace(weights.shape, rope_scaling=LLAMA_3, rope_theta=500000.0)
    assert write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="f32")["F32"] == 22
    assert GgufWeights(tmp_path / "m.gguf").shape == weights.shape
    factors = rope_factors(weights.shape)
    assert factors is not None and (factors.min(), factors.max()) == (1, 8)


def test_what_a_type_cannot_hold_is_an_error(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    out = tmp_path / "m.gguf"
    weights.values["lm_head.weight"][0, 0] = 1e6
    with pytest.raises(ConversionError, match="lm_head"):
        write_gguf(weights, tokenizer, out, type="f16")
    write_gguf(weights, tokenizer, out, type="bf16")
    out.unlink()
    weights.values["model.norm.weight"][0] = np.nan
    with pytest.raises(ConversionError, match="not finite"):
        write_gguf(weights, tokenizer, out, type="f32")
    with pytest.raises(ConversionError, match="no float16"):
        write_gguf(weights, tokenizer, out, quantised=lambda name: Int8Rows(
            np.zeros(weights.values[name].shape, np.int8), np.full(len(weights.values[name]), 0.1, np.float32)))
    weights.shape = replace(weights.shape, vocab=10)
    with pytest.raises(ConversionError, match="vocabulary has 10"):
        write_gguf(weights, tokenizer, out)
    assert list(tmp_path.iterdir()) == [tokenizer]


@pytest.mark.parametrize("kind", ["llama-bpe", "smollm", "llama"])
def test_the_vocabulary_comes_back_with_equal_ids(tmp_path: Path, llama3_tokenizer: Path, kind: str) -> None:
    writers = {"smollm": write_smollm, "llama": write_llama_2}
    path = writers[kind](tmp_path / "tokenizer.json") if kind in writers else llama3_tokenizer
    if kind == "llama":
        data = json.loads(path.read_text())
        with pytest.raises(ConversionError, match="no merge"):
            gguf_tokenizer.from_json(data, 1000)
        data["model"]["merges"] += ["1 0", "1 1"]
        path.write_text(json.dumps(data))
    source = Tokenizer.from_file(str(path))
    weights = RandomWeights(replace(SHAPE, layers=1, hidden=32, heads=2, kv_heads=1, vocab=source.get_vocab_size() + 3))
    write_gguf(weights, path, tmp_path / "m.gguf")
    metadata = check_gguf(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == ("default" if kind == "llama" else kind)
    again = Tokenizer.from_str(json.dumps(tokenizer_json(tmp_path / "m.gguf")))
    for text in [*messages(), "", "1234567 ½ ² unsafe\n S1,S10", "  two  spaces\n\n\t", "é🙂 \u0301x", "don't WE'LL"]:
        for whole in (text, f"<|eot_id|>{text}<|im_end|></s>"):  # control tokens spelled out
            assert again.encode(whole, add_special_tokens=False).ids == source.encode(whole, add_special_tokens=False).ids
    assert again.decode(list(range(40, 90)), skip_special_tokens=False) == source.decode(list(range(40, 90)), skip_special_tokens=False)


@pytest.mark.parametrize(("change", "reason"), [
    ({"normalizer": {"type": "Lowercase"}}, "rewrites text"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts words"),
])
def test_unknown_vocabularies_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    data = json.loads(write_smollm(tmp_path / "tokenizer.json").read_text())
    with pytest.raises(ConversionError, match=reason):
        gguf_tokenizer.from_json(data | change, 1000)
    with pytest.raises(ConversionError, match="ignore_merges"):
        gguf_tokenizer.from_json(data | {"model": data["model"] | {"ignore_merges": True}}, 1000)
    with pytest.raises(ConversionError, match="BPE"):
        gguf_tokenizer.from_json(data | {"model": {"type": "Unigram"}}, 1000)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a width that K-quants can take."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = write_smollm(folder / "tokenizer.json")
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    shape = replace(SHAPE, hidden=256, heads=8, head_dim=32, ffn=256, vocab=size)
    write_gguf(RandomWeights(shape), tokenizer, folder / "m.gguf", type="f16")
    return folder / "m.gguf"


@pytest.mark.parametrize("kind", list(TYPES))
def test_llama_cpp_quantises(wide: Path, tmp_path: Path, kind: str) -> None:
    types = quantise_gguf(wide, tmp_path / "q.gguf", kind, threads=1)
    assert types[kind.upper().removesuffix("_M")] >= 10 and types["F32"] == 5
    header = check_gguf(tmp_path / "q.gguf")
    assert (header.types, header.precision, header.shape) == (types, kind, check_gguf(wide).shape)
    source, made = GgufWeights(wide), GgufWeights(tmp_path / "q.gguf")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        error = np.abs(made.tensor(name) - source.tensor(name)).mean() / np.abs(source.tensor(name)).mean()
        assert error < {"q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06}.get(kind, 0.15)


def test_quantising_that_cannot_be_done(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise_gguf(wide, tmp_path / "q8.gguf", "q8_0", threads=1)
    with pytest.raises(ConversionError, match="Q8_0 already"):
        quantise_gguf(tmp_path / "q8.gguf", tmp_path / "q.gguf", "q4_0")
    with pytest.raises(ConversionError, match="q3_k"):
        quantise_gguf(wide, tmp_path / "q.gguf", "q3_k")
    (tmp_path / "cut.gguf").write_bytes(wide.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="cut off"):
        quantise_gguf(tmp_path / "cut.gguf", tmp_path / "q.gguf", "q4_0")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="GB free"):
        quantise_gguf(wide, tmp_path / "q.gguf", "q4_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "q8.gguf"]


def test_a_file_that_lacks_a_tensor_is_refused(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    write_gguf(weights, tokenizer, tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelFileError, match="ffn_up"):
        GgufWeights(tmp_path / "m.gguf")
