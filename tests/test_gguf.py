"""Checkpoints to GGUF and back, and vocabularies both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from vocabularies import messages, write_llama_2, write_smollm

from edgeguard.architecture import Shape
from edgeguard.convert import gguf_tokenizer
from edgeguard.convert.gguf_file import rope_factors, write_gguf
from edgeguard.convert.gguf_source import GgufWeights, tokenizer_json
from edgeguard.convert.quantize import Int4Blocks, Int8Rows, int4_blocks, int8_rows
from edgeguard.errors import ConversionError, ModelFileError
from edgeguard.gguf_check import check_gguf
from edgeguard.weights import Rows, SafetensorsWeights, expected

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

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        return self.values[name][index]

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
    kinds = {name: "Q4_0" if "mlp" in name or "k_proj" in name else "Q8_0"
             for name, values in weights.values.items() if values.ndim == 2 and name != "lm_head.weight"}
    made: dict[str, Int8Rows | Int4Blocks] = {}

    def quantised(name: str) -> Int8Rows | Int4Blocks:
        assert name not in made, "each tensor is quantised once"
        made[name] = (int4_blocks if kinds[name] == "Q4_0" else int8_rows)(name, weights.values[name])
        return made[name]

    types = write_gguf(weights, tokenizer, tmp_path / "m.gguf", quantised=quantised, kinds=kinds)
    assert types == {"Q8_0": 7, "Q4_0": 8, "F16": 1, "F32": 5}
    back = GgufWeights(tmp_path / "m.gguf")
    for name, tensor in made.items():
        np.testing.assert_array_equal(back.tensor(name), tensor.dequantised())
    # in llama.cpp's own reading of a block, too
    stored, kind = back.raw("model.layers.1.mlp.up_proj.weight")
    assert (kind, stored.shape) == ("Q4_0", (96, 64 // 32 * 18))


def test_progress_counts_the_bytes_of_a_16_bit_source(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    seen: list[tuple[str, int, int]] = []
    write_gguf(weights, tokenizer, tmp_path / "m.gguf", progress=lambda *step: seen.append(step))
    total = 2 * weights.shape.parameters
    assert total == 2 * sum(values.size for values in weights.values.values())
    assert (seen[0], seen[-1]) == (("gguf", 0, total), ("gguf", total, total))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("index", [slice(30, 50), np.array([63, 0, 31, 32])])
def test_rows_of_a_gguf_are_those_of_its_tensor(small: tuple[RandomWeights, Path], tmp_path: Path, index: Rows) -> None:
    weights, tokenizer = small
    write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="q8_0", threads=1)
    back = GgufWeights(tmp_path / "m.gguf")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        np.testing.assert_array_equal(back.rows(name, index), back.tensor(name)[index])


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
    weights.values["model.norm.weight"][0] = 1
    for scale, kind, reason in ((0.1, "Q8_0", "no float16"), (0.5, "Q4_0", "not quantised so")):
        tensor = "model.layers.0.mlp.up_proj.weight"
        given = Int8Rows(np.zeros((96, 64), np.int8), np.full(96, scale, np.float32))
        with pytest.raises(ConversionError, match=reason):
            write_gguf(weights, tokenizer, out, quantised={tensor: given}.get, kinds={tensor: kind})
    with pytest.raises(ConversionError, match="q3_k"):
        write_gguf(weights, tokenizer, out, type="q3_k")
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


def test_a_file_that_lacks_a_tensor_is_refused(small: tuple[RandomWeights, Path], tmp_path: Path) -> None:
    weights, tokenizer = small
    write_gguf(weights, tokenizer, tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelFileError, match="ffn_up"):
        GgufWeights(tmp_path / "m.gguf")
