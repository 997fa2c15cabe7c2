"""The reference twin against transformers, which shares no code with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeguard.backends.base import Run
from edgeguard.backends.reference import ReferenceBackend, inverse_frequencies
from edgeguard.errors import CancelledError, ContextLengthError, DeadlineError, InferenceError
from edgeguard.weights import SafetensorsWeights

IDS = [128000, 791, 3363, 39257, 198, 50, 16, 21861, 605, 128001, 220, 2646]


@pytest.mark.parametrize("name", ["plain", "gqa", "wide"])
def test_logits_equal_transformers(tiny_llama: Callable[[str], Path], name: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama(name), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0, -1].numpy()
    backend = ReferenceBackend(SafetensorsWeights(tiny_llama(name)))
    root = backend.open(IDS[:4], Run())
    node = backend.extend([(root, IDS[4:9])], Run())[0]
    node = backend.extend([(node, IDS[9:])], Run())[0]
    assert node.length == len(IDS)
    np.testing.assert_allclose(node.logits, wanted, atol=1e-4)
    np.testing.assert_allclose(backend.open(IDS, Run()).logits, wanted, atol=1e-4)


def test_llama_3_rope_scaling_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_theta=500000.0, rope_scaling=scaling)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(inverse_frequencies(128, 500000.0, scaling), wanted.numpy(), rtol=1e-6)


def test_siblings_do_not_see_each_other(tiny_llama: Callable[[str], Path]) -> None:
    backend = ReferenceBackend(SafetensorsWeights(tiny_llama("gqa")))
    root = backend.open(IDS[:4], Run())
    alone = backend.extend([(root, IDS[4:8])], Run())[0]
    pair = backend.extend([(root, IDS[8:]), (root, IDS[4:8])], Run())
    np.testing.assert_array_equal(alone.logits, pair[1].logits)


def test_faults_are_errors(tiny_llama: Callable[[str], Path]) -> None:
    backend = ReferenceBackend(SafetensorsWeights(tiny_llama("plain")))
    with pytest.raises(ContextLengthError, match="8193"):
        backend.open([1] * 8193, Run())
    cancelled = Run()
    cancelled.cancel()
    with pytest.raises(CancelledError):
        backend.open(IDS, cancelled)
    with pytest.raises(DeadlineError):
        backend.open(IDS, Run.within(0))
    backend.open(IDS, Run())
    backend._kept["model.norm.weight"] = np.full(64, np.nan, np.float32)
    with pytest.raises(InferenceError, match="finite"):
        backend.open(IDS, Run())
