"""Shared fixtures: the true Llama 3 tokenizer and tiny random Llama models, made once a machine and kept in pytest's cache folder."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# set before any library reads them: nothing may look for a hub or into the user's own models, and tiny products need no threads
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ["EDGEGUARD_HOME"] = tempfile.mkdtemp(prefix="edgeguard-tests-")

LLAMA_3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
TINY: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "plain": (64, 128, 4, 4, False),
        "gqa": (96, 160, 6, 2, True),
        "wide": (256, 512, 8, 2, False),  # a multiple of 256, as K-quants want it
    }.items()
}


def llama_3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3 by their place from id 128000, as Meta's tokenizer.json names them."""
    names, reserved = [], 0
    for place in range(256):
        if place in LLAMA_3_SPECIAL:
            names.append(f"<|{LLAMA_3_SPECIAL[place]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def write_llama_3_tokenizer(path: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("llama_models")
    assert spec is not None and spec.origin is not None, "the extra 'test' brings llama-models"
    source = Path(spec.origin).parent / "llama3" / "tokenizer.model"
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = TikTokenConverter(vocab_file=str(source), pattern=pattern, additional_special_tokens=llama_3_special_tokens()).converted()
    data = json.loads(tokenizer.to_str())
    data["post_processor"] = None  # edgeguard adds the one BOS by id
    data["model"]["ignore_merges"] = True  # as Meta's tokenizer.json has it
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Path:
    """A folder that outlives the run, for what is slow to make."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("edgeguard"))


@pytest.fixture(scope="session")
def llama3_tokenizer(kept: Path) -> Path:
    """tokenizer.json with the true Llama 3 vocabulary, from the PyPI package llama-models."""
    path = kept / "llama3" / "tokenizer.json"
    if not path.exists():
        write_llama_3_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, llama3_tokenizer: Path) -> Callable[[str], Path]:
    """`tiny_llama(name)` is a Hugging Face folder with a random model of the shape `name` and the Llama 3 tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("tiny")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(list(TINY).index(name))
            config = LlamaConfig(
                vocab_size=128256, num_hidden_layers=3, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
                bos_token_id=128000, eos_token_id=128001, initializer_range=0.08, **TINY[name],
            )
            model = LlamaForCausalLM(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms of all ones would hide a norm that is left out
                        parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(llama3_tokenizer.read_bytes())
        return folder

    return make
