"""Writing an ONNX graph node by node, its tensors streamed piece by piece into one file of external data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from edgeguard.backends.onnx_protobuf import OWN_DOMAIN
from edgeguard.convert.journal import GrowingFile
from edgeguard.errors import RuntimeMissingError

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
FROM_CALL = object()
"""In a function's body, for an attribute: a float that each call of the function gives under the same name."""
PAGE, LINE = 4096, 64  # bytes at which large and small tensors begin, so that runtimes can map them


def _opsets(onnx: Any, versions: Mapping[str, int]) -> list[Any]:  # noqa: ANN401
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


class Nodes:
    """Nodes in their order, and names for what they compute."""

    def __init__(self) -> None:
        try:
            import onnx
        except ImportError as error:
            raise RuntimeMissingError("The package onnx", "convert") from error
        self._onnx = onnx
        self.nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def fresh(self, stem: str) -> str:
        """A name that no value has yet."""
        self._count += 1
        return f"{stem}_{self._count}"

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, *, domain: str = "",
             **attributes: object) -> str:
        """Add a node; returns its first output, named afresh unless given. An attribute may be `FROM_CALL`."""
        outputs = outputs or [self.fresh(operator)]
        node = self._onnx.helper.make_node(operator, inputs, outputs, name=f"{operator}/{outputs[0]}", domain=domain)
        for name, value in attributes.items():
            if value is FROM_CALL:
                node.attribute.append(self._onnx.AttributeProto(name=name, ref_attr_name=name, type=self._onnx.AttributeProto.FLOAT))
            else:
                node.attribute.append(self._onnx.helper.make_attribute(name, value))
        self.nodes.append(node)
        return outputs[0]

    def constant(self, value: ArrayLike, *, shared: bool = True) -> str:
        """A small array or number (whole numbers are int64); equal ones are stored once if they are `shared`."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if shared and key in self._constants:
            return self._constants[key]
        name = self.fresh("constant")
        if shared:
            self._constants[key] = name
        self._keep(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _keep(self, tensor: Any) -> None:  # noqa: ANN401  onnx has no types
        """In a function a constant is a node."""
        self.node("Constant", [], [tensor.name], value=tensor)


@dataclass(frozen=True)
class Function:
    """An operator of our own that is made of others. A runtime takes it apart unless it has a kernel of this name."""

    name: str
    inputs: tuple[str, ...]
    body: Callable[..., Sequence[str]]
    """Adds nodes to `Nodes`, given the names of the inputs; returns the names of the results."""
    attributes: tuple[str, ...] = ()
    """Floats that every call gives."""

    def proto(self, onnx: Any) -> Any:  # noqa: ANN401
        """As ONNX has it."""
        body = Nodes()
        results = list(self.body(body, *self.inputs))
        return onnx.helper.make_function(OWN_DOMAIN, self.name, self.inputs, results, body.nodes, _opsets(onnx, OPSETS), self.attributes)


class GraphWriter(Nodes):
    """A context: nothing bears its final name before it is left without an error.

    With an `identity` (what the tensors depend on) a writing that was killed is taken up again: tensors that are `finished` are
    declared anew, but not written.
    """

    def __init__(self, folder: Path, model: str, data: str, identity: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._model, self._data = folder / model, data
        self._file = GrowingFile(folder / data, identity)
        self._functions: dict[str, tuple[Function, Any]] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> GraphWriter:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._file.complete(lambda _path: None)
            partial = self._model.with_name(f"{self._model.name}.partial")
            partial.write_bytes(self._serialised())
            partial.replace(self._model)
        self._file.__exit__(kind, error, trace)

    def _serialised(self) -> bytes:
        helper = self._onnx.helper
        graph = helper.make_graph(self.nodes, "guard", self._inputs, self._outputs, list(self._tensors.values()))
        model = helper.make_model(graph, functions=[proto for _, proto in self._functions.values()], producer_name="edgeguard",
                                  opset_imports=_opsets(self._onnx, {**OPSETS, OWN_DOMAIN: 1}), ir_version=IR_VERSION)
        return bytes(model.SerializeToString())

    def call(self, function: Function, inputs: Sequence[str], outputs: Sequence[str] | None = None, **attributes: float) -> list[str]:
        """Add a node of a function; returns its outputs, named afresh unless given."""
        known, proto = self._functions.setdefault(function.name, (function, function.proto(self._onnx)))
        assert known is function, function.name  # noqa: S101  our own logic
        outputs = outputs or [self.fresh(function.name) for _ in proto.output]
        self.node(function.name, inputs, outputs, domain=OWN_DOMAIN, **attributes)
        return list(outputs)

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

    def _keep(self, tensor: Any) -> None:  # noqa: ANN401
        self._tensors[tensor.name] = tensor

    def finished(self, name: str) -> str | None:
        """The word that a tensor was written with (see `tensor`), None for one that is still to be written."""
        record = self._file.finished(name)
        return None if record is None else str(record["word"])

    def tensor(self, name: str, kind: DTypeLike, sizes: Sequence[int], parts: Iterable[NDArray[Any]] = (), word: str = "") -> str:
        """Declare a tensor of the external data, written from its parts unless it is finished; returns its name.

        `word` is kept with it. Nothing is asked of `parts` when it is finished.
        """
        kind, length = np.dtype(kind), math.prod(sizes) * np.dtype(kind).itemsize
        if self._file.finished(name) is None:
            with self._file.piece(name, PAGE if length >= PAGE else LINE, word=word) as write:
                for part in parts:
                    write(part)
        record = self._file.finished(name)
        assert record is not None and record["length"] == length, f"{name}: {record}"  # noqa: S101  our own logic
        proto = self._onnx.TensorProto(name=name, data_type=self._type(kind), dims=sizes,
                                       data_location=self._onnx.TensorProto.EXTERNAL)
        for key, value in {"location": self._data, "offset": record["offset"], "length": length}.items():
            proto.external_data.add(key=key, value=str(value))
        self._tensors[name] = proto
        return name
