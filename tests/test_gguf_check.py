"""The pre-check of GGUF files: what is damaged or lies is refused before native code sees it."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeguard.errors import ModelFileError
from edgeguard.gguf_check import GgufArray, check_gguf

TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "a", "b", "ab"]
KINDS = {bool: 7, int: 4, float: 6, str: 8}
FORMATS = {7: "?", 4: "I", 6: "f"}
METADATA: dict[str, Any] = {
    "general.architecture": "llama", "general.file_type": 0, "llama.context_length": 64, "llama.embedding_length": 8,
    "llama.block_count": 1, "llama.feed_forward_length": 16, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
}
TENSORS: list[tuple[str, tuple[int, ...], int, int]] = [("token_embd.weight", (8, 5), 0, 160), ("output_norm.weight", (8,), 0, 32)]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):  # as it is
        return value
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 5
        items = b"".join(text(item) if kind == 8 else struct.pack("<i", item) for item in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    kind = KINDS[type(value)]
    return struct.pack("<I", kind) + (text(value) if kind == 8 else struct.pack("<" + FORMATS[kind], value))


def build(metadata: dict[str, Any] | None = None, tensors: list[Any] = TENSORS, version: int = 3, extra: bytes = b"",
          keys: int = 0) -> bytes:
    """A GGUF file by hand; tensors are (name, sizes innermost first, type, bytes) and an optional offset."""
    entries = {**METADATA, **(metadata or {})}
    entries = {key: value for key, value in entries.items() if value is not None}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries) + keys)
    head += b"".join(text(key) + value_bytes(value) for key, value in entries.items()) + extra
    offset, data = 0, b""
    for name, sizes, kind, nbytes, *place in tensors:
        head += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place[0] if place else offset)
        data += bytes(-(-nbytes // 32) * 32)
        offset = len(data)
    return head + bytes(-len(head) % 32) + data


def check(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return check_gguf(path)


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    header = check(tmp_path, build())
    assert (header.shape.hidden, header.shape.vocab, header.shape.kv_heads, header.shape.tied) == (8, 5, 1, True)
    assert header.shape.rms_eps == 1e-5
    assert (header.precision, header.types) == ("f32", {"F32": 2})
    assert header.tensors["token_embd.weight"].shape == (5, 8)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GgufArray)
    assert (tokens.values(), tokens[2]) == (TOKENS, "a")
    assert header.metadata["tokenizer.ggml.token_type"].values() == [3, 3, 1, 1, 1]


def test_every_cut_is_refused(tmp_path: Path) -> None:
    data = build()
    for length in [*range(0, len(data) - 200, 7), len(data) - 200, len(data) - 100, len(data) - 1]:
        with pytest.raises(ModelFileError):
            check(tmp_path, data[:length])
    with pytest.raises(ModelFileError, match="cut off"):
        check(tmp_path, data[:-1])
    with pytest.raises(ModelFileError, match="empty"):
        check(tmp_path, b"")
    with pytest.raises(ModelFileError, match="missing"):
        check_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        check_gguf(tmp_path)


@pytest.mark.parametrize(("data", "reason"), [
    (b"PK\3\4" + bytes(64), "'GGUF'"),
    (build(version=1), "version 1"),
    (build(version=0x03000000), "big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1), "tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 40), "keys"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1 << 63), "bytes long"),
    (build(extra=text("general.architecture") + value_bytes("llama"), keys=1), "twice"),
    (build({"x": struct.pack("<I", 77)}), "unknown type 77"),
    (build({"x": struct.pack("<IIQ", 9, 9, 1)}), "not allowed"),
    (build({"x": struct.pack("<IIQ", 9, 8, 1 << 62)}), "elements"),
    (build({"x": struct.pack("<IIQQ", 9, 8, 1, 1 << 62)}), "longer than the file"),
    (build({"general.alignment": 24}), "alignment"),
    (build({"general.alignment": "32"}), "alignment"),
    (build(tensors=[("t", (1,) * 5, 0, 4)]), "5 dimensions"),
    (build(tensors=[("t", (), 0, 4)]), "0 dimensions"),
    (build(tensors=[("t", (1 << 42, 4), 0, 4)]), "larger than the file"),
    (build(tensors=[("t", (8, 0), 0, 4)]), "impossible shape"),
    (build(tensors=[("t", (33,), 8, 34)]), "impossible shape"),
    (build(tensors=[("t", (8,), 5, 32)]), "unknown type 5"),
    (build(tensors=[("t" * 64, (8,), 0, 32)]), "64 bytes long"),
    (build(tensors=[*TENSORS, TENSORS[0]]), "twice"),
    (build(tensors=[TENSORS[0], ("output_norm.weight", (8,), 0, 32, 32)]), "overlap"),
])
def test_damage_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        check(tmp_path, data)


@pytest.mark.parametrize(("change", "reason"), [
    ({"general.architecture": "qwen2"}, "'qwen2' model"),
    ({"general.architecture": None}, "None model"),
    ({"split.count": 2}, "split"),
    ({"llama.expert_count": 8}, "experts"),
    ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    ({"tokenizer.ggml.pre": None}, "before May 2024"),
    ({"tokenizer.ggml.pre": "default"}, "before May 2024"),
    ({"tokenizer.ggml.merges": None}, "merges"),
    ({"tokenizer.ggml.tokens": "many"}, "tokens"),
    ({"tokenizer.ggml.tokens": [1, 2, 3, 4, 5]}, "tokens"),
    ({"tokenizer.ggml.token_type": [3, 3]}, "2 entries"),
    ({"tokenizer.ggml.token_type": [1, 3, 1, 1, 1]}, "ordinary text"),
    ({"tokenizer.ggml.bos_token_id": None}, "bos_token_id is None"),
    ({"tokenizer.ggml.eos_token_id": 5}, "no id of the vocabulary"),
    ({"tokenizer.ggml.bos_token_id": 1}, "has to be one of"),
    ({"tokenizer.ggml.tokens": TOKENS[:4], "tokenizer.ggml.token_type": [3, 3, 1, 1]}, r"embedding has shape \[5, 8\]"),
    ({"llama.embedding_length": 16}, "embedding"),
    ({"llama.block_count": 100_000}, "layers"),
    ({"llama.block_count": 0}, "block_count"),
    ({"llama.attention.head_count": "2"}, "head_count"),
    ({"llama.attention.head_count_kv": 3}, "fit together"),
    ({"llama.rope.freq_base": float("nan")}, "freq_base"),
])
def test_what_llama_guard_is_not_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        check(tmp_path, build(change))


VALID = build()


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6), cut=st.integers(0, len(VALID)))
def test_any_damage_parses_or_is_a_model_file_error(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID)
    for place, value in flips:
        data[place] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            header = check(tmp_path, damaged)
        except ModelFileError:
            continue
        assert header.shape.vocab == 5


def test_a_large_vocabulary_takes_less_than_a_second(tmp_path: Path) -> None:
    many = 128_256
    tokens = [*TOKENS[:2], *(f"token{index}" for index in range(many - 2))]
    change = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3] + [1] * (many - 2),
              "tokenizer.ggml.merges": ["a b"] * 280_000}
    data = build(change, [("token_embd.weight", (8, many), 0, many * 32)])
    started = time.perf_counter()
    header = check(tmp_path, data)
    assert time.perf_counter() - started < 1
    assert header.metadata["tokenizer.ggml.tokens"][many - 1] == f"token{many - 3}"
