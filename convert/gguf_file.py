"""Writes a checkpoint as GGUF for llama.cpp, one tensor at a time, by the `gguf` package.

It knows llama.cpp's tensor names and layouts. Quantised values come from a hook and are written exactly as given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.backends.reference import inverse_frequencies
from edgeguard.convert.gguf_tokenizer import Vocabulary, from_json
from edgeguard.errors import ConversionError, RuntimeMissingError
from edgeguard.gguf_check import FILE_TYPES, check_gguf
from edgeguard.weights import Weights, expected, read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from gguf.gguf_writer import TensorInfo

    from edgeguard.convert.quantize import Int4Blocks, Int8Rows

FloatType = Literal["f32", "f16", "bf16"]
Quantised = Callable[[str], "Int8Rows | Int4Blocks | None"]
Progress = Callable[[int, int, str], None]
"""Called with tensors done, tensors in all, and the name of the next one."""

BLOCK = 32
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def rope_rows(name: str, shape: Shape) -> NDArray[np.int64] | None:
    """The order of a tensor's rows in GGUF, None for unchanged: llama.cpp turns neighbours, Hugging Face turns halves of a head."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.rsplit(".", 2)[-2])
    if heads is None:
        return None
    rows = np.arange(heads * shape.head_dim, dtype=np.int64)
    return np.asarray(rows.reshape(heads, 2, shape.head_dim // 2).swapaxes(1, 2).ravel())


def rope_factors(shape: Shape) -> NDArray[np.float32] | None:
    """What llama.cpp divides RoPE's frequencies by (head_dim / 2,), or None without scaling."""
    if shape.rope_scaling is None:
        return None
    plain = inverse_frequencies(shape.head_dim, shape.rope_theta, None)
    return (plain / inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)).astype(np.float32)


def write_gguf(weights: Weights, tokenizer_json: Path, out: Path, *, type: FloatType = "f16",  # noqa: A002, the contract's word
               quantised: Quantised | None = None, name: str = "", metadata: Mapping[str, str] | None = None,
               progress: Progress | None = None) -> dict[str, int]:
    """Writes `out` and gives the number of tensors of each type.

    Norms stay float32. A matrix for which `quantised` gives Int8Rows becomes Q8_0, Int4Blocks Q4_0, with float16 scales.
    Writes `out`.partial, checks it and renames. Raises `ConversionError` for weights that the type cannot hold.
    """
    try:
        import gguf
    except ImportError:
        raise RuntimeMissingError("gguf", "convert") from None
    shape = weights.shape
    vocabulary = from_json(read_json(tokenizer_json), shape.vocab)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_shape(writer, shape)
    _add_vocabulary(writer, vocabulary)
    for key, text in ({"general.name": name} | dict(metadata or {})).items():
        writer.add_string(key, text)
    try:
        _write(writer, partial, weights, type.upper(), quantised, progress)
        types = check_gguf(partial).types
        partial.replace(out)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return types


def _add_shape(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.vocab)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    # for other programs: edgeguard puts the BOS by id
    writer.add_add_bos_token(vocabulary.model == "llama" or vocabulary.pre == "llama-bpe")
    writer.add_add_space_prefix(vocabulary.space_prefix)


def _write(writer: GGUFWriter, path: Path, weights: Weights, kind: str, quantised: Quantised | None,
           progress: Progress | None) -> None:
    """Header, a table of tensors, the tensors, and the table again: only then are the types known that the hook chose.

    The table has the same length whatever it says; so each tensor is quantised once and kept nowhere.
    """
    from gguf.gguf_writer import WriterState

    shape = weights.shape
    sizes = expected(shape)
    factors = rope_factors(shape)
    extra = {} if factors is None else {ROPE_FACTORS: factors}
    if quantised is None:  # with a hook the types speak for themselves
        writer.add_file_type({name: number for number, name in FILE_TYPES.items()}[kind.lower()])
    writer.add_quantization_version(2)
    for name, size in [*((gguf_name(name), size) for name, size in sizes.items()), *((name, rows.shape) for name, rows in extra.items())]:
        writer.add_tensor_info(name, size, np.dtype(np.float32), 0)
    table = dict(writer.tensors[0])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    stream = writer.fout[0]
    start = stream.tell()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell())
    for done, name in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes), name)
        data, type_name = _stored(weights, name, kind, quantised)
        _put(writer, table, gguf_name(name), data, type_name)
    for name, rows in extra.items():
        _put(writer, table, name, rows, "F32")
    stream.seek(start)
    writer.tensors[0], writer.state = table, WriterState.KV_DATA
    writer.write_ti_data_to_file()
    writer.close()
    if progress is not None:
        progress(len(sizes), len(sizes), "")


def _put(writer: GGUFWriter, table: dict[str, TensorInfo], name: str, data: NDArray[Any], kind: str) -> None:
    """The data of the next tensor, and its entry in the table."""
    from gguf import GGMLQuantizationType

    stream = writer.fout[0]
    data.tofile(stream)
    writer.write_padding(stream, data.nbytes)
    table[name].dtype, table[name].nbytes = GGMLQuantizationType[kind], data.nbytes


def _stored(weights: Weights, name: str, kind: str, quantised: Quantised | None) -> tuple[NDArray[Any], str]:
    """A tensor as it lies in the file, and its type."""
    rows = rope_rows(name, weights.shape)
    order = slice(None) if rows is None else rows
    blocks = None if quantised is None else quantised(name)
    if blocks is not None:
        return _blocks(name, blocks.values[order], blocks.scales[order])
    values = weights.tensor(name)[order]
    if values.ndim == 1:
        kind = "F32"
    data = _CASTS[kind](values)
    if not np.isfinite(values).all() or (kind == "F16" and not np.isfinite(data).all()):
        raise ConversionError(f"{name} holds values that are not finite or that {kind} cannot hold; choose bf16 or f32.")
    return data, kind


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest, halves to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # told by `_stored`
        return values.astype("<f2")


_CASTS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "F32": np.ascontiguousarray, "F16": _float16, "BF16": lambda values: _bfloat16(np.ascontiguousarray(values)),
}


def _blocks(name: str, values: NDArray[Any], scales: NDArray[np.float32]) -> tuple[NDArray[np.uint8], str]:
    """Blocks of 32 weights, a float16 scale before each: Q8_0 from int8 rows, Q4_0 from 4-bit values.

    Q4_0 keeps the first 16 weights of a block in the low halves of its bytes, the others in the high ones.
    """
    out, width = values.shape
    if width % BLOCK:
        raise ConversionError(f"{name} has {width} columns, GGUF's blocks need a multiple of {BLOCK}.")
    half = scales.astype("<f2")
    if not np.array_equal(half.astype(np.float32), scales):
        raise ConversionError(f"{name} has scales that are no float16 numbers; GGUF would round them.")
    grouped = values.reshape(out, -1, BLOCK)
    half = np.broadcast_to(half[:, None] if half.ndim == 1 else half, grouped.shape[:2])
    scale_bytes = np.ascontiguousarray(half)[..., None].view(np.uint8)
    if values.dtype == np.int8:
        return np.concatenate([scale_bytes, grouped.view(np.uint8)], -1), "Q8_0"
    packed = grouped[..., :BLOCK // 2] | (grouped[..., BLOCK // 2:] << 4)
    return np.concatenate([scale_bytes, packed.astype(np.uint8)], -1), "Q4_0"
