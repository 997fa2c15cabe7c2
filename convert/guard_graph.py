"""The guard graph: a Llama decoder as ONNX, built layer by layer, that answers for a few rows and a few token ids.

Inputs, int64: `ids` and `positions` (T,); attention in G lanes, one for each sequence: `queries` (G, Q) tokens,
`places` (T,) of the tokens in the flattened `queries`, `keys` (G, S) tokens of past and pass in the order of their
positions from 0 (a query attends to the keys up to its own position); `rows` (R,) tokens to answer for, and their `lanes`
(R,). float32: `past_key_{i}` and `past_value_{i}` (kv_heads, P, head_dim) for each layer i; P may be 0.
Outputs, float32: `logits` (R, len(head_ids)); `new_key_{i}` (after RoPE) and `new_value_{i}` (kv_heads, T, head_dim).

Everything but the linear layers is computed in float32. In the last layer queries, attention and MLP are computed for the
asked rows only. Linear layers: fp32 and fp16 by Gemm; 8 bits by MatMulIntegerToFloat, activations quantised token by token,
so that a token's result does not depend on its neighbours in the pass; 4 bits by MatMulNBits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.reference import inverse_frequencies
from edgeguard.convert.onnx_writer import GraphWriter
from edgeguard.convert.quantize import BLOCK, Int4Blocks, Int8Rows, QuantisedTensor, int4_blocks, int8_rows
from edgeguard.errors import ConversionError
from edgeguard.weights import Weights, expected

Precision = Literal["fp32", "fp16", "int8", "int4"]
Progress = Callable[[str, int, int], None]
"""Told the stage, how many tensors are written, and how many there are."""
Hook = Callable[[str], QuantisedTensor | None]

MODEL, DATA = "model.onnx", "model.onnx.data"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
STEP, MIDDLE = np.float32(1 / 127), np.uint8(128)  # of activations between -1 and 1 in 8 bits

INPUTS: dict[str, list[int | str]] = {
    "ids": ["T"], "positions": ["T"], "queries": ["G", "Q"], "places": ["T"], "keys": ["G", "S"], "rows": ["R"], "lanes": ["R"],
}

Tensor = TypeVar("Tensor", NDArray[Any], Int8Rows, Int4Blocks)


@dataclass(frozen=True)
class Lanes:
    """Names of the values that lay out the queries of one attention."""

    rows: str | None
    """The tokens that ask, None for all."""
    queries: str
    places: str
    keys: str
    mask: str
    turns: list[str]


def build(weights: Weights, out_folder: Path, *, precision: Precision, head_ids: Sequence[int],
          quantised: Hook | None = None, progress: Progress | None = None) -> dict[str, int]:
    """Write model.onnx and model.onnx.data into `out_folder`; returns how many tensors are stored in each type.

    `head_ids` are the rows of the output projection to keep (none: all). `quantised(name)` may give a tensor that is
    quantised already (int8 and int4 only; a layer may have more bits than the rest); None leaves it to this function.
    It is also asked for `lm_head.weight`, of tied models too: what it gives is stored dequantised, in float32.
    Both files are written as `.partial` and renamed. Raises `ConversionError` for weights that are not finite.
    """
    builder = _Builder(weights, out_folder, precision, quantised or _no_hook, progress)
    return builder.build(np.asarray(head_ids, np.int64))


def _no_hook(_name: str) -> None:
    return None


class _Builder:
    """One build; every method adds nodes and gives the name of the value they compute."""

    def __init__(self, weights: Weights, folder: Path, precision: Precision, hook: Hook, progress: Progress | None) -> None:
        self.weights, self.shape, self.precision, self.hook, self.progress = weights, weights.shape, precision, hook, progress
        self.graph = GraphWriter(folder, MODEL, DATA)
        self.types: Counter[str] = Counter()
        self.stepped: dict[str, tuple[str, str]] = {}
        self.total = len(expected(self.shape)) + self.shape.tied
        self.group = self.shape.heads // self.shape.kv_heads

    def build(self, head_ids: NDArray[np.int64]) -> dict[str, int]:
        shape, graph = self.shape, self.graph
        with graph:
            for name, sizes in INPUTS.items():
                graph.input(name, np.int64, sizes)
            graph.output("logits", np.float32, ["R", len(head_ids) or shape.vocab])
            every, asked = self.lanes_of_all(), self.lanes_of_rows()
            residual = self.embedded()
            normed = graph.node("SimplifiedLayerNormalization", [residual, self.norm("model.layers.0.input_layernorm.weight")],
                                axis=-1, epsilon=shape.rms_eps)
            for layer in range(shape.layers):
                last = layer == shape.layers - 1
                after = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
                attended = self.attention(layer, normed, every, asked if last else every)
                if last:
                    residual = graph.node("Gather", [residual, "rows"])
                normed, residual = self.add_and_norm(residual, attended, f"model.layers.{layer}.post_attention_layernorm.weight")
                normed, residual = self.add_and_norm(residual, self.mlp(layer, normed), after)
            graph.node("Gemm", [normed, self.head(head_ids)], ["logits"], transB=1)
        return dict(self.types)

    def lanes_of_all(self) -> Lanes:
        """The layout of the queries of all tokens."""
        graph = self.graph
        mask = self.mask(graph.node("Gather", ["positions", "queries"]), "keys")
        return Lanes(None, "queries", "places", "keys", mask, self.turns("positions"))

    def lanes_of_rows(self) -> Lanes:
        """The layout of the queries of the asked rows: each a lane of its own."""
        graph = self.graph
        positions, keys = graph.node("Gather", ["positions", "rows"]), graph.node("Gather", ["keys", "lanes"])
        count = graph.node("Squeeze", [graph.node("Shape", ["rows"])])
        places = graph.node("Range", [graph.constant(0), count, graph.constant(1)])
        queries = graph.node("Unsqueeze", [places, graph.constant([1])])
        mask = self.mask(graph.node("Unsqueeze", [positions, graph.constant([1])]), keys)
        return Lanes("rows", queries, places, keys, mask, self.turns(positions))

    def mask(self, positions: str, keys: str) -> str:
        """0 for the keys up to each query's position (G, Q), else minus infinity: (G, group * Q, S)."""
        graph = self.graph
        columns = graph.node("Squeeze", [graph.node("Shape", [keys], start=1)])
        columns = graph.node("Range", [graph.constant(0), columns, graph.constant(1)])
        seen = graph.node("LessOrEqual", [columns, graph.node("Unsqueeze", [positions, graph.constant([2])])])
        mask = graph.node("Where", [seen, graph.constant(np.float32(0)), graph.constant(np.float32(-np.inf))])
        return graph.node("Tile", [mask, graph.constant([1, self.group, 1])])

    def attention(self, layer: int, normed: str, every: Lanes, asked: Lanes) -> str:
        """Grouped-query attention of the asked tokens; the queries of one key head are stacked, so that no key is repeated."""
        graph, shape = self.graph, self.shape
        prefix = f"model.layers.{layer}.self_attn."
        asking = graph.node("Gather", [normed, asked.rows]) if asked.rows else normed
        query, key, value = (self.linear(read, f"{prefix}{name}_proj.weight")
                             for name, read in (("q", asking), ("k", normed), ("v", normed)))
        query, key = self.rotated(query, shape.heads, asked.turns), self.rotated(key, shape.kv_heads, every.turns)
        query = graph.node("Reshape", [query, graph.constant([0, shape.kv_heads, self.group, shape.head_dim])])
        query = graph.node("Transpose", [graph.node("Gather", [query, asked.queries])], perm=[2, 0, 3, 1, 4])
        query = graph.node("Reshape", [query, graph.constant([shape.kv_heads, 0, -1, shape.head_dim])])
        key, value = self.joined(f"key_{layer}", key, asked.keys), self.joined(f"value_{layer}", value, asked.keys)
        scores = graph.node("FusedMatMul", [query, key], domain="com.microsoft", transB=1, alpha=float(shape.head_dim**-0.5))
        shares = graph.node("Softmax", [graph.node("Add", [scores, asked.mask])], axis=-1)
        seen = graph.node("MatMul", [shares, value])
        seen = graph.node("Reshape", [seen, graph.constant([shape.kv_heads, 0, self.group, -1, shape.head_dim])])
        seen = graph.node("Transpose", [seen], perm=[1, 3, 0, 2, 4])
        seen = graph.node("Reshape", [seen, graph.constant([-1, shape.heads * shape.head_dim])])
        return self.linear(graph.node("Gather", [seen, asked.places]), f"{prefix}o_proj.weight")

    def mlp(self, layer: int, normed: str) -> str:
        """SwiGLU."""
        prefix = f"model.layers.{layer}.mlp."
        gate, up = self.linear(normed, f"{prefix}gate_proj.weight"), self.linear(normed, f"{prefix}up_proj.weight")
        gate = self.graph.node("QuickGelu", [gate], domain="com.microsoft", alpha=1.0)  # x * sigmoid(x)
        return self.linear(self.graph.node("Mul", [gate, up]), f"{prefix}down_proj.weight")

    def joined(self, name: str, new: str, keys: str) -> str:
        """Past keys or values and the new ones, which are outputs too, gathered for each lane: (kv_heads, G, S, head_dim)."""
        graph, shape = self.graph, self.shape
        graph.input(f"past_{name}", np.float32, [shape.kv_heads, "P", shape.head_dim])
        graph.output(f"new_{name}", np.float32, [shape.kv_heads, "T", shape.head_dim])
        new = graph.node("Reshape", [new, graph.constant([0, shape.kv_heads, shape.head_dim])])
        new = graph.node("Transpose", [new], [f"new_{name}"], perm=[1, 0, 2])
        return graph.node("Gather", [graph.node("Concat", [f"past_{name}", new], axis=1), keys], axis=1)

    def turns(self, positions: str) -> list[str]:
        """RoPE's places in its table, and the table: cosines and sines of these positions only, whatever the context."""
        graph = self.graph
        inverse = inverse_frequencies(self.shape.head_dim, self.shape.rope_theta, self.shape.rope_scaling)
        first = graph.constant([0])
        angles = graph.node("Unsqueeze", [graph.node("Cast", [positions], to=1), graph.constant([1])])
        angles = graph.node("Mul", [angles, graph.constant(inverse.astype(np.float32)[None])])
        count = graph.node("Squeeze", [graph.node("Shape", [positions])])
        places = graph.node("Range", [graph.constant(0), count, graph.constant(1)])
        return [graph.node("Unsqueeze", [places, first]), graph.node("Cos", [angles]), graph.node("Sin", [angles])]

    def rotated(self, value: str, heads: int, turns: list[str]) -> str:
        """RoPE over (T, heads * head_dim)."""
        graph = self.graph
        batch = graph.node("Unsqueeze", [value, graph.constant([0])])
        turned = graph.node("RotaryEmbedding", [batch, *turns], domain="com.microsoft", num_heads=heads)
        return graph.node("Squeeze", [turned, graph.constant([0])])

    def add_and_norm(self, residual: str, change: str, name: str) -> tuple[str, str]:
        """RMSNorm of the sum, and the sum."""
        outputs = [self.graph.fresh("normed"), "", "", self.graph.fresh("residual")]
        self.graph.node("SkipSimplifiedLayerNormalization", [residual, change, self.norm(name)], outputs,
                        domain="com.microsoft", epsilon=self.shape.rms_eps)
        return outputs[0], outputs[3]

    def norm(self, name: str) -> str:
        return self.graph.tensor(name, self.counted(name, "float32", self.weights.tensor(name)))

    def counted(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The tensor, entered under its type; floats are refused unless all are finite."""
        if isinstance(tensor, np.ndarray) and not np.isfinite(tensor).all():
            raise ConversionError(f"{name} holds numbers that {kind} does not; the source may be damaged.")
        self.types[kind] += 1
        if self.progress:
            self.progress("graph", sum(self.types.values()), self.total)
        return tensor

    def embedded(self) -> str:
        """Rows of the embedding in float32; stored at 8 bits for int8 and int4."""
        graph = self.graph
        if self.precision in FLOATS:
            found = graph.node("Gather", [self.float_tensor(EMBEDDING), "ids"])
            return found if self.precision == "fp32" else graph.node("Cast", [found], to=1)
        rows = self.hook(EMBEDDING) or int8_rows(EMBEDDING, self.weights.tensor(EMBEDDING))
        if not isinstance(rows, Int8Rows):
            raise ConversionError("The embedding is stored at 8 bits; it was given at 4.")
        self.counted(EMBEDDING, "int8", rows)
        table, scales = graph.tensor(EMBEDDING, rows.values), graph.tensor(f"{EMBEDDING}.scale", rows.scales[:, None])
        found = graph.node("Cast", [graph.node("Gather", [table, "ids"])], to=1)
        return graph.node("Mul", [found, graph.node("Gather", [scales, "ids"])])

    def head(self, head_ids: NDArray[np.int64]) -> str:
        """The output projection's rows of the kept ids."""
        given = self.hook(HEAD) if self.precision not in FLOATS else None
        table = given.dequantised() if given else self.weights.tensor(EMBEDDING if self.shape.tied else HEAD)
        return self.graph.tensor(HEAD, self.counted(HEAD, "float32", table[head_ids] if len(head_ids) else table))

    def linear(self, value: str, name: str) -> str:
        """A linear layer by its own product: splitting a product of several layers cost more than it saved."""
        if self.precision in FLOATS:
            return self.float_linear(value, name)
        quantise = int8_rows if self.precision == "int8" else int4_blocks
        tensor = self.hook(name) or quantise(name, self.weights.tensor(name))
        if isinstance(tensor, Int8Rows):
            return self.int8_linear(value, name, self.counted(name, "int8", tensor))
        return self.int4_linear(value, name, self.counted(name, "int4", tensor))

    def float_tensor(self, name: str) -> str:
        kind = FLOATS[self.precision]
        with np.errstate(over="ignore"):  # what is too large for float16 is refused as not finite
            tensor = self.weights.tensor(name).astype(kind, copy=False)
        return self.graph.tensor(name, self.counted(name, np.dtype(kind).name, tensor))

    def float_linear(self, value: str, name: str) -> str:
        graph, half = self.graph, self.precision == "fp16"
        value = graph.node("Gemm", [graph.node("Cast", [value], to=10) if half else value, self.float_tensor(name)], transB=1)
        return graph.node("Cast", [value], to=1) if half else value

    def steps(self, value: str) -> tuple[str, str]:
        """Activations in 8 bits and each token's largest, by which it is divided, so that one constant scale serves all."""
        if value not in self.stepped:
            graph = self.graph
            largest = graph.node("ReduceMax", [graph.node("Abs", [value]), graph.constant([-1])])
            largest = graph.node("Max", [largest, graph.constant(np.float32(1e-30))])
            divided = graph.node("Div", [value, largest])
            steps = graph.node("QuantizeLinear", [divided, graph.constant(STEP), graph.constant(MIDDLE)])
            self.stepped[value] = steps, largest
        return self.stepped[value]

    def int8_linear(self, value: str, name: str, tensor: Int8Rows) -> str:
        graph = self.graph
        steps, largest = self.steps(value)
        table, scales = graph.tensor(name, tensor.values.T), graph.tensor(f"{name}.scale", tensor.scales)
        factors = [steps, table, graph.constant(STEP), scales, graph.constant(MIDDLE)]
        return graph.node("Mul", [graph.node("MatMulIntegerToFloat", factors, domain="com.microsoft"), largest])

    def int4_linear(self, value: str, name: str, tensor: Int4Blocks) -> str:
        """Two weights a byte, the first in the low half; without zero points the middle is 8."""
        graph = self.graph
        out, width = tensor.values.shape
        packed = (tensor.values[:, ::2] | tensor.values[:, 1::2] << 4).reshape(out, -1, BLOCK // 2)
        table, scales = graph.tensor(name, packed), graph.tensor(f"{name}.scale", tensor.scales)
        return graph.node("MatMulNBits", [value, table, scales], domain="com.microsoft", K=width, N=out, bits=4,
                          block_size=BLOCK, accuracy_level=4)
