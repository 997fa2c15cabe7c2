"""A random Llama model with a vocabulary of its own, small enough to be converted in a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard import store
from edgeguard.architecture import Shape
from edgeguard.convert import guard_graph
from edgeguard.convert.gate_texts import conversations
from edgeguard.profiles import get
from edgeguard.prompt import render
from edgeguard.store import Artifact, Manifest
from edgeguard.weights import SafetensorsWeights, expected

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
}
CONTROLS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Llama 3's, which llama.cpp knows


def write_small_tokenizer(path: Path) -> int:
    """A byte-level BPE tokenizer.json that splits like Llama 3's, trained on a few prompts; gives the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=CONTROLS, show_progress=False)
    prompts = [render(get("llama-guard-2"), conversation).text for conversation in conversations()]
    answers = ["safe", "unsafe", "Safe", "Unsafe", " safe or unsafe", "unsafe\nS1,S10"] * 50
    tokenizer.train_from_iterator([*prompts, *answers], trainer)
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def write_small_model(folder: Path, seed: int = 0, *, tied: bool = False) -> Path:
    """A Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    vocab = write_small_tokenizer(folder / "tokenizer.json")
    config = {**CONFIG, "vocab_size": vocab, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(1.0 if len(size) == 1 else 0.0, 0.04, size).astype(np.float32)
               for name, size in expected(Shape.from_config(config)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_small_artifact(source: Path, folder: Path, precision: Any, head_ids: tuple[int, ...]) -> Artifact:
    """A guard graph of a small model, without prefixes and without a tokenizer that could be used."""
    weights = SafetensorsWeights(source)
    guard_graph.build(weights, folder, precision=precision, head_ids=head_ids)
    (folder / "tokenizer.json").write_text("{}")
    files = {name: each for name, each in store.records(folder).items() if not name.startswith(".")}
    Manifest(name="tiny", kind="onnx", profile="edgeguard-mini", precision=precision, weights="model.onnx", files=files,
             shape=weights.shape, head_ids=head_ids).write(folder)
    return Artifact.read(folder)
