"""Weights as a Hugging Face folder: bfloat16 in several safetensors files, streamed row by row.

Format: https://huggingface.co/docs/safetensors; the index as transformers writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeguard.architecture import Shape
from edgeguard.bench.blocks import bfloat16
from edgeguard.convert.journal import GrowingFile
from edgeguard.convert.pieces import pieces
from edgeguard.store.files import Progress, write_text
from edgeguard.weights import Weights, expected

SHARD = 5_000_000_000
"""Bytes of a file at most, as the hub has them; a larger tensor would have a file of its own."""
WIDTH = 2  # bytes of a weight


class Ends(NamedTuple):
    """The tokens that begin and end a text, and their ids."""

    begin: str
    begin_id: int
    end: str
    end_id: int


LLAMA_3 = Ends("<|begin_of_text|>", 128000, "<|end_of_text|>", 128001)


def write(weights: Weights, folder: Path, progress: Progress, ends: Ends = LLAMA_3) -> None:
    """Write config.json, the files and their index; the tokenizer.json is the caller's."""
    sizes = expected(weights.shape)
    total = WIDTH * weights.shape.parameters
    write_text(folder / "config.json", json.dumps(config(weights.shape, ends), indent=1) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends.begin,
                                                             "eos_token": ends.end, "model_max_length": weights.shape.context}) + "\n")
    files = list(_shards(sizes))
    place: dict[str, str] = {}
    done = 0
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        place |= dict.fromkeys(names, file)
        with GrowingFile(folder / file) as stream:
            with stream.piece("header") as put:
                put(np.frombuffer(_header({name: sizes[name] for name in names}), np.uint8))
            for name in names:
                with stream.piece(name) as put:
                    for part in pieces(sizes[name][0], math.prod(sizes[name][1:])):
                        progress("shards", done, total)
                        rows = bfloat16(weights.rows(name, part))
                        put(rows)
                        done += rows.nbytes
            stream.complete(lambda _path: None)
    progress("shards", total, total)
    write_text(folder / "model.safetensors.index.json", json.dumps({"metadata": {"total_size": total}, "weight_map": place}, indent=1))


def config(shape: Shape, ends: Ends = LLAMA_3) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta, "rope_scaling": shape.rope_scaling and dict(shape.rope_scaling),
        "tie_word_embeddings": shape.tied, "attention_bias": False, "bos_token_id": ends.begin_id, "eos_token_id": ends.end_id,
    }


def _shards(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        length = WIDTH * math.prod(size)
        if names and held + length > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += length
    yield names


def _header(sizes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Length and table of a safetensors file, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + WIDTH * math.prod(size)
        table[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
