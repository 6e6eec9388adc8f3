"""Static int8 for small devices: scales from calibration images, and the error of each layer."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.bins import read_bin
from lvtrain.evaluation.sources import labelled_images
from lvtrain.weights.extract import decode

QUANTISED = ("Conv", "Gemm", "MatMul")  # operations with weights; attention's products stay float32
_IMAGES = 256
_MEASURED = 16  # images that the layers are compared on


@dataclass(frozen=True)
class LayerCosine:
    """The cosine between a quantised layer's output and the float32 file's, over some images.

    Attributes:
        layer: the module that the layer is of, as the exporter named it; else the name of the graph's node.
        kind: the operation: Conv, Gemm or MatMul.
        cosine: of both outputs, all images as one vector. 1 is no difference; 0 where one of them is all zeros.
    """

    layer: str
    kind: str
    cosine: float


def to_static_int8(source: str | Path, target: str | Path, images: np.ndarray) -> list[LayerCosine]:
    """Writes `source` with int8 convolutions and linears, one scale per output channel of a weight, one for each activation.

    Args:
        source: float32 ONNX file.
        target: file to write.
        images: float32 [N, 3, S, S], normalised, at least one batch of the file: the scales cover what these images
            reach.

    Returns:
        Every quantised layer, the lowest cosine first.

    Raises:
        UserError: a file that onnxruntime cannot quantise.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(str(source))
    taken = model.graph.input[0]
    batch = taken.type.tensor_type.shape.dim[0].dim_value or 8
    parts = list(_batches(images, batch))
    with tempfile.TemporaryDirectory(prefix="lvtrain-int8-") as room:
        prepared = Path(room) / "prepared.onnx"
        stripped = Path(room) / "stripped.onnx"
        del model.graph.value_info[:]  # the exporter's intermediate shapes name symbols the quantiser cannot follow
        onnx.save(model, str(stripped))
        try:
            quant_pre_process(str(stripped), str(prepared), skip_symbolic_shape=True)
            layers = _layers(prepared)
            quantize_static(
                str(prepared),
                str(target),
                _Reader(taken.name, parts),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                nodes_to_quantize=[node.name for node in layers.values()],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot quantise this file: {' '.join(str(error).split())[:200]}; take another precision"
            ) from error
        measured = list(_batches(images[: max(_MEASURED, batch)], batch))
        names = {node.name: _layer(node) for node in model.graph.node}
        return _cosines(layers, names, prepared, Path(target), measured)


class _Reader:
    """What onnxruntime's calibration asks for: one batch after another, then None."""

    def __init__(self, name: str, parts: list[np.ndarray]) -> None:
        self._feeds = iter([{name: part} for part in parts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    whole = len(images) - len(images) % size
    for first in range(0, whole, size):
        yield np.ascontiguousarray(images[first : first + size], dtype=np.float32)


def calibration_images(path: Path, image_size: int) -> np.ndarray:
    """Images for calibration: float32 [N, 3, S, S], normalised.

    They are spread evenly over a dataset, a folder with one folder per identity, or a `.bin` set. Their order does not depend
    on identities, so any part of them can be used.

    Raises:
        UserError: none of these, or fewer than 32 images.
    """
    encoded = read_bin(path, strict=False)[0] if path.suffix == ".bin" else labelled_images(path)[0]
    chosen = np.unique(np.linspace(0, len(encoded) - 1, _IMAGES).astype(np.int64))
    if len(chosen) < 32:
        raise UserError(f"{path} holds {len(chosen)} images; 32 are needed to find scales, 200 are better")
    chosen = np.random.default_rng(0).permutation(chosen)
    pixels = np.stack([decode(encoded[int(position)], image_size) for position in chosen])
    return (pixels.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5


def _layers(path: Path) -> dict[str, Any]:
    """The nodes to quantise, by the tensor they make, in order; a node's weight is its only constant of two or more dimensions."""
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type in QUANTISED and any(name in weights for name in node.input)
    }


def _layer(node: Any) -> str:
    """The module of the network that the exporter made a node of; the node's own name where the file does not say."""
    scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
    return str(ast.literal_eval(scopes[0])[-2]) if scopes else str(node.name)


def _cosines(
    layers: dict[str, Any], names: dict[str, str], plain: Path, narrow: Path, parts: list[np.ndarray]
) -> list[LayerCosine]:
    """The outputs of the quantised operations in both files, side by side."""
    found = {output: np.zeros(3) for output in layers}  # dot product, squared lengths
    runs = [_outputs(path, list(layers)) for path in (plain, narrow)]
    for part in parts:
        for output, ours, theirs in zip(layers, *(run(part) for run in runs)):
            a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
            found[output] += a @ b, a @ a, b @ b
    cosines = []
    for output, node in layers.items():
        dot, ours, theirs = found[output]
        weight = next((name.removesuffix(".weight") for name in node.input if name.endswith(".weight")), None)
        layer = weight or names.get(node.name, node.name)
        length = float(np.sqrt(ours * theirs))
        cosines.append(LayerCosine(layer, node.op_type, float(dot) / length if length else 0.0))
    return sorted(cosines, key=lambda layer: layer.cosine)


def _outputs(path: Path, tensors: list[str]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function images -> the values of these tensors of the file."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    running = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (source,) = running.get_inputs()
    return lambda images: running.run(tensors, {source.name: images})
