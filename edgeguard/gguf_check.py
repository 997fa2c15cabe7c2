"""What a GGUF file says of itself, read in plain Python and refused when it lies, before native code sees the file.

It knows the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and what a Llama decoder needs; it loads
no weights and needs no package. Every count and length is held against a limit and against the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from edgeguard.architecture import Shape
from edgeguard.errors import ModelFileError

MAX_KEYS, MAX_TENSORS, MAX_ARRAY = 4096, 16384, 1 << 22
MAX_KEY, MAX_STRING, MAX_NAME = 1024, 1 << 24, 63  # bytes; ggml keeps tensor names in 64
MAX_DIMS, MAX_LAYERS, MAX_ALIGNMENT = 4, 512, 1 << 16
SHORT_ARRAY = 1024  # longer ones stay in the file

# struct format of each scalar type, by its number in the file; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, INT32, FLOAT32 = 8, 9, 5, 6

# tensor types: number in the file -> name, weights in a block, bytes of a block
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}
FILE_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s", 12: "q3_k_m",
              13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 32: "bf16"}
NORMAL_TOKEN = 1

SPECIAL_TOKENS = {
    "llama-bpe": {"bos": {"<|begin_of_text|>"}, "eos": {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}},
}
"""What the special ids of a known vocabulary have to stand for, by `tokenizer.ggml.pre`."""


class GgufTensor(NamedTuple):
    """Where one tensor lies and how."""

    shape: tuple[int, ...]
    """Outermost first: (out, in) for a linear layer."""
    type: str
    """`F32`, `Q4_K`, ..."""
    offset: int
    """From the first byte of the file."""
    nbytes: int


@dataclass(frozen=True, eq=False)
class GgufArray:
    """A long array that stays in the file until asked for."""

    path: Path
    kind: int
    """Element type by its number in the file; `STRING` or a key of `SCALARS`."""
    starts: array[int] = field(repr=False)
    """Offset of each element and of the end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str | float:
        with self.path.open("rb") as stream:
            stream.seek(self.starts[index])
            return self._decoded(stream.read(self.starts[index + 1] - self.starts[index]))

    def values(self) -> list[Any]:
        """All elements: `str` or numbers; raises `ModelFileError` for a string that is not UTF-8."""
        first = self.starts[0]
        with self.path.open("rb") as stream:
            stream.seek(first)
            data = stream.read(self.starts[-1] - first)
        if self.kind != STRING:
            return list(struct.unpack(f"<{len(self)}{SCALARS[self.kind]}", data))
        ends = self.starts[1:]
        return [self._decoded(data[start - first:end - first]) for start, end in zip(self.starts, ends, strict=False)]

    def _decoded(self, data: bytes) -> str | float:
        if self.kind != STRING:
            value: float = struct.unpack("<" + SCALARS[self.kind], data)[0]
            return value
        try:
            return data[8:].decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(f"{self.path} holds a token that is not UTF-8; the file is damaged.") from None


@dataclass(frozen=True)
class GgufHeader:
    """Everything of a GGUF file but its weights."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, bools, strings, short lists, and `GgufArray` for long ones."""
    tensors: Mapping[str, GgufTensor]
    """By llama.cpp's names, in the order of the file."""
    shape: Shape
    """`rope_scaling` is None here: a GGUF holds only its result, the tensor `rope_freqs.weight`."""

    @property
    def precision(self) -> str:
        """`f16`, `q4_k_m`, ...: the mix by its usual name, else the type that most bytes have."""
        named = FILE_TYPES.get(self.metadata.get("general.file_type", -1))
        if named is not None:
            return named
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        return max(sizes, key=lambda kind: sizes[kind]).lower()

    @property
    def types(self) -> dict[str, int]:
        """How many tensors each type has."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return counts


def check_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file that llama.cpp may load; raises `ModelFileError` with the reason for any other file."""
    with _mapped(path) as data:
        reader = _Reader(path, data)
        tensors_count, keys_count = reader.start()
        metadata, kinds = reader.metadata(keys_count)
        tensors = reader.tensors(tensors_count, metadata)
    _check_kind(path, metadata)
    _check_tokenizer(path, metadata, kinds)
    shape = _shape(path, metadata, tensors)
    return GgufHeader(path, metadata, tensors, shape)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as stream:
            if path.stat().st_size == 0:
                raise ModelFileError(f"{path} is empty.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except ModelFileError:
        raise
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from None


class _Reader:
    """Walks the file once; every step stays inside it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def bad(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is not a valid GGUF file: {what}.")

    def skip(self, count: int) -> int:
        """Where `count` bytes begin; the reader stands behind them."""
        start = self.at
        if count > self.size - start:
            raise self.bad("it ends in the middle of its header; it was cut off")
        self.at = start + count
        return start

    def number(self, code: str) -> Any:  # noqa: ANN401, a number of the kind that `code` says
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def text(self, limit: int, what: str) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.bad(f"{what} is {length} bytes long, {limit} are allowed")
        start = self.skip(length)
        try:
            return self.data[start:start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None

    def start(self) -> tuple[int, int]:
        """Numbers of tensors and of keys."""
        if self.data[:4] != b"GGUF":
            raise self.bad("it does not begin with 'GGUF'")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise self.bad(f"format version {version} is not 2 or 3 (a big-endian file reads so too)")
        tensors, keys = self.number("Q"), self.number("Q")
        if not 0 < tensors <= MAX_TENSORS:
            raise self.bad(f"it says it has {tensors} tensors, 1 to {MAX_TENSORS} are allowed")
        if keys > MAX_KEYS:
            raise self.bad(f"it says it has {keys} keys, {MAX_KEYS} are allowed")
        return tensors, keys

    def metadata(self, count: int) -> tuple[dict[str, Any], dict[str, int]]:
        """Values by key, and the element type of each array."""
        values: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for _ in range(count):
            key = self.text(MAX_KEY, "a key")
            if key in values:
                raise self.bad(f"the key {key!r} stands there twice")
            kind = self.number("I")
            if kind == ARRAY:
                values[key], kinds[key] = self.listed(key)
            elif kind == STRING:
                values[key] = self.text(MAX_STRING, f"the value of {key!r}")
            elif kind in SCALARS:
                values[key] = self.number(SCALARS[kind])
            else:
                raise self.bad(f"the value of {key!r} has the unknown type {kind}")
        return values, kinds

    def listed(self, key: str) -> tuple[Any, int]:
        """A list if it is short, else a `GgufArray`; and its element type."""
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING and kind not in SCALARS:
            raise self.bad(f"{key!r} is an array of the type {kind}, which is not allowed")
        if count > MAX_ARRAY:
            raise self.bad(f"the array {key!r} says it has {count} elements, {MAX_ARRAY} are allowed")
        starts = self.strings(key, count) if kind == STRING else self.scalars(kind, count)
        values = GgufArray(self.path, kind, starts)
        return (values if count > SHORT_ARRAY or key.startswith("tokenizer.") else values.values()), kind

    def scalars(self, kind: int, count: int) -> array[int]:
        width = struct.calcsize("<" + SCALARS[kind])
        start = self.skip(width * count)
        return array("Q", range(start, start + width * count + 1, width))

    def strings(self, key: str, count: int) -> array[int]:
        # a vocabulary has several 100,000 of them: the tightest loop that still checks each length
        data, size, at, length_of = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        if 8 * count > size - at:
            raise self.bad(f"the array {key!r} is longer than the file")
        starts = array("Q", [at])
        for _ in range(count):
            if at + 8 > size:
                raise self.bad(f"it ends inside the array {key!r}; it was cut off")
            at += 8 + length_of(data, at)[0]
            if at > size:
                raise self.bad(f"a string in the array {key!r} is longer than the file")
            starts.append(at)
        self.at = at
        return starts

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        """Tensors by name; each lies right behind the one before, all inside the file."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.bad(f"general.alignment is {alignment!r}, not a power of two from 8 to {MAX_ALIGNMENT}")
        entries = [self.tensor() for _ in range(count)]
        base, expected = _padded(self.at, alignment), 0
        found: dict[str, GgufTensor] = {}
        for name, tensor in entries:
            if name in found:
                raise self.bad(f"the tensor {name!r} stands there twice")
            if tensor.offset != expected:
                raise self.bad(f"the tensor {name!r} begins at {tensor.offset}, not {expected}: data overlap or have gaps")
            expected += _padded(tensor.nbytes, alignment)
            if base + expected > self.size:
                raise self.bad(f"the tensor {name!r} ends at byte {base + expected} of {self.size}; the file was cut off")
            found[name] = tensor._replace(offset=base + tensor.offset)
        return found

    def tensor(self) -> tuple[str, GgufTensor]:
        """One entry, its offset still from the start of the data."""
        name = self.text(MAX_NAME, "the name of a tensor")
        dims = self.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.bad(f"the tensor {name!r} has {dims} dimensions, 1 to {MAX_DIMS} are allowed")
        sizes = tuple(self.number("Q") for _ in range(dims))
        number, offset = self.number("I"), self.number("Q")
        if number not in TENSOR_TYPES:
            raise self.bad(f"the tensor {name!r} has the unknown type {number}")
        kind, block, width = TENSOR_TYPES[number]
        if 0 in sizes or sizes[0] % block:
            raise self.bad(f"the tensor {name!r} of type {kind} has the impossible shape {list(sizes)}")
        nbytes = math.prod(sizes) // block * width
        if nbytes > self.size:
            raise self.bad(f"the tensor {name!r} of shape {list(sizes)} is larger than the file; it was cut off or lies")
        return name, GgufTensor(sizes[::-1], kind, offset, nbytes)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    """Only a plain Llama decoder in one file goes on."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelFileError(f"{path} is a {_brief(architecture)} model; edgeguard reads 'llama' models only.")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelFileError(f"{path} is one part of a split model. Join the parts with llama-gguf-split --merge.")
    if metadata.get("llama.expert_count", 0) != 0:
        raise ModelFileError(f"{path} is a mixture of experts, which Llama Guard models are not.")


def _shape(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> Shape:
    """Sizes from the metadata, with an embedding that fits them."""
    def whole(key: str, default: int | None = None) -> int:
        value = metadata.get(f"llama.{key}", default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ModelFileError(f"{path} has no usable llama.{key} in its header: {_brief(value)}.")
        return value

    def real(key: str, default: float | None = None) -> float:
        value = metadata.get(f"llama.{key}", default)
        if type(value) is not float or not 0 < value < math.inf:
            raise ModelFileError(f"{path} has no usable llama.{key} in its header: {_brief(value)}.")
        return float(f"{value:.7g}")  # the decimal that the float32 in the file came from

    layers, hidden, heads = whole("block_count"), whole("embedding_length"), whole("attention.head_count")
    kv_heads = whole("attention.head_count_kv", heads)
    if layers > MAX_LAYERS:
        raise ModelFileError(f"{path} says it has {layers} layers, {MAX_LAYERS} are allowed.")
    if heads % kv_heads or ("llama.attention.key_length" not in metadata and hidden % heads):
        raise ModelFileError(f"{path}: {heads} heads, {kv_heads} key heads and width {hidden} do not fit together.")
    vocab = len(metadata["tokenizer.ggml.tokens"])
    embedding = tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (vocab, hidden):
        found = "is missing" if embedding is None else f"has shape {list(embedding.shape)}"
        raise ModelFileError(f"{path}: the embedding {found}, vocabulary and width are [{vocab}, {hidden}].")
    return Shape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=whole("attention.key_length", hidden // heads),
        ffn=whole("feed_forward_length"), vocab=vocab, context=whole("context_length"),
        rope_theta=real("rope.freq_base", 10000.0), rms_eps=real("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
    )


def _check_tokenizer(path: Path, metadata: Mapping[str, Any], kinds: Mapping[str, int]) -> None:
    """llama.cpp reads these arrays without looking at their types and lengths, and old converters wrote them wrongly."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model not in ("gpt2", "llama"):
        raise ModelFileError(f"{path} has a vocabulary of the kind {_brief(model)}; edgeguard reads 'gpt2' and 'llama'.")
    if model == "gpt2" and (not isinstance(pre, str) or pre in ("", "default")):
        raise ModelFileError(
            f"{path} does not say how text is split into words (tokenizer.ggml.pre): it was made by a converter from before "
            "May 2024 and would read numbers and spaces wrongly. Convert the model again."
        )
    for name, kind, needed in (("tokens", STRING, True), ("token_type", INT32, True), ("scores", FLOAT32, model == "llama"),
                               ("merges", STRING, model == "gpt2")):
        key = f"tokenizer.ggml.{name}"
        if kinds.get(key, kind) != kind or (key in metadata) != (key in kinds) or (needed and not len(metadata.get(key, ()))):
            raise ModelFileError(f"{path} has no usable {key} in its header.")
        if name in ("token_type", "scores") and key in metadata and len(metadata[key]) != len(metadata["tokenizer.ggml.tokens"]):
            raise ModelFileError(f"{path}: {key} has {len(metadata[key])} entries, the vocabulary another number.")
    _check_special(path, metadata, SPECIAL_TOKENS.get(pre or "", {}))


def _check_special(path: Path, metadata: Mapping[str, Any], known: Mapping[str, set[str]]) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for name in ("bos", "eos", "eot"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None and name not in known:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ModelFileError(f"{path}: {name}_token_id is {_brief(index)}, which is no id of the vocabulary. "
                                 "Convert the model again.")
        if types[index] == NORMAL_TOKEN:
            raise ModelFileError(f"{path} takes its {name} token, id {index}, for ordinary text; an old converter did that. "
                                 "Convert the model again.")
        if name in known and tokens[index] not in known[name]:
            raise ModelFileError(f"{path}: {name}_token_id is {index}, {tokens[index]!r}, but has to be one of "
                                 f"{sorted(known[name])}. Convert the model again.")


def _brief(value: object) -> str:
    """A value from a file as an error may show it."""
    return repr(value)[:80]
