"""Outlier channels moved from activations into weights before both are rounded: the model stays the same function.

SmoothQuant (https://arxiv.org/abs/2211.10438). What a linear layer reads is divided by a factor for each channel, the layer's
columns are multiplied by it, and the division is written into what makes the channel: the norm before q, k, v and before
gate, up; the rows of v before o (heads that share a value share its factors); the rows of up before down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.base import FloatArray
from edgeguard.convert.pieces import pieces
from edgeguard.weights import Rows, Weights, expected

STRENGTH, STRENGTH_IN_4_BITS = 0.55, 0.4
"""Of the move: 0 leaves all range to the activations, 1 gives all of it to the weights; in 4 bits these bear less of it."""
LEAST = 1e-5  # of a peak: a channel that is always zero says nothing
MOST = 100.0  # a factor, up or down
READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""By the name under which a walk observes an input: the linear layers that read it."""
MAKERS = {
    "self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj", "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""What makes the channels of that input."""


def ranges(_name: str, value: FloatArray) -> FloatArray:
    """What is kept of an observed input (tokens, width): largest magnitude and mean square of each channel (2, width)."""
    return np.stack([np.abs(value).max(0), np.square(value).mean(0)])


class SmoothedWeights:
    """A checkpoint by the `Weights` protocol that computes what the given one computes, with smaller outliers.

    `observed` holds for each observed input what `ranges` gives. Factors of a layer are computed when it is first read.
    """

    def __init__(self, weights: Weights, observed: Mapping[str, FloatArray], strength: float = STRENGTH) -> None:
        self.weights, self.shape, self.strength = weights, weights.shape, strength
        self._observed = observed
        self._sizes = expected(weights.shape)
        self._factors: dict[int, dict[str, FloatArray]] = {}

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return self.weights.names()

    def tensor(self, name: str) -> FloatArray:
        """A float32 copy of one tensor."""
        return self._scaled(name, self.weights.tensor(name), slice(None))

    def rows(self, name: str, index: Rows) -> FloatArray:
        """A float32 copy of some rows of a tensor."""
        return self._scaled(name, self.weights.rows(name, index), index)

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor that nothing was moved into as stored, any other in float32."""
        return (self.tensor(name), "F32") if name.startswith("model.layers.") else self.weights.raw(name)

    def values(self, given: FloatArray) -> FloatArray:
        """Values of the given model's cache (layers, tokens, kv_heads, head_dim) as those of this one; its keys are the same."""
        factors = np.stack([self._of_layer(layer)["self_attn.o_proj"] for layer in range(self.shape.layers)])
        return np.asarray(given / factors.reshape(self.shape.layers, 1, self.shape.kv_heads, self.shape.head_dim))

    def importance(self, name: str) -> FloatArray | None:
        """How much each column of a matrix counts (in,): the mean square of what it is multiplied with; None where that was not seen."""
        if not name.startswith("model.layers."):
            return None
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        for place, readers in READERS.items():
            if part in readers:
                factor = self._of_layer(int(layer))[place]
                columns = self._shared(factor) if part == "self_attn.o_proj" else factor
                return np.asarray(self._observed[f"model.layers.{layer}.{place}"][1] / np.square(columns))
        return None

    def _scaled(self, name: str, values: FloatArray, index: Rows) -> FloatArray:
        if not name.startswith("model.layers."):
            return values
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        for place, factor in self._of_layer(int(layer)).items():
            if part in READERS[place]:
                values = values * (self._shared(factor) if part == "self_attn.o_proj" else factor)
            elif part == MAKERS[place]:
                own = factor[index]
                values = values / (own if values.ndim == 1 else own[:, None])
        return values

    def _of_layer(self, layer: int) -> dict[str, FloatArray]:
        """By observed input the factor of each channel that its maker makes."""
        if layer not in self._factors:
            self._factors[layer] = {place: self._factor(f"model.layers.{layer}.", place) for place in READERS}
        return self._factors[layer]

    def _factor(self, prefix: str, place: str) -> FloatArray:
        read = np.maximum(self._observed[prefix + place][0], LEAST)
        weight = np.max([self._columns(f"{prefix}{reader}.weight") for reader in READERS[place]], 0)
        if place == "self_attn.o_proj":
            read, weight = self._grouped(read), self._grouped(weight)
        factor = read**self.strength / np.maximum(weight, LEAST) ** (1 - self.strength)
        factor /= np.exp(np.log(factor).mean())
        return np.asarray(np.clip(factor, 1 / MOST, MOST), np.float32)

    def _columns(self, name: str) -> FloatArray:
        """The largest magnitude in each column of a matrix."""
        rows, width = self._sizes[name]
        return np.asarray(np.max([np.abs(self.weights.rows(name, part)).max(0) for part in pieces(rows, width)], 0))

    def _grouped(self, values: FloatArray) -> FloatArray:
        """(heads * head_dim) to (kv_heads * head_dim): the largest of the heads that share a value."""
        return np.asarray(values.reshape(self.shape.kv_heads, -1, self.shape.head_dim).max(1).ravel())

    def _shared(self, factor: FloatArray) -> FloatArray:
        """(kv_heads * head_dim) to (heads * head_dim)."""
        groups = self.shape.heads // self.shape.kv_heads
        return factor.reshape(self.shape.kv_heads, 1, -1).repeat(groups, 1).ravel()
