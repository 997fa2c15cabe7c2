"""Which type each tensor of a GGUF gets: llama.cpp's mixes for a plain Llama decoder, as data.

The rules are those of llama.cpp's `llama_model_quantize` without an importance matrix (src/llama-quant.cpp); tests hold them against it.
"""

from __future__ import annotations

from typing import NamedTuple

from edgeguard.architecture import Shape
from edgeguard.errors import ConversionError
from edgeguard.gguf_check import TENSOR_TYPES
from edgeguard.weights import expected


class Mix(NamedTuple):
    """Types of a file's matrices; norms are F32 in every mix."""

    usual: str
    head: str
    """Of the output matrix, which for tied weights is the embedding."""
    sensitive: str
    """Of `SENSITIVE` layers' matrices that lie where `more_bits` says so."""


SENSITIVE = ("self_attn.v_proj.weight", "mlp.down_proj.weight")
MIXES = {
    "f32": Mix("F32", "F32", "F32"),
    "f16": Mix("F16", "F16", "F16"),
    "bf16": Mix("BF16", "BF16", "BF16"),
    "q8_0": Mix("Q8_0", "Q8_0", "Q8_0"),
    "q6_k": Mix("Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": Mix("Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": Mix("Q4_K", "Q6_K", "Q6_K"),
    "q4_0": Mix("Q4_0", "Q6_K", "Q4_0"),
}
"""By the names of `gguf_check.FILE_TYPES`."""
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q4_0": "F16", "Q5_0": "F16", "Q5_1": "F16", "Q8_0": "F16"}
"""What a type gives way to where a row is no whole number of its blocks."""
MANY_LAYERS = 80
"""With so many and fewer KV heads than heads, llama.cpp takes the model for the 70B, whose shared values it keeps at 5 bits or more."""

# name -> weights in a block, bytes of a block
BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_types(shape: Shape, precision: str) -> dict[str, str]:
    """The type of every tensor, by its Hugging Face name; raises `ConversionError` for a precision that is not in `MIXES`."""
    if precision not in MIXES:
        raise ConversionError(f"GGUF has no precision {precision!r} here; there are {', '.join(MIXES)}.")
    return {name: "F32" if len(size) == 1 else _fitting(_wanted(name, shape, MIXES[precision]), size[1])
            for name, size in expected(shape).items()}


def nbytes(kind: str, size: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type; its last size is that of a row."""
    block, width = BLOCKS[kind]
    rows = 1
    for each in size[:-1]:
        rows *= each
    return rows * (size[-1] // block) * width


def _wanted(name: str, shape: Shape, mix: Mix) -> str:
    if name == ("model.embed_tokens.weight" if shape.tied else "lm_head.weight"):
        return mix.head
    if not name.endswith(SENSITIVE):
        return mix.usual
    kind = mix.sensitive if more_bits(int(name.split(".")[2]), shape.layers) else mix.usual
    if kind == "Q4_K" and name.endswith(SENSITIVE[0]) and shape.layers == MANY_LAYERS and shape.heads != shape.kv_heads:
        return "Q5_K"
    return kind


def _fitting(kind: str, width: int) -> str:
    while width % BLOCKS[kind][0]:
        kind = FALLBACKS[kind]
    return kind
