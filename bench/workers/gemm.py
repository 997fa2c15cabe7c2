"""The worker for machine ceilings: products of one runtime at given sizes, and read bandwidth; nothing of edgeguard is imported.

`load` takes the options `runtime` and `library`, the one of edgeguard's own kernel or nothing; `judge` takes `sizes`, a list of
[M, K, N], and `budget`, seconds for each, and gives back `rates`: for every size the GMAC/s of each repetition, with the name
of the operator that was fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protocol import Judged, serve  # type: ignore[import-not-found]  # a script's own folder is on its path

Product = Callable[[], object]
Products = Iterator[tuple[str, Product, int]]
"""Operators by name, each as a call, and how often that multiplies."""
LEAST, MOST = 5, 200
"""Repetitions."""
PATIENCE = 3
"""Budgets that the least repetitions may take."""
READ_BYTES = 1 << 30
"""More than any cache holds."""


class GemmEngine:
    """One runtime's products."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Import the runtime; no model is needed."""
        self._threads, name = threads, options["runtime"]
        version, self._products = RUNTIMES[name](threads, options["library"])
        return {"runtime": version, "device": "cpu", "precision": options.get("precision", ""), "threads": threads, "kernel": "",
                "bytes": 0, "fallbacks": []}

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """The products of all sizes."""
        rates: list[list[float]] = []
        operators: list[str] = []
        failures: list[str] = []
        for m, k, n in request["sizes"]:
            found: list[tuple[str, list[float]]] = []
            for operator, product, count in self._tried(m, k, n, failures):
                amount = count * m * k * max(n, 1) / 1e9  # of reading: bytes
                found.append((operator, [amount / taken for taken in _timed(product, request["budget"])]))
            if not found:
                raise RuntimeError("; ".join(failures) or "the runtime has no product of this kind")
            operator, best = max(found, key=lambda each: sorted(each[1])[len(each[1]) // 2])
            rates.append(best)
            operators.append(operator)
        return Judged([], extra={"rates": rates, "operators": operators, "failures": failures})

    def _tried(self, m: int, k: int, n: int, failures: list[str]) -> Products:
        """Every operator that runs here."""
        products = self._products(m, k, n)
        for operator, make, count in products:
            try:
                product = make()
                product()
            except Exception as error:  # an operator that this build lacks; others may be there
                failures.append(f"{operator}: {type(error).__name__}: {str(error)[:200]}")
                continue
            yield operator, product, count


def _timed(product: Product, budget: float) -> list[float]:
    """Seconds of repetitions for as long as the budget lasts; of a product that is far too slow to be a ceiling fewer."""
    taken: list[float] = []
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < budget or len(taken) < (LEAST if spent < PATIENCE * budget else 1):
        if len(taken) == MOST:
            break
        start = time.perf_counter()
        product()
        taken.append(time.perf_counter() - start)
    return taken


Made = Iterator[tuple[str, Callable[[], Product], int]]
Runtime = tuple[str, Callable[[int, int, int], Made]]


def _products(threads: int, nodes: Sequence[Any], constants: Mapping[str, Any], value: Any, n: int, library: str = "") -> Product:  # noqa: ANN401
    """Nodes that multiply `x` (M, K) to (M, `n`) each, in one session of ONNX Runtime: a call runs them all on `value`."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes, "gemm", [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (len(value), n)) for node in nodes],
        [numpy_helper.from_array(each, key) for key, each in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": value})


def _onnxruntime(threads: int, kind: str) -> Runtime:
    import numpy as np
    import onnxruntime
    from onnx import helper

    def products(m: int, k: int, n: int) -> Made:
        random = np.random.default_rng(0)
        scales = np.full(n, 0.01, np.float32)

        def integers() -> Product:
            weights = random.integers(-127, 128, (k, n)).astype(np.int8)
            constants = {"w": weights, "xs": np.float32(0.01), "ws": scales, "xz": np.uint8(128)}
            node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "xs", "ws", "xz"], ["y"], domain="com.microsoft")
            value = random.integers(0, 256, (m, k)).astype(np.uint8)
            return _products(threads, [node], constants, value, n)

        def dynamic() -> Product:
            weights = random.integers(-127, 128, (k, n)).astype(np.int8)
            node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "ws"], ["y"], domain="com.microsoft")
            value = random.standard_normal((m, k)).astype(np.float32)
            return _products(threads, [node], {"w": weights, "ws": scales}, value, n)

        def floats() -> Product:
            weights = random.standard_normal((k, n)).astype(np.float32)
            node = helper.make_node("MatMul", ["x", "w"], ["y"])
            value = random.standard_normal((m, k)).astype(np.float32)
            return _products(threads, [node], {"w": weights}, value, n)

        if kind == "float":
            yield "MatMul", floats, 1
        else:
            yield from (("MatMulIntegerToFloat", integers, 1), ("DynamicQuantizeMatMul", dynamic, 1))

    return f"onnxruntime {onnxruntime.__version__}", products


def _streamed(threads: int, library: str) -> Runtime:
    """Products with a matrix that no cache holds any more, as in a forward pass, which reads every weight once."""
    import numpy as np
    import onnxruntime
    from onnx import helper

    def products(m: int, k: int, n: int) -> Made:
        count = -(-READ_BYTES // (k * n))

        def integers() -> Product:
            base = np.random.default_rng(0).integers(-127, 128, (k, n)).astype(np.int8)
            constants = {"xs": np.float32(0.01), "ws": np.full(n, 0.01, np.float32), "xz": np.uint8(128),
                         **{f"w{place}": np.roll(base, place) for place in range(count)}}
            nodes = [helper.make_node("MatMulIntegerToFloat", ["x", f"w{place}", "xs", "ws", "xz"], [f"y{place}"], domain="com.microsoft")
                     for place in range(count)]
            value = np.random.default_rng(1).integers(0, 256, (m, k)).astype(np.uint8)
            return _products(threads, nodes, constants, value, n, library)

        kernel = "edgeguard's own" if library else "MatMulIntegerToFloat"
        yield f"{kernel}, weights from memory", integers, count

    return f"onnxruntime {onnxruntime.__version__}", products


def _four_bits(threads: int, library: str) -> Runtime:
    """Products by weights of 4 bits in blocks of 32, activations in 8 bits."""
    import numpy as np
    import onnxruntime
    from onnx import helper

    def products(m: int, k: int, n: int) -> Made:
        def integers() -> Product:
            random = np.random.default_rng(0)
            constants = {"w": random.integers(0, 256, (n, k // 32, 16)).astype(np.uint8), "ws": np.full((n, k // 32), 0.01, np.float32)}
            node = helper.make_node("MatMulNBits", ["x", "w", "ws"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=32,
                                    accuracy_level=4)
            return _products(threads, [node], constants, random.standard_normal((m, k)).astype(np.float32), n, library)

        yield "edgeguard's own" if library else "MatMulNBits", integers, 1

    return f"onnxruntime {onnxruntime.__version__}", products


def _torch(threads: int) -> Runtime:
    import torch

    torch.set_num_threads(threads)
    torch.backends.quantized.engine = "onednn"

    def products(m: int, k: int, n: int) -> Made:
        def int_mm() -> Product:
            left = torch.randint(-127, 128, (m, k), dtype=torch.int8)
            right = torch.randint(-127, 128, (k, n), dtype=torch.int8)
            return lambda: torch._int_mm(left, right)  # noqa: SLF001  there is no public name for it

        def linear() -> Product:
            quantised = torch.quantize_per_tensor(torch.randn(n, k), 0.05, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(quantised, None)
            value = torch.randn(m, k)
            return lambda: torch.ops.quantized.linear_dynamic(value, packed, False)

        yield from (("torch._int_mm", int_mm, 1), ("quantized.linear_dynamic (onednn)", linear, 1))

    return f"torch {torch.__version__}", products


def _openvino(threads: int) -> Runtime:
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    core = openvino.Core()

    def products(m: int, k: int, n: int) -> Made:
        def quantised() -> Product:
            """Both sides in 255 levels, as its own quantiser writes them; the plugin makes an int8 product of it."""
            value = ops.parameter([m, k], np.float32, name="x")
            weights = ops.constant(np.random.default_rng(0).standard_normal((k, n)).astype(np.float32))
            low, high = np.float32(-4), np.float32(4)
            left = ops.fake_quantize(value, low, high, low, high, 256)
            right = ops.fake_quantize(weights, low, high, low, high, 255)
            model = openvino.Model([ops.matmul(left, right, False, False)], [value], "gemm")
            compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
            given = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
            request = compiled.create_infer_request()
            return lambda: request.infer({0: given})

        yield "MatMul of quantised sides", quantised, 1

    return f"openvino {openvino.__version__}", products


def _read(threads: int) -> Runtime:
    import numpy as np

    def products(m: int, k: int, n: int) -> Made:  # noqa: ARG001  the size is fixed: beyond every cache
        parts = np.array_split(np.ones(k // 8, np.int64), threads)
        pool = ThreadPoolExecutor(threads)
        yield "maximum of int64", lambda: (lambda: list(pool.map(np.max, parts))), 1
        yield "sum of int64", lambda: (lambda: list(pool.map(np.sum, parts))), 1

    return f"numpy {np.__version__}", products


RUNTIMES: Mapping[str, Callable[[int, str], Runtime]] = {
    "onnxruntime": lambda threads, _: _onnxruntime(threads, "int8"),
    "onnxruntime-float": lambda threads, _: _onnxruntime(threads, "float"),
    "onnxruntime-streamed": _streamed,
    "edgeguard-streamed": _streamed,
    "onnxruntime-int4": _four_bits,
    "edgeguard-int4": _four_bits,
    "torch": lambda threads, _: _torch(threads),
    "openvino": lambda threads, _: _openvino(threads),
    "read": lambda threads, _: _read(threads),
}


if __name__ == "__main__":
    serve(GemmEngine())
