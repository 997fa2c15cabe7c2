"""Writing an ONNX graph node by node, its tensors streamed piece by piece into one file of external data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from edgeguard.convert.journal import GrowingFile
from edgeguard.errors import RuntimeMissingError

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
PAGE, LINE = 4096, 64  # bytes at which large and small tensors begin, so that runtimes can map them


class GraphWriter:
    """A context: nothing bears its final name before it is left without an error.

    With an `identity` (what the tensors depend on) a writing that was killed is taken up again: tensors that are `finished` are
    declared anew, but not written.
    """

    def __init__(self, folder: Path, model: str, data: str, identity: Mapping[str, Any] | None = None) -> None:
        try:
            import onnx
        except ImportError as error:
            raise RuntimeMissingError("The package onnx", "convert") from error
        self._onnx, self._model, self._data = onnx, folder / model, data
        self._file = GrowingFile(folder / data, identity)
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0

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
