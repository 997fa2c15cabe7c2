"""Vocabularies for tests: small ones of other kinds than Llama 3's, and any of them as a GGUF without weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def messages() -> list[str]:
    """Short harmless texts of free licences, among them odd Unicode."""
    with gzip.open(DATA / "messages.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_gguf(source: Path, target: Path, pre: str, kinds: dict[str, int] | None = None) -> Path:
    """A GGUF with the vocabulary of a BPE `tokenizer.json` and no tensors; `kinds` sets types of single tokens."""
    import gguf

    data = json.loads(source.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    names = {id_: name for name, id_ in {**data["model"]["vocab"], **added}.items()}
    types = dict.fromkeys(added, gguf.TokenType.CONTROL) | (kinds or {})
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names[id_] for id_ in range(len(names))])
    writer.add_token_types([types.get(names[id_], gguf.TokenType.NORMAL) for id_ in range(len(names))])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return target


def write_smollm(target: Path) -> Path:
    """A small vocabulary split as SmolLM2's: digits one by one, `unsafe` in two tokens, ids of control tokens first."""
    return _save(target, _byte_level(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def write_llama_2(target: Path) -> Path:
    """A small vocabulary of the kind of Llama 2's: a space put in front, no splitting, bytes for what is unknown."""
    controls = ["<unk>", "<s>", "</s>"]
    vocab = {token: id_ for id_, token in enumerate([*controls, *(f"<0x{byte:02X}>" for byte in range(256))])}
    words = ["un", "sa", "fe", "safe", "▁s", "▁sa", "▁safe", "▁un", "▁unsafe", "Sa", "Un", "10", "11"]
    for piece in [*map(chr, range(33, 127)), "▁", *words]:
        vocab.setdefault(piece, len(vocab))
    merges = ["u n", "s a", "f e", "sa fe", "▁ s", "▁ sa", "▁s a", "▁ un", "▁un safe", "▁sa fe", "▁ safe", "S a", "U n"]
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for token in controls
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges},
    }
    target.write_text(json.dumps(data), encoding="utf-8")
    return target


def _byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(target: Path, tokenizer: Any, controls: list[str]) -> Path:
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=controls, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    texts = [*messages(), *["safe uns"] * 400, *["afe"] * 90]
    tokenizer.train_from_iterator([text for text in texts if "<|" not in text], trainer)
    tokenizer.save(str(target))
    return target
