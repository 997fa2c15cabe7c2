"""Writing an ONNX graph node by node, its tensors streamed into one file of external data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from edgeguard.errors import RuntimeMissingError

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
PAGE, LINE = 4096, 64  # bytes at which large and small tensors begin, so that runtimes can map them


class GraphWriter:
    """A context: nothing bears its final name before it is left without an error."""

    def __init__(self, folder: Path, model: str, data: str) -> None:
        try:
            import onnx
        except ImportError as error:
            raise RuntimeMissingError("The package onnx", "convert") from error
        self._onnx, self._folder, self._model, self._data = onnx, folder, model, data
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0
        self._stream: BinaryIO

    def __enter__(self) -> GraphWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial(self._data).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        if kind is None:
            self._partial(self._model).write_bytes(self._serialised())
        for name in (self._data, self._model):
            if kind is None:
                self._partial(name).replace(self._folder / name)
            else:
                self._partial(name).unlink(missing_ok=True)

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.partial"

    def _serialised(self) -> bytes:
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, "guard", self._inputs, self._outputs, list(self._tensors.values()))
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeguard")
        return bytes(model.SerializeToString())

    def fresh(self, stem: str) -> str:
        """A name that no value has yet."""
        self._count += 1
        return f"{stem}_{self._count}"

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, *, domain: str = "",
             **attributes: object) -> str:
        """Add a node; returns its first output, named afresh unless given."""
        outputs = outputs or [self.fresh(operator)]
        name = f"{operator}/{outputs[0]}"
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def input(self, name: str, kind: DTypeLike, sizes: Sequence[int | str]) -> None:
        """Declare an input of the graph."""
        self._inputs.append(self._value(name, kind, sizes))

    def output(self, name: str, kind: DTypeLike, sizes: Sequence[int | str]) -> None:
        """Declare an output of the graph."""
        self._outputs.append(self._value(name, kind, sizes))

    def _value(self, name: str, kind: DTypeLike, sizes: Sequence[int | str]) -> object:
        return self._onnx.helper.make_tensor_value_info(name, self._type(kind), sizes)

    def _type(self, kind: DTypeLike) -> int:
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))

    def constant(self, value: ArrayLike) -> str:
        """A small array or number inside the graph (whole numbers are int64); equal ones are stored once."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self.fresh("constant")
            self._tensors[name] = self._onnx.numpy_helper.from_array(array, name)
        return self._constants[key]

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """Write a tensor into the external data; returns its name."""
        array = np.ascontiguousarray(array)
        self._stream.write(b"\0" * (-self._stream.tell() % (PAGE if array.nbytes >= PAGE else LINE)))
        where = {"location": self._data, "offset": self._stream.tell(), "length": array.nbytes}
        self._stream.write(array.data)
        proto = self._onnx.TensorProto(name=name, data_type=self._type(array.dtype), dims=array.shape,
                                       data_location=self._onnx.TensorProto.EXTERNAL)
        for key, value in where.items():
            proto.external_data.add(key=key, value=str(value))
        self._tensors[name] = proto
        return name
