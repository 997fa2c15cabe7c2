"""The numbers of a model, read from config.json: what no Llama has is refused, whoever wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from edgeguard.architecture import Shape
from edgeguard.bench.checkpoint import config
from edgeguard.bench.synthetic import LLAMA_GUARD_2
from edgeguard.errors import ModelFileError

CONFIG: dict[str, Any] = {**config(LLAMA_GUARD_2), "head_dim": None}  # as in Meta's


def test_llama_guard_2() -> None:
    shape = Shape.from_config(CONFIG)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn) == (32, 32, 8, 128, 14336)
    assert Shape(**shape.to_dict()) == shape
    assert Shape.from_config({**CONFIG, "num_key_value_heads": None, "head_dim": 64, "tie_word_embeddings": None}).head_dim == 64


@pytest.mark.parametrize(("change", "says"), [
    ({"model_type": "mistral"}, "'mistral'"), ({"attention_bias": True}, "biases"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; whole numbers from 1 to 1024"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"), ({"vocab_size": -5}, "vocab_size is -5"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"hidden_size": "x"}, "hidden_size is 'x'"),
    ({"num_attention_heads": None}, "num_attention_heads is None"),
    ({"intermediate_size": float("inf")}, "intermediate_size is inf"), ({"intermediate_size": 0.5}, "intermediate_size is 0.5"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"), ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be"), ({"num_key_value_heads": 5}, "32 heads cannot share 5"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"), ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
    ({"rope_scaling": 8}, "not that of a Llama"), ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks"),
])
def test_what_no_llama_has_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        Shape.from_config({**CONFIG, **change})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"])
def test_what_lacks_is_named(name: str) -> None:
    with pytest.raises(ModelFileError, match=f"lacks '{name}'"):
        Shape.from_config({key: value for key, value in CONFIG.items() if key != name})
