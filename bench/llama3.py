"""The true Llama 3 vocabulary as a tokenizer.json, from Meta's file in the package llama-models."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeguard.convert.gguf_tokenizer import WORDS
from edgeguard.errors import RuntimeMissingError

SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
"""Names of special tokens by their place behind the text's tokens; the others are reserved."""
SPECIALS = 256


def write_tokenizer(path: Path) -> None:
    """Write the tokenizer.json of Llama 3 without a BOS of its own; raises `RuntimeMissingError` without llama-models."""
    found = importlib.util.find_spec("llama_models")
    if found is None or found.origin is None:
        raise RuntimeMissingError("llama-models (it holds the Llama 3 vocabulary)", "bench")
    lines = (Path(found.origin).parent / "llama3" / "tokenizer.model").read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    path.write_text(json.dumps(tokenizer_json(ranks), ensure_ascii=False), encoding="utf-8")


def tokenizer_json(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The byte-level BPE that merges as tiktoken does: always the pair whose joint token has the lowest rank."""
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = [{"id": len(ranks) + place, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for place, name in enumerate(special_tokens())]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": WORDS["llama-bpe"]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {spelled[token]: rank for token, rank in ranks.items()},
                  "merges": [[spelled[left], spelled[right]] for left, right in _merges(ranks)]},
    }


def special_tokens() -> list[str]:
    """Llama 3's special tokens by their place."""
    reserved = iter(range(SPECIALS))
    return [f"<|{SPECIAL[place]}|>" if place in SPECIAL else f"<|reserved_special_token_{next(reserved)}|>" for place in range(SPECIALS)]


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to join two tokens to a third, in the order of the third's rank."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=lambda each: ranks[each]):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _letters() -> dict[int, str]:
    """Byte-level BPE's visible letter for each byte: printable Latin-1 stands for itself, the others are counted on from 256."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
