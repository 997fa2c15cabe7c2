"""What lies between a guard graph's products, as functions of ONNX, so that a runtime may have one kernel for each (`backends/fused.c`).

Rows are float32 (T, width). A byte b stands for b - 128 steps; a step is a 127th of the largest magnitude of its row. `zeros` are the
zero points of as many rows. A kernel is found by its name alone: a function that comes to mean something else gets another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from edgeguard.backends.fused import FINER, PARTS, STEP, TERMS, TINY
from edgeguard.convert.onnx_writer import FROM_CALL, Function, Nodes


def _steps(nodes: Nodes, rows: str) -> str:
    """A step of 8 bits for each row, not finite where a number (or the sum) is not: quantised it would be an ordinary one."""
    within = nodes.constant([-1])  # two reductions are faster than writing all magnitudes
    most, least, total = (nodes.node(f"Reduce{word}", [rows, within], keepdims=0) for word in ("Max", "Min", "Sum"))
    largest = nodes.node("Max", [most, nodes.node("Neg", [least]), nodes.constant(TINY)])
    lost = nodes.node("Mul", [total, nodes.constant(np.float32(0))])  # Max and Min of ONNX Runtime pass over a NaN, Sum does not
    return nodes.node("Mul", [nodes.node("Add", [largest, lost]), nodes.constant(STEP)])


def _quantise(nodes: Nodes, rows: str, zeros: str) -> Sequence[str]:
    steps = _steps(nodes, rows)
    return nodes.node("QuantizeLinear", [rows, steps, zeros], axis=0), nodes.node("Reshape", [steps, nodes.constant([-1, 1])])


QUANTISE = Function("Quantise", ("rows", "zeros"), _quantise)
"""Bytes (T, width) and steps (T, 1)."""


@cache
def quantise_parts(width: int) -> Function:
    """`PARTS` of bytes (T, 1, width / PARTS), and steps (T, PARTS, 1)."""
    def body(nodes: Nodes, rows: str, zeros: str) -> Sequence[str]:
        rows = nodes.node("Reshape", [rows, nodes.constant([-1, width // PARTS])])
        steps = _steps(nodes, rows)
        whole = nodes.node("QuantizeLinear", [rows, steps, zeros], axis=0)
        whole = nodes.node("Reshape", [whole, nodes.constant([-1, PARTS, width // PARTS])])
        split = [nodes.fresh("part") for _ in range(PARTS)]
        nodes.node("Split", [whole], split, axis=1, num_outputs=PARTS)
        return *split, nodes.node("Reshape", [steps, nodes.constant([-1, PARTS, 1])])

    return Function("QuantiseParts", ("rows", "zeros"), body)


def _quantise_finely(nodes: Nodes, rows: str, zeros: str) -> Sequence[str]:
    steps = _steps(nodes, rows)
    coarse = nodes.node("QuantizeLinear", [rows, steps, zeros], axis=0)
    left = nodes.node("Sub", [rows, nodes.node("DequantizeLinear", [coarse, steps, zeros], axis=0)])
    rest = nodes.node("QuantizeLinear", [left, nodes.node("Mul", [steps, nodes.constant(FINER)]), zeros], axis=0)
    terms = nodes.node("Reshape", [nodes.node("Concat", [coarse, rest], axis=1), nodes.constant([0, TERMS, -1])])
    steps = nodes.node("Reshape", [steps, nodes.constant([-1, 1, 1])])
    return terms, nodes.node("Mul", [steps, nodes.constant(np.array([[1], [FINER]], np.float32))])


QUANTISE_FINELY = Function("QuantiseFinely", ("rows", "zeros"), _quantise_finely)
"""Bytes (T, TERMS, width) and steps (T, TERMS, 1), of rows as a sum of two."""


def _combined(nodes: Nodes, steps: str, product: str) -> Sequence[str]:
    summed = nodes.node("FusedMatMul", [steps, product], domain="com.microsoft", transA=1)
    return [nodes.node("Squeeze", [summed, nodes.constant([1])])]


COMBINE_PARTS = Function("CombineParts", ("steps", *(f"product_{part}" for part in range(PARTS))),
                         lambda nodes, steps, *products: _combined(nodes, steps, nodes.node("Concat", products, axis=1)))
"""The sum (T, width) of products (T, 1, width), each times its step."""
COMBINE_FINELY = Function("CombineFinely", ("steps", "product"), _combined)
"""The sum (T, width) of what a product (T, TERMS, width) holds, each times its step."""


def _gate(nodes: Nodes, gate: str, up: str) -> Sequence[str]:
    return [nodes.node("Mul", [nodes.node("QuickGelu", [gate], domain="com.microsoft", alpha=1.0), up])]  # x * sigmoid(x)


GATE = Function("Gate", ("gate", "up"), _gate)
"""SwiGLU's middle."""
GATE_IN_STEPS = Function("GateInSteps", ("gate", "up", "steps"), lambda nodes, gate, up, steps: _gate(
    nodes, nodes.node("Mul", [gate, steps]), nodes.node("Mul", [up, steps])))
"""The same of what is still to be multiplied by steps (T, 1)."""


def _add_and_norm(nodes: Nodes, residual: str, change: str, weight: str) -> Sequence[str]:
    outputs = [nodes.fresh("normed"), "", "", nodes.fresh("sum")]
    nodes.node("SkipSimplifiedLayerNormalization", [residual, change, weight], outputs, domain="com.microsoft", epsilon=FROM_CALL)
    return outputs[0], outputs[3]


NORM = Function("Norm", ("residual", "change", "weight"), _add_and_norm, ("epsilon",))
"""RMSNorm of a sum, and the sum, (T, width) both."""
NORM_IN_STEPS = Function("NormInSteps", ("residual", "change", "weight", "steps"), lambda nodes, residual, change, weight, steps: (
    _add_and_norm(nodes, residual, nodes.node("Mul", [change, steps]), weight)), ("epsilon",))
"""The same with a change that is still to be multiplied by steps (T, 1)."""


@cache
def attention(heads: int, kv_heads: int, head_dim: int, *, in_steps: bool = False) -> Function:
    """Grouped-query attention of some tokens: what they attended to (A, heads * head_dim), and new keys (after RoPE) and values.

    Queries (A, heads * head_dim) before RoPE, keys and values (T, kv_heads * head_dim) of the pass, and those of the past (P, kv_heads,
    head_dim); RoPE's places and tables of the tokens that ask and of all; the layout of lanes, see `guard_graph`; a mask (G, group * Q, S),
    0 for the first keys of a lane, up to the query's own position, minus infinity behind. `in_steps`: queries are still to be multiplied
    by steps (A, 1), keys and values by others (T, 1).
    The queries of one key head are stacked, so that no key is repeated.
    """
    inputs = ("query", "key", "value", "past_key", "past_value", "asked_at", "asked_cosines", "asked_sines", "at", "cosines", "sines",
              "queries", "places", "keys", "mask", *(("query_steps", "steps") if in_steps else ()))

    def body(nodes: Nodes, *names: str) -> Sequence[str]:
        given = dict(zip(inputs, names, strict=True))
        for name, steps in (("query", "query_steps"), ("key", "steps"), ("value", "steps")) if in_steps else ():
            given[name] = nodes.node("Mul", [given[name], given[steps]])
        return _attention(nodes, heads, kv_heads, head_dim, given)

    return Function("AttentionInSteps" if in_steps else "Attention", inputs, body)


def _attention(nodes: Nodes, heads: int, kv_heads: int, head_dim: int, given: dict[str, str]) -> Sequence[str]:
    group = heads // kv_heads
    query = _rotated(nodes, given["query"], heads, given["asked_at"], given["asked_cosines"], given["asked_sines"])
    key = _rotated(nodes, given["key"], kv_heads, given["at"], given["cosines"], given["sines"])
    split = nodes.constant([0, kv_heads, head_dim])
    new_key, new_value = (nodes.node("Reshape", [each, split]) for each in (key, given["value"]))
    query = nodes.node("Reshape", [query, nodes.constant([0, kv_heads, group, head_dim])])
    query = nodes.node("Transpose", [nodes.node("Gather", [query, given["queries"]])], perm=[2, 0, 3, 1, 4])
    query = nodes.node("Reshape", [query, nodes.constant([kv_heads, 0, -1, head_dim])])
    keys, values = _joined(nodes, given["past_key"], new_key, given["keys"]), _joined(nodes, given["past_value"], new_value, given["keys"])
    scores = nodes.node("FusedMatMul", [query, keys], domain="com.microsoft", transB=1, alpha=float(head_dim**-0.5))
    shares = nodes.node("Softmax", [nodes.node("Add", [scores, given["mask"]])], axis=-1)
    seen = nodes.node("MatMul", [shares, values])
    seen = nodes.node("Reshape", [seen, nodes.constant([kv_heads, 0, group, -1, head_dim])])
    seen = nodes.node("Transpose", [seen], perm=[1, 3, 0, 2, 4])
    seen = nodes.node("Reshape", [seen, nodes.constant([-1, heads * head_dim])])
    return nodes.node("Gather", [seen, given["places"]]), new_key, new_value


def _rotated(nodes: Nodes, value: str, heads: int, places: str, cosines: str, sines: str) -> str:
    """RoPE over (T, heads * head_dim)."""
    batch = nodes.node("Unsqueeze", [value, nodes.constant([0])])
    turned = nodes.node("RotaryEmbedding", [batch, places, cosines, sines], domain="com.microsoft", num_heads=heads)
    return nodes.node("Squeeze", [turned, nodes.constant([0])])


def _joined(nodes: Nodes, past: str, new: str, keys: str) -> str:
    """Past keys or values and the new ones, gathered for each lane: (kv_heads, G, S, head_dim)."""
    line = nodes.node("Concat", [past, new], axis=0)
    line = nodes.node("Transpose", [line], perm=[1, 0, 2])  # before the gather, which repeats what lanes share
    return nodes.node("Gather", [line, keys], axis=1)
