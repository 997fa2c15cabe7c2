"""Writes a checkpoint as GGUF for llama.cpp: header and table first, then tensor after tensor in pieces of rows.

It knows llama.cpp's tensor names and layouts; the header is made by the `gguf` package. Which type a tensor gets is known
beforehand (`gguf_mix`), so that a killed writing can be taken up where it was.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.architecture import Shape
from edgeguard.backends.reference import inverse_frequencies
from edgeguard.convert.gguf_mix import nbytes, tensor_types
from edgeguard.convert.gguf_quantize import PIECE, quantise
from edgeguard.convert.gguf_tokenizer import Vocabulary, from_json
from edgeguard.convert.journal import GrowingFile
from edgeguard.convert.pieces import in_order, pieces
from edgeguard.errors import ConversionError, RuntimeMissingError
from edgeguard.gguf_check import FILE_TYPES, check_gguf
from edgeguard.machine import default_threads
from edgeguard.store.files import Progress
from edgeguard.weights import Rows, Weights, expected, read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from edgeguard.convert.quantize import Importance, Int4Blocks, Int8Rows

Quantised = Callable[[str], "Int8Rows | Int4Blocks | None"]
Blocks = Callable[[str, str, Rows], NDArray[np.uint8]]
"""Rows of a matrix as they lie in the file, by its name, its type and which rows."""

BLOCK = 32
ALIGNMENT = 32
"""Bytes; GGUF's default."""
SOURCE_BYTES = 2
"""Of a weight, as progress counts them."""
HEADER = "header"
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


def write_gguf(weights: Weights, tokenizer_json: Path, out: Path, *, type: str = "f16",  # noqa: A002, the contract's word
               quantised: Quantised | None = None, kinds: Mapping[str, str] | None = None, blocks: Blocks | None = None,
               name: str = "", importance: Importance | None = None, metadata: Mapping[str, str] | None = None, threads: int | None = None,
               identity: Mapping[str, Any] | None = None,
               progress: Progress | None = None) -> dict[str, int]:
    """Writes `out` and gives the number of tensors of each type.

    `type` is a key of `gguf_mix.MIXES`; blocks are made by ggml, on `threads` threads. Tensors named in `kinds` (`Q8_0`, `Q4_0`)
    are got from `quantised` instead, as Int8Rows or Int4Blocks, and written exactly as given, with float16 scales. `blocks`,
    if there is one, makes all other matrices: of tensor name, type and rows the bytes of the blocks (rows, bytes of a row).
    `importance(name)` is what errors in the columns of a matrix matter, None for all alike; ggml weighs them in types of few bits.
    Norms stay float32. Never more than a few pieces of rows are in memory, beside what `quantised` gives.
    With an `identity` (source, settings, builder) a writing that was killed is taken up again, see `convert.journal`.
    Writes `out`.partial, checks it and renames. `progress("gguf", done, total)` counts bytes of a source of 16 bits.
    Raises `ConversionError` for weights that the type cannot hold.
    """
    kinds, threads = kinds or {}, threads or default_threads()
    types = tensor_types(weights.shape, type) | dict(kinds)
    vocabulary = from_json(read_json(tokenizer_json), weights.shape.vocab)
    # with tensors from elsewhere the types speak for themselves
    header = _header(weights.shape, vocabulary, types, None if kinds else type, {"general.name": name} | dict(metadata or {}))
    if identity is not None:
        identity = {**identity, "header": hashlib.sha256(header).hexdigest()}
    with GrowingFile(out, identity) as file:
        if file.finished(HEADER) is None:
            with file.piece(HEADER) as write:
                write(np.frombuffer(header, np.uint8))
        done, total = 0, weights.shape.parameters
        for tensor, size in expected(weights.shape).items():
            given = quantised if tensor in kinds else None
            if file.finished(gguf_name(tensor)) is None:
                with file.piece(gguf_name(tensor), ALIGNMENT) as write:
                    rows = 0
                    for part in _parts(weights, tensor, size, types[tensor], given, blocks, importance, threads):
                        _tell(progress, done + rows * size[-1], total)
                        write(part)
                        rows += len(part)
            done += math.prod(size)
        _tell(progress, done, total)
        factors = rope_factors(weights.shape)
        if factors is not None and file.finished(ROPE_FACTORS) is None:
            with file.piece(ROPE_FACTORS, ALIGNMENT) as write:
                write(factors)
        file.pad(ALIGNMENT)
        return file.complete(check_gguf).types


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("gguf", done * SOURCE_BYTES, total * SOURCE_BYTES)


def _header(shape: Shape, vocabulary: Vocabulary, types: Mapping[str, str], type: str | None,  # noqa: A002, as in `write_gguf`
            texts: Mapping[str, str]) -> bytes:
    """Everything before the first tensor: sizes, vocabulary, and the table of tensors."""
    try:
        import gguf
        from gguf.gguf_writer import WriterState
    except ImportError:
        raise RuntimeMissingError("gguf", "convert") from None
    writer = gguf.GGUFWriter(None, "llama")
    _add_shape(writer, shape)
    _add_vocabulary(writer, vocabulary)
    for key, text in texts.items():
        writer.add_string(key, text)
    if type is not None:
        writer.add_file_type({name: number for number, name in FILE_TYPES.items()}[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    table = {gguf_name(name): (size, types[name]) for name, size in expected(shape).items()}
    factors = rope_factors(shape)
    if factors is not None:
        table[ROPE_FACTORS] = factors.shape, "F32"
    for name, (size, kind) in table.items():
        writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes(kind, size), gguf.GGMLQuantizationType[kind])
    stream = io.BytesIO()
    writer.fout, writer.state = [stream], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell(), ALIGNMENT)
    return stream.getvalue()


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


def _parts(weights: Weights, name: str, size: tuple[int, ...], kind: str, quantised: Quantised | None, blocks: Blocks | None,
           importance: Importance | None, threads: int) -> Iterator[NDArray[Any]]:
    """A tensor as it lies in the file, in pieces of rows."""
    order = rope_rows(name, weights.shape)
    places = [slice(0, size[0])] if len(size) == 1 else list(pieces(size[0], size[1], PIECE))
    indices = (place if order is None else order[place] for place in places)
    if quantised is not None:
        given = quantised(name)
        return (_blocks(name, kind, given, index) for index in indices)
    if blocks is not None and len(size) == 2:
        return (blocks(name, kind, index) for index in indices)
    columns = importance(name) if importance is not None and len(size) == 2 else None
    return in_order(lambda index: quantise(name, kind, weights.rows(name, index), columns), indices, threads)


def _blocks(name: str, kind: str, given: Int8Rows | Int4Blocks | None, index: Rows) -> NDArray[np.uint8]:
    """Rows as blocks of 32 weights, a float16 scale before each: Q8_0 from int8 rows, Q4_0 from 4-bit values.

    Q4_0 keeps the first 16 weights of a block in the low halves of its bytes, the others in the high ones.
    """
    if given is None or kind != ("Q8_0" if given.values.dtype == np.int8 else "Q4_0"):
        raise ConversionError(f"{name} was to be {kind}, but was not quantised so.")
    values, scales = given.values[index], given.scales[index]
    if values.shape[1] % BLOCK:
        raise ConversionError(f"{name} has {values.shape[1]} columns, GGUF's blocks need a multiple of {BLOCK}.")
    half = scales.astype("<f2")
    if not np.array_equal(half.astype(np.float32), scales):
        raise ConversionError(f"{name} has scales that are no float16 numbers; GGUF would round them.")
    grouped = values.reshape(len(values), -1, BLOCK)
    half = np.broadcast_to(half[:, None] if half.ndim == 1 else half, grouped.shape[:2])
    scale_bytes = np.ascontiguousarray(half)[..., None].view(np.uint8)
    if kind == "Q8_0":
        return np.concatenate([scale_bytes, grouped.view(np.uint8)], -1)
    packed = grouped[..., :BLOCK // 2] | (grouped[..., BLOCK // 2:] << 4)
    return np.concatenate([scale_bytes, packed.astype(np.uint8)], -1)
