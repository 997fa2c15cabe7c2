"""The slow readable twin: a Llama decoder in NumPy float32. The fast backends are held against it, and it against transformers.

It knows token ids and weights only. Nothing is fused, packed or approximated: every entry is evaluated by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.base import BackendInfo, FloatArray, Node, Run
from edgeguard.errors import ContextLengthError, InferenceError
from edgeguard.weights import Weights

Cache = list[tuple[FloatArray, FloatArray]]
"""Keys (after RoPE) and values of a node's own tokens, for each layer: (kv_heads, tokens, head_dim)."""


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> NDArray[np.float64]:
    """RoPE's inverse frequencies (head_dim / 2,), with the stretching of Llama 3.1 (`rope_type` llama3) when asked for."""
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inverse
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(inverse * (smooth + (1 - smooth) / factor))


class ReferenceBackend:
    """The backend contract over `Weights`; the whole vocabulary is the head."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.shape = weights, weights.shape
        self._frequencies = inverse_frequencies(self.shape.head_dim, self.shape.rope_theta, self.shape.rope_scaling)
        self._kept: dict[str, FloatArray] = {}
        self.info = BackendInfo(
            name="reference", runtime=f"numpy {np.__version__}", device="cpu", precision="fp32", threads=1,
            context=self.shape.context, head_ids=np.arange(self.shape.vocab, dtype=np.int64),
        )

    def open(self, prefix_ids: Sequence[int], run: Run) -> Node:
        """Evaluate a prefix."""
        return self._evaluate(None, prefix_ids, run)

    def extend(self, entries: Sequence[tuple[Node, Sequence[int]]], run: Run) -> list[Node]:
        """Evaluate every entry by itself."""
        return [self._evaluate(node, ids, run) for node, ids in entries]

    def close(self, node: Node) -> None:
        """Nothing to do: a node's cache goes with the node."""

    def shutdown(self) -> None:
        """Forget the weights."""
        self._kept.clear()

    def _tensor(self, name: str) -> FloatArray:
        if name not in self._kept:
            self._kept[name] = self.weights.tensor(name)
        return self._kept[name]

    def _evaluate(self, parent: Node | None, ids: Sequence[int], run: Run) -> Node:
        if not ids:
            raise ValueError("A node needs at least one token.")
        before = 0 if parent is None else parent.length
        if before + len(ids) > self.shape.context:
            raise ContextLengthError(before + len(ids), self.shape.context)
        positions = np.arange(before, before + len(ids))
        x = self._tensor("model.embed_tokens.weight")[np.asarray(ids)]
        cache: Cache = []
        for layer in range(self.shape.layers):
            run.check()
            x = self._layer(layer, x, positions, _past(parent, layer), cache)
        last = self._norm(x[-1:], "model.norm.weight")
        logits = (last @ self._tensor("model.embed_tokens.weight" if self.shape.tied else "lm_head.weight").T)[0]
        if not np.isfinite(logits).all():
            raise InferenceError("The model gave logits that are not finite; its weights are damaged.")
        return Node(before + len(ids), logits, parent, cache)

    def _layer(self, layer: int, x: FloatArray, positions: NDArray[np.int64],
               past: tuple[list[FloatArray], list[FloatArray]], cache: Cache) -> FloatArray:
        """One decoder layer: (T, hidden) to (T, hidden); its keys and values are added to `cache`."""
        name = f"model.layers.{layer}."
        normed = self._norm(x, f"{name}input_layernorm.weight")
        q, k, v = (self._heads(self._linear(normed, f"{name}self_attn.{part}_proj")) for part in "qkv")
        attended = self._remembering(self._rotate(q, positions), self._rotate(k, positions), v, past, cache)
        x = x + self._linear(attended, f"{name}self_attn.o_proj")
        normed = self._norm(x, f"{name}post_attention_layernorm.weight")
        gate = self._linear(normed, f"{name}mlp.gate_proj")
        with np.errstate(over="ignore"):
            activated = gate / (1 + np.exp(-gate))
        return np.asarray(x + self._linear(activated * self._linear(normed, f"{name}mlp.up_proj"), f"{name}mlp.down_proj"))

    def _linear(self, value: FloatArray, name: str) -> FloatArray:
        """A linear layer, named without `.weight`."""
        return np.asarray(value @ self._tensor(f"{name}.weight").T)

    def _remembering(self, q: FloatArray, k: FloatArray, v: FloatArray,
                     past: tuple[list[FloatArray], list[FloatArray]], cache: Cache) -> FloatArray:
        """Attention to the past and to the own tokens, whose keys and values go into `cache`."""
        cache.append((k, v))
        return self._attend(q, np.concatenate([*past[0], k], 1), np.concatenate([*past[1], v], 1))

    def _norm(self, x: FloatArray, name: str) -> FloatArray:
        """RMSNorm."""
        return np.asarray(x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(self.shape.rms_eps)) * self._tensor(name))

    def _heads(self, x: FloatArray) -> FloatArray:
        """(T, heads * head_dim) to (heads, T, head_dim)."""
        return np.asarray(x.reshape(len(x), -1, self.shape.head_dim).transpose(1, 0, 2))

    def _rotate(self, x: FloatArray, positions: NDArray[np.int64]) -> FloatArray:
        """RoPE as Hugging Face lays it out: the first half of a head turns with the second."""
        angles = positions[:, None] * self._frequencies[None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def _attend(self, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        """Causal attention of the last T of S tokens: (heads, T, d), (kv_heads, S, d) to (T, heads * d)."""
        group = self.shape.heads // self.shape.kv_heads
        k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(self.shape.head_dim))
        new, total = scores.shape[1:]
        scores = np.where(np.tri(new, total, total - new, dtype=bool), scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        return np.asarray(out.transpose(1, 0, 2).reshape(new, -1), np.float32)


def _past(node: Node | None, layer: int) -> tuple[list[FloatArray], list[FloatArray]]:
    """Keys and values of a node and its ancestors in one layer, root first."""
    keys: list[FloatArray] = []
    values: list[FloatArray] = []
    while node is not None:
        key, value = node.state[layer]  # type: ignore[index]
        keys.insert(0, key)
        values.insert(0, value)
        node = node.parent
    return keys, values
