"""Vocabularies between tokenizer.json and GGUF metadata, both ways, with equal ids.

The kind of a vocabulary is read from what tokenizer.json does with text, never from a model's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeguard.errors import ConversionError
from edgeguard.gguf_check import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of llama.cpp
SPACE = "\u2581"  # SentencePiece's visible space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


# how text is cut into words, by llama.cpp's name for it (`tokenizer.ggml.pre`)
WORDS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA_3_WORDS}, "behavior": "Isolated", "invert": False},
        _byte_level(False),
    ],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "gpt-2": [_byte_level(True)],
}
WHOLE_WORDS_FIRST = {"llama-bpe"}
"""Kinds that take a word of the vocabulary as it is before they merge (`ignore_merges`); llama.cpp knows it by `pre`."""

# the first of these that a vocabulary has
SPECIAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<|im_start|>", "<|endoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<|im_end|>", "<|endoftext|>"),
    "eot": ("<|eot_id|>", "<|im_end|>"),
    "unknown": ("<unk>",),
}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as GGUF metadata has it."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    pre: str
    tokens: list[str] = field(repr=False)
    types: list[int] = field(repr=False)
    merges: list[str] = field(repr=False)
    """`a b`, in order; empty for SentencePiece."""
    scores: list[float] = field(repr=False)
    """One for each token; empty for byte-level BPE."""
    special: Mapping[str, int]
    """Ids by `bos`, `eos`, `eot`, `unknown`."""
    space_prefix: bool
    """A space goes before the text."""


def from_json(data: Mapping[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to `size` tokens; raises `ConversionError` for kinds that are unknown."""
    model = data["model"]
    if model.get("type") != "BPE" or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ConversionError("tokenizer.json is no plain BPE vocabulary; Llama models have one.")
    pieces = bool(model.get("byte_fallback")) and _is_sentencepiece(data)
    pre = "default" if pieces else _words_of(data)
    if not pieces and bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS_FIRST):
        raise ConversionError(f"tokenizer.json cuts words like {pre!r}, but its ignore_merges is not what llama.cpp does there.")
    tokens, types = _tokens(data, size, pieces)
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [(entry.split(" ") if isinstance(entry, str) else entry) for entry in model["merges"]]
    return Vocabulary(
        model="llama" if pieces else "gpt2", pre=pre, tokens=tokens, types=types,
        merges=[] if pieces else [f"{left} {right}" for left, right in pairs],
        scores=_scores(tokens, types, pairs) if pieces else [],
        special={name: ids[found[0]] for name, known in SPECIAL.items()
                 if (found := [token for token in known if token in ids and types[ids[token]] in (CONTROL, UNKNOWN)])},
        space_prefix=pieces and _prepends(data),
    )


def to_json(header: GgufHeader) -> dict[str, Any]:
    """tokenizer.json rebuilt from a GGUF's metadata; it adds no BOS. Raises `ConversionError` for kinds that are unknown."""
    metadata = header.metadata
    tokens, types = (metadata[f"tokenizer.ggml.{name}"].values() for name in ("tokens", "token_type"))
    pieces, pre = metadata["tokenizer.ggml.model"] == "llama", metadata.get("tokenizer.ggml.pre", "")
    if not pieces and pre not in WORDS:
        raise ConversionError(f"The vocabulary cuts words like {pre!r}; edgeguard knows {sorted(WORDS)}. Give the model's tokenizer.json.")
    added = [index for index, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED) or (pieces and kind == UNKNOWN)]
    vocab = {token: index for index, token in enumerate(tokens[:_ordinary(types)])}
    merges = _pairs(vocab, types, metadata["tokenizer.ggml.scores"].values()) if pieces else [
        entry.split(" ") for entry in metadata["tokenizer.ggml.merges"].values()
    ]
    unknown = next((tokens[index] for index, kind in enumerate(types) if kind == UNKNOWN), None)
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown if pieces else None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": pieces, "byte_fallback": pieces, "ignore_merges": pre in WHOLE_WORDS_FIRST,
        "vocab": vocab, "merges": merges,
    }
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(index, tokens[index], types[index] != USER_DEFINED) for index in added],
        **(_piece_steps(metadata.get("tokenizer.ggml.add_space_prefix", True)) if pieces else _byte_steps(pre)),
        "post_processor": None, "model": model,
    }


def _steps(part: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The members of a normalizer or pre-tokenizer, sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for child in part[children] for step in _steps(child, children)]
    return [part]


def _words_of(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how tokenizer.json cuts words."""
    if _steps(data.get("normalizer"), "normalizers"):
        raise ConversionError("tokenizer.json rewrites text before it cuts words; llama.cpp has no such step for this vocabulary.")
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    for name, wanted in WORDS.items():
        if [_essence(step) for step in steps] == [_essence(step) for step in wanted]:
            return name
    raise ConversionError(f"tokenizer.json cuts words in a way that edgeguard does not know; it knows {sorted(WORDS)}.")


def _essence(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a pre-tokenizer's step decides ids."""
    names = {"ByteLevel": ("add_prefix_space", "use_regex"), "Digits": ("individual_digits",), "Split": ("pattern", "behavior", "invert")}
    return (step["type"], *(step.get(name) for name in names.get(step["type"], ())))


def _is_sentencepiece(data: Mapping[str, Any]) -> bool:
    """Spaces become U+2581 and nothing else is cut."""
    normalizers = _steps(data.get("normalizer"), "normalizers")
    cuts = _steps(data.get("pre_tokenizer"), "pretokenizers")
    replaces = any(step["type"] == "Replace" and step.get("content") == SPACE for step in normalizers)
    metaspace = any(step["type"] == "Metaspace" and not step.get("split", True) for step in cuts)
    known = {step["type"] for step in normalizers} <= {"Prepend", "Replace"} and {step["type"] for step in cuts} <= {"Metaspace"}
    return known and (replaces or metaspace)


def _prepends(data: Mapping[str, Any]) -> bool:
    """A space goes before the text."""
    steps = [*_steps(data.get("normalizer"), "normalizers"), *_steps(data.get("pre_tokenizer"), "pretokenizers")]
    return any(step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never") for step in steps)


def _tokens(data: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that nothing has are filled."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    entries = [(token, index, BYTE if pieces and BYTE_TOKEN.fullmatch(token) else NORMAL)
               for token, index in data["model"]["vocab"].items()]
    entries += [(entry["content"], entry["id"], CONTROL if entry["special"] else USER_DEFINED) for entry in data["added_tokens"]]
    if pieces and data["model"].get("unk_token") is not None:
        unknown = data["model"]["unk_token"]
        entries.append((unknown, data["model"]["vocab"][unknown], UNKNOWN))
    for token, index, kind in entries:
        if not 0 <= index < size:
            raise ConversionError(f"tokenizer.json has a token with the id {index}; the model's vocabulary has {size}.")
        tokens[index], types[index] = token, kind
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[int], pairs: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece merges the pair whose piece scores highest: the earlier a piece is merged, the higher.

    It merges whatever makes a piece; a vocabulary that holds a piece without its merges cannot be written.
    """
    rank: dict[str, int] = {}
    for left, right in pairs:
        rank.setdefault(left + right, len(rank))
    ordinary = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for token in ordinary - rank.keys():
        if any(token[:cut] in ordinary and token[cut:] in ordinary for cut in range(1, len(token))):
            raise ConversionError(f"tokenizer.json holds the piece {token!r} but no merge that makes it; SentencePiece would make it.")
    return [-float(rank.get(token, 0)) for token in tokens]


def _pairs(vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Merges from scores, as SentencePiece applies them: all ways to a piece, best piece first."""
    pieces = sorted((index for index in vocab.values() if types[index] == NORMAL), key=lambda index: -scores[index])
    names = {index: token for token, index in vocab.items()}
    merges = []
    for token in (names[index] for index in pieces):
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab]
        merges += [list(way) for way in sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))]
    return merges


def _ordinary(types: Sequence[int]) -> int:
    """How many tokens the BPE model itself holds: control tokens at the end are added tokens only, if nothing is missing there."""
    last = max((index for index, kind in enumerate(types) if kind in (NORMAL, BYTE, UNKNOWN)), default=-1) + 1
    controls = max((index for index, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)), default=-1) + 1
    return controls if UNUSED in types[last:controls] else last


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    return {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def _byte_steps(pre: str) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": WORDS[pre]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _piece_steps(space_prefix: bool) -> dict[str, Any]:
    prepend = [{"type": "Prepend", "prepend": SPACE}] if space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }
