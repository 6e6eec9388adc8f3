"""Reads an ONNX file of a convolutional recogniser: its operations, each with its weights.

What exporters and optimisers add to a network is removed: constants that the file computes, reshapes, casts, identities, the
normalisation of pixels. Nothing depends on the names of nodes and tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.weights.onnx.file import load

# operations that may be computed from constants when a file is read
_FOLDED = {
    *("Constant", "ConstantOfShape", "Identity", "Cast", "CastLike", "Shape", "Concat", "Gather", "Slice", "Expand"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Add", "Sub", "Mul", "Div", "Sqrt"),
}
# operations that do not change the numbers of a feature map
_PASSED = {"Identity", "Dropout", "Cast", "CastLike", "Flatten", "Reshape", "Squeeze", "Unsqueeze"}
_LARGEST = 1 << 28  # elements of a computed constant: a file must not fill the memory


@dataclass(frozen=True)
class Operation:
    """`kind` is conv, linear, norm, prelu, add or pool, or the ONNX name of anything else; `inputs` the tensors that depend on the image.

    `tensors` are float32 in torch's layout: conv and linear `weight`, `bias` (if any); norm `weight`, `bias`, `mean`, `variance`; prelu `weight` [C].
    `settings`: conv `strides`, `pads`, `dilations`, `group`; pool `kernel_shape`, `strides`; norm `epsilon`.
    """

    kind: str
    inputs: tuple[str, ...]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class OnnxGraph:
    """`operations` by the tensor they make; `image` maps each tensor that is the image, normalised or not, to `(a, b)` in a x + b."""

    operations: dict[str, Operation]
    image: dict[str, tuple[float, float]]
    output: str
    image_size: int | None
    batch: int | None

    def reachable(self) -> Iterator[Operation]:
        """The operations that the output depends on, in the file's order."""
        needed, waiting = {self.output}, [self.output]
        while waiting:
            operation = self.operations.get(waiting.pop())
            new = [] if operation is None else [name for name in operation.inputs if name not in needed]
            needed.update(new)
            waiting += new
        return (operation for tensor, operation in self.operations.items() if tensor in needed)

    def uses(self) -> Counter[str]:
        """How often each tensor is an input of an operation that the output depends on."""
        return Counter(name for operation in self.reachable() for name in operation.inputs)


def read_graph(path: Path) -> OnnxGraph:
    """Reads one input [N, 3, S, S] and one output.

    Raises:
        UserError: not an ONNX file, or not one of a recogniser.
    """
    model = load(path)
    import onnx  # `load` says what to install where it is not

    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise UserError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; a recogniser has one of each"
        )
    taken = inputs[0].type.tensor_type
    shape = [dim.dim_value or None for dim in taken.shape.dim]
    are_images = len(shape) == 4 and shape[1] in (3, None) and shape[2] == shape[3]
    if taken.elem_type != onnx.TensorProto.FLOAT or not are_images:
        kind = onnx.TensorProto.DataType.Name(taken.elem_type).lower()
        raise UserError(f"{path} takes {kind} {shape}; a recogniser that can be trained takes float32 [N, 3, S, S]")
    reader = _Reader(onnx, model, stored, inputs[0].name)
    for node in model.graph.node:
        reader.read(node)
    output = reader.source(model.graph.output[0].name)
    return OnnxGraph(reader.operations, reader.image, output, shape[2], shape[0])


class _Reader:
    """Goes through the nodes in order. In ONNX a tensor is computed before it is used."""

    def __init__(self, onnx: Any, model: Any, constants: dict[str, np.ndarray], image: str) -> None:
        self._onnx, self._opsets = onnx, list(model.opset_import)
        self._constants = constants
        self._same: dict[str, str] = {}  # tensor -> the tensor whose numbers it has
        self.operations: dict[str, Operation] = {}
        self.image = {image: (1.0, 0.0)}

    def source(self, tensor: str) -> str:
        return self._same.get(tensor, tensor)

    def read(self, node: Any) -> None:
        settings = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        if all(name in self._constants for name in node.input if name) and node.op_type in _FOLDED:
            self._fold(node)
            return
        # data and constants; an omitted input is neither
        given = [self.source(name) for name in node.input if name]
        data = tuple(name for name in given if name not in self._constants)
        constants = [self._constants[name].astype(np.float32) for name in given if name in self._constants]
        out = node.output[0]
        if node.op_type == "CastLike" and given[0] in self._constants:
            self._constants[out] = self._constants[given[0]]
        elif node.op_type in _PASSED:
            self._same[out] = given[0]
        elif len(data) == 1 and data[0] in self.image and node.op_type in ("Add", "Sub", "Mul", "Div"):
            self._normalise(node.op_type, data[0], constants, given[0] == data[0], out)
        elif node.op_type == "Add" and len(data) == 1 and self._takes_bias(data[0], constants[0]):
            before = self.operations[data[0]]
            tensors = {**before.tensors, "bias": constants[0].reshape(-1)}
            self.operations[out] = Operation(before.kind, before.inputs, tensors, before.settings)
        else:
            self.operations[out] = _operation(node.op_type, data, constants, settings)

    def _fold(self, node: Any) -> None:
        from onnx.reference import ReferenceEvaluator

        values = {name: self._constants[name] for name in node.input if name}
        shape_at = {"ConstantOfShape": 0, "Expand": 1}.get(node.op_type, -1)  # which input says how large the result is
        largest = values.get(dict(enumerate(node.input)).get(shape_at, ""), ())
        if math.prod(np.asarray(largest, dtype=np.int64).tolist()) > _LARGEST:
            raise UserError("an ONNX file that computes a constant of more than a gigabyte; it was not read")
        helper, unknown = self._onnx.helper, self._onnx.TypeProto()
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_value_info(name, unknown) for name in values],
            [helper.make_value_info(name, unknown) for name in node.output],
        )
        try:
            found = ReferenceEvaluator(helper.make_model(graph, opset_imports=self._opsets)).run(None, values)
        except Exception:  # not part of these networks
            self.operations[node.output[0]] = Operation(node.op_type, ())
            return
        self._constants.update(zip(node.output, map(np.asarray, found)))

    def _normalise(self, kind: str, data: str, constants: list[np.ndarray], first: bool, out: str) -> None:
        """The pixels' own arithmetic before the first layer, as one factor and one summand."""
        factor, summand = self.image[data]
        value = float(constants[0].flat[0])
        if not (constants[0] == value).all() or (kind in ("Sub", "Div") and not first):
            self.operations[out] = Operation(f"{kind} of the pixels by colour", (data,))
        elif kind in ("Add", "Sub"):
            self.image[out] = (factor, summand + (value if kind == "Add" else -value))
        else:
            by = value if kind == "Mul" else 1 / value
            self.image[out] = (factor * by, summand * by)

    def _takes_bias(self, tensor: str, constant: np.ndarray) -> bool:
        before = self.operations.get(tensor)
        if before is None or before.kind not in ("conv", "linear") or "bias" in before.tensors:
            return False
        return constant.size == before.tensors["weight"].shape[0]


def _operation(kind: str, data: tuple[str, ...], constants: list[np.ndarray], settings: dict[str, Any]) -> Operation:
    if kind == "Add" and len(data) == 2:
        return Operation("add", data)
    if len(data) == 1:
        match kind, constants:
            case "Conv", [weight, *bias]:
                defaults = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}
                if settings.get("auto_pad", b"NOTSET") == b"NOTSET" and weight.ndim == 4:
                    chosen = {name: settings.get(name, default) for name, default in defaults.items()}
                    return Operation("conv", data, {"weight": weight, **({"bias": bias[0]} if bias else {})}, chosen)
            case "BatchNormalization", [weight, bias, mean, variance]:
                tensors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
                return Operation("norm", data, tensors, {"epsilon": settings.get("epsilon", 1e-5)})
            case "PRelu", [slope]:
                return Operation("prelu", data, {"weight": slope.reshape(-1)})
            case "Gemm", [weight, *bias] if not settings.get("transA", 0):
                weight = settings.get("alpha", 1.0) * (weight if settings.get("transB", 0) else weight.T)
                added = {"bias": settings.get("beta", 1.0) * bias[0].reshape(-1)} if bias else {}
                return Operation("linear", data, {"weight": weight, **added})
            case "MatMul", [weight] if weight.ndim == 2:
                return Operation("linear", data, {"weight": weight.T})
            case "MaxPool", []:
                return Operation("pool", data, {}, {name: settings.get(name) for name in ("kernel_shape", "strides")})
    return Operation(kind, data)
