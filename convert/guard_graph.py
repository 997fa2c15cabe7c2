"""The guard graph: a Llama decoder as ONNX, built layer by layer, that answers for a few rows and a few token ids.

Inputs, int64: `ids` and `positions` (T,); attention in G lanes, one for each sequence: `queries` (G, Q) tokens,
`places` (T,) of the tokens in the flattened `queries`, `keys` (G, S) tokens of past and pass in the order of their
positions from 0 (a query attends to the keys up to its own position); `rows` (R,) tokens to answer for, and their `lanes`
(R,). float32: `past_key_{i}` and `past_value_{i}` (P, kv_heads, head_dim) for each layer i; P may be 0.
Outputs, float32: `logits` (R, len(head_ids)); `new_key_{i}` (after RoPE) and `new_value_{i}` (T, kv_heads, head_dim).

What lies between the products are functions (`functions`), which a runtime may have kernels for.
Everything but the linear layers is computed in float32. In the last layer queries, attention and MLP are computed for the
asked rows only. Linear layers: fp32 and fp16 by Gemm; 8 bits by MatMulIntegerToFloat, activations quantised token by token,
so that a token's result does not depend on its neighbours in the pass, some in parts or in two terms (`PARTS`, `FINE`);
4 bits by MatMulNBits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeguard.backends.fused import PARTS, ZERO
from edgeguard.backends.reference import inverse_frequencies
from edgeguard.convert import functions
from edgeguard.convert.onnx_writer import GraphWriter
from edgeguard.convert.pieces import chosen, pieces, quantised
from edgeguard.convert.quantize import BLOCK, Importance, Int8Rows, QuantisedTensor, int4_blocks, int8_rows
from edgeguard.errors import ConversionError
from edgeguard.machine import default_threads
from edgeguard.weights import EMBEDDING, HEAD, Weights, expected

Precision = Literal["fp32", "fp16", "int8", "int4"]
Progress = Callable[[str, int, int], None]
"""Told the stage, how many of the source's weights are written, and how many there are."""
Hook = Callable[[str], QuantisedTensor | None]

Product: TypeAlias = "tuple[str, str | None]"
"""What a linear layer gives, and the steps (T, 1) that its rows are still to be multiplied by, None if they are."""

MODEL, DATA = "model.onnx", "model.onnx.data"
FLOATS: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
DOWN = "mlp.down_proj.weight"
FINE = ("self_attn.", DOWN)
"""In the names of linear layers that read in two terms of 8 bits near the input, where rounding moved the built-in model's scores most."""
NEAR = 4
"""The first layers, one in so many, rounded up, are near the input: 5 of 18, 8 of 32."""

INPUTS: dict[str, list[int | str]] = {
    "ids": ["T"], "positions": ["T"], "queries": ["G", "Q"], "places": ["T"], "keys": ["G", "S"], "rows": ["R"], "lanes": ["R"],
}


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
          quantised: Hook | None = None, importance: Importance | None = None, threads: int | None = None,
          identity: Mapping[str, Any] | None = None, progress: Progress | None = None) -> dict[str, int]:
    """Write model.onnx and model.onnx.data into `out_folder`; returns how many tensors are stored in each type.

    `head_ids` are the rows of the output projection to keep (none: all). `quantised(name)` may give a tensor that is
    quantised already (int8 and int4 only; a layer may have more bits than the rest); None leaves it to this function.
    It is also asked for `lm_head.weight`, of tied models too: what it gives is stored dequantised, in float32.
    `importance(name)` is what errors in the columns of a matrix matter, None for all alike.
    Tensors are quantised by `threads` threads, by default the machine's choice. Both files are written as `.partial` and renamed;
    with an `identity` (source, settings, builder) a build that was killed is taken up again, see `convert.journal`.
    Raises `ConversionError` for weights that are not finite.
    """
    layout = {"parts": PARTS, "fine": FINE, "near": NEAR}  # decides which tables there are, and what they are called
    graph = GraphWriter(out_folder, MODEL, DATA, None if identity is None else {**identity, **layout})
    builder = _Builder(weights, graph, precision, quantised or _nothing, importance or _nothing, threads or default_threads(), progress)
    return builder.build(np.asarray(head_ids, np.int64))


def _nothing(_name: str) -> None:
    return None


class _Builder:
    """One build; every method adds nodes and gives the name of the value they compute."""

    def __init__(self, weights: Weights, graph: GraphWriter, precision: Precision, hook: Hook, importance: Importance,
                 threads: int, progress: Progress | None) -> None:
        self.weights, self.shape, self.precision, self.hook, self.progress = weights, weights.shape, precision, hook, progress
        self.graph, self.importance, self.threads = graph, importance, threads
        self.types: Counter[str] = Counter()
        self.readings: dict[tuple[str, int, bool], tuple[list[str], str]] = {}
        self.zeros: dict[tuple[str, int], str] = {}
        self.sizes = expected(self.shape)
        self.done, self.total = 0, self.shape.parameters + (math.prod(self.sizes[EMBEDDING]) if self.shape.tied else 0)

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
        return graph.node("Tile", [mask, graph.constant([1, self.shape.heads // self.shape.kv_heads, 1])])

    def attention(self, layer: int, normed: str, every: Lanes, asked: Lanes) -> Product:
        """Attention of the asked tokens."""
        graph, shape = self.graph, self.shape
        prefix = f"model.layers.{layer}.self_attn."
        asking = graph.node("Gather", [normed, asked.rows]) if asked.rows else normed
        reads = {"q": asking, "k": normed, "v": normed}
        products, steps = self.products([(read, f"{prefix}{name}_proj.weight") for name, read in reads.items()])
        for name in ("key", "value"):
            graph.input(f"past_{name}_{layer}", np.float32, ["P", shape.kv_heads, shape.head_dim])
            graph.output(f"new_{name}_{layer}", np.float32, ["T", shape.kv_heads, shape.head_dim])
        inputs = [*products, f"past_key_{layer}", f"past_value_{layer}", *asked.turns, *every.turns,
                  asked.queries, asked.places, asked.keys, asked.mask, *steps[:2]]  # values are read as keys are
        attends = functions.attention(shape.heads, shape.kv_heads, shape.head_dim, in_steps=bool(steps))
        seen = graph.call(attends, inputs, [graph.fresh("seen"), f"new_key_{layer}", f"new_value_{layer}"])[0]
        return self.product(seen, f"{prefix}o_proj.weight")

    def mlp(self, layer: int, normed: str) -> Product:
        """SwiGLU."""
        prefix = f"model.layers.{layer}.mlp."
        products, steps = self.products([(normed, f"{prefix}{name}_proj.weight") for name in ("gate", "up")])
        (inner,) = self.graph.call(functions.GATE_IN_STEPS if steps else functions.GATE, [*products, *steps[:1]])
        return self.product(inner, f"{prefix}down_proj.weight")

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

    def add_and_norm(self, residual: str, change: Product, name: str) -> tuple[str, str]:
        """RMSNorm of the sum, and the sum."""
        product, steps = change
        inputs = [residual, product, self.norm(name), *([steps] if steps else [])]
        normed, summed = self.graph.call(functions.NORM_IN_STEPS if steps else functions.NORM, inputs, epsilon=self.shape.rms_eps)
        return normed, summed

    def norm(self, name: str) -> str:
        self.counted(name, "float32")
        return self.graph.tensor(name, np.float32, self.sizes[name], _finite(name, [self.weights.tensor(name)]))

    def counted(self, name: str, kind: str) -> None:
        """Enter a tensor under its type; progress counts the source's weights."""
        self.types[kind] += 1
        self.done += math.prod(self.sizes[name])
        if self.progress:
            self.progress("graph", min(self.done, self.total), self.total)

    def quantised(self, name: str, quantise: Callable[..., QuantisedTensor]) -> QuantisedTensor | None:
        """A matrix in few bits, None when it is in the file already."""
        if self.graph.finished(f"{name}.scale") is not None:  # scales are written last
            return None
        return self.hook(name) or quantised(self.weights, name, partial(quantise, importance=self.importance(name)), self.threads)

    def embedded(self) -> str:
        """Rows of the embedding in float32; stored as float16 unless all is float32: 8 bits there cost more verdicts than in the layers."""
        table = self.float_tensor(EMBEDDING, FLOATS.get(self.precision, np.float16))
        found = self.graph.node("Gather", [table, "ids"])
        return found if self.precision == "fp32" else self.graph.node("Cast", [found], to=1)

    def head(self, head_ids: NDArray[np.int64]) -> str:
        """The output projection's rows of the kept ids."""
        source = EMBEDDING if self.shape.tied else HEAD
        given = self.hook(HEAD) if self.precision not in FLOATS and self.graph.finished(HEAD) is None else None
        kept = head_ids if len(head_ids) else np.arange(self.shape.vocab)
        parts = (kept[part] for part in pieces(len(kept), self.shape.hidden))
        rows = (chosen(given, part).dequantised() if given else self.weights.rows(source, part) for part in parts)
        self.counted(source, "float32")
        return self.graph.tensor(HEAD, np.float32, [len(kept), self.shape.hidden], _finite(HEAD, rows))

    def products(self, layers: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
        """Several linear layers, and the steps that the rows of each are still to be multiplied by; none if they are."""
        found = [self.product(*layer) for layer in layers]
        steps = [each for _, each in found if each]
        if len(steps) == len(layers):
            return [product for product, _ in found], steps
        return [self.graph.node("Mul", [product, each]) if each else product for product, each in found], []

    def product(self, value: str, name: str) -> Product:
        """A linear layer by its own product: splitting a product of several layers cost more than it saved."""
        if self.precision in FLOATS:
            return self.float_linear(value, name), None
        tensor = self.quantised(name, int8_rows if self.precision == "int8" else int4_blocks)
        word = self.graph.finished(f"{name}.scale") if tensor is None else "int8" if isinstance(tensor, Int8Rows) else "int4"
        product = self.int8_linear(value, name, tensor) if word == "int8" else (self.int4_linear(value, name, tensor), None)
        self.counted(name, word or "")
        return product

    def float_tensor(self, name: str, kind: type[np.floating[Any]]) -> str:
        rows = (self.weights.rows(name, part).astype(kind, copy=False) for part in pieces(*self.sizes[name]))
        self.graph.tensor(name, kind, self.sizes[name], _finite(name, rows))
        self.counted(name, np.dtype(kind).name)
        return name

    def float_linear(self, value: str, name: str) -> str:
        graph, half = self.graph, self.precision == "fp16"
        value = graph.node("Gemm", [graph.node("Cast", [value], to=10) if half else value, self.float_tensor(name, FLOATS[self.precision])],
                           transB=1)
        return graph.node("Cast", [value], to=1) if half else value

    def int8_linear(self, value: str, name: str, tensor: QuantisedTensor | None) -> Product:
        """The product of activations in 8 bits and the step of these, or the sum of several, each times its step."""
        graph, width = self.graph, self.sizes[name][1]
        fine = reads_finely(name, self.shape.layers)
        parts = PARTS if not fine and name.endswith(DOWN) and width % PARTS == 0 else 1
        terms, steps = self.read(value, name, parts, fine=fine)
        tables = [self.int8_table(name, tensor, slice(start, start + width // parts)) for start in range(0, width, width // parts)]
        scales = graph.tensor(f"{name}.scale", np.float32, self.sizes[name][:1], [tensor.scales] if tensor else (), "int8")
        products = [self.int8_product(term, table, scales) for term, table in zip(terms, tables, strict=True)]
        if fine:
            return graph.call(functions.COMBINE_FINELY, [steps, *products])[0], None
        return (graph.call(functions.COMBINE_PARTS, [steps, *products])[0], None) if parts > 1 else (products[0], steps)

    def read(self, value: str, name: str, parts: int, *, fine: bool) -> tuple[list[str], str]:
        """What a layer reads in 8 bits, and the size of a step of it; layers that read alike share them."""
        if (value, parts, fine) not in self.readings:
            plainly = functions.quantise_parts(self.sizes[name][1]) if parts > 1 else functions.QUANTISE
            quantise = functions.QUANTISE_FINELY if fine else plainly
            *terms, steps = self.graph.call(quantise, [value, self.zeros_of(self.counted_by(name), parts)])
            self.readings[value, parts, fine] = terms, steps
        return self.readings[value, parts, fine]

    def counted_by(self, name: str) -> str:
        """The graph's input with an entry for each token that a layer reads: of the last one, only keys and values are made for all."""
        last = name.startswith(f"model.layers.{self.shape.layers - 1}.")
        return "rows" if last and not name.endswith(("k_proj.weight", "v_proj.weight")) else "positions"

    def zeros_of(self, tokens: str, parts: int) -> str:
        """The zero points of as many rows as an input has entries, times the parts of each; made once."""
        graph = self.graph
        if (tokens, parts) not in self.zeros:
            count = graph.node("Mul", [graph.node("Shape", [tokens]), graph.constant([parts])])
            self.zeros[tokens, parts] = graph.node("Expand", [graph.constant(ZERO), count])
        return self.zeros[tokens, parts]

    def int8_table(self, name: str, tensor: QuantisedTensor | None, columns: slice) -> str:
        """Some of a layer's columns, as rows of a table (columns, out)."""
        (rows, width), wide = self.sizes[name], columns.stop - columns.start
        values = (tensor.values[:, columns][:, part].T for part in pieces(wide, rows)) if tensor else ()
        return self.graph.tensor(name if wide == width else f"{name}.{columns.start}", np.int8, [wide, rows], values)

    def int8_product(self, term: str, table: str, scales: str) -> str:
        """Of bytes, times the layer's scales; the step of the activations is still to be multiplied."""
        graph = self.graph
        # the weights' zero point is given, to each product one of its own: ONNX Runtime before 1.30 needs it so where it converts weights
        points = [graph.constant(ZERO), graph.constant(np.int8(0), shared=False)]
        factors = [term, table, graph.constant(np.float32(1)), scales, *points]
        return graph.node("MatMulIntegerToFloat", factors, domain="com.microsoft")

    def int4_linear(self, value: str, name: str, tensor: QuantisedTensor | None) -> str:
        """Two weights a byte, the first in the low half; without zero points the middle is 8."""
        graph, (rows, width) = self.graph, self.sizes[name]
        values = (tensor.values[part, ::2] | tensor.values[part, 1::2] << 4 for part in pieces(rows, width)) if tensor else ()
        table = graph.tensor(name, np.uint8, [rows, width // BLOCK, BLOCK // 2], values)
        scales = graph.tensor(f"{name}.scale", np.float32, [rows, width // BLOCK], [tensor.scales] if tensor else (), "int4")
        return graph.node("MatMulNBits", [value, table, scales], domain="com.microsoft", K=width, N=rows, bits=4,
                          block_size=BLOCK, accuracy_level=4)


def reads_finely(name: str, layers: int) -> bool:
    """Whether a layer of 8 bits gets its activations in two terms, one of `FINE` near the input."""
    return any(part in name for part in FINE) and int(name.split(".")[2]) * NEAR < layers


def _finite(name: str, parts: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The parts, refused unless all numbers are finite."""
    with np.errstate(over="ignore"):  # what is too large for float16 is refused
        for part in parts:
            if not np.isfinite(part).all():
                raise ConversionError(f"{name} holds numbers that {part.dtype.name} does not; the source may be damaged.")
            yield part
