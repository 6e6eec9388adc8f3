"""What an ONNX file says of the images it takes: its metadata, its input's shape and type, its first nodes, its first BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.errors import UserError
from lvtrain.weights.model_input import ASSUMED, METADATA, RANGES, ModelInput

_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64", "UINT8": "uint8"}
# an aligned face crop's pixels, red, green, blue: VGGFace2's published means, and a usual spread
_FACE_MEAN, _FACE_STD = np.array([131.1, 103.9, 91.5], dtype=np.float32), 62.0
# A BatchNorm's statistics are believed where `_misfit` is below _FITS, and the next range's is _CLEAR times as large. SFace without its own
# normalisation has 0.40 in its own range, 0.88 in the next, 163 as bytes. In BGR it has 0.48: that is too near to decide the colour order.
# Nor do they decide for imagenet: its images have variance 1, and so has the noise that a network without a training has seen.
_FITS, _CLEAR = 1.0, 1.9


def read_input(path: Path, words: str = "") -> ModelInput:
    """How the file takes its images.

    Args:
        path: an ONNX file.
        words: what the user says of it, see `ModelInput.changed`.

    Raises:
        UserError: not an ONNX file, or not one that takes one batch of colour images.
    """
    model = _load(path)
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]  # older files list their weights, too
    if len(inputs) != 1:
        raise UserError(f"{path} has {len(inputs)} inputs ({', '.join(v.name for v in inputs)}); a recogniser has one")
    found = _declared(path, inputs[0])
    said = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA)
    if said:
        found = found.changed(said, "the file's metadata")
    else:
        found = _by_graph(path, model, inputs[0].name, found, stored)
    return found.changed(words)


def _load(path: Path) -> Any:
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise UserError(f'{path}: reading ONNX needs onnx and onnxruntime; pip install "lvtrain[tools]"') from error
    try:
        return onnx.inliner.inline_local_functions(onnx.load(str(path)))
    except Exception as error:
        raise UserError(f"{path} is not a whole ONNX file ({type(error).__name__}); copy it again") from error


def _declared(path: Path, value: Any) -> ModelInput:
    """Layout, size, type and batch, from the input's declaration."""
    import onnx

    taken = value.type.tensor_type
    shape = [dim.dim_value or None for dim in taken.shape.dim]
    kind = onnx.TensorProto.DataType.Name(taken.elem_type)
    if len(shape) != 4 or kind not in _TYPES:
        raise UserError(f"{path} takes {kind.lower()} {shape}, not images [N, 3, H, W]; it is not a face recogniser")
    layout = "nhwc" if shape[3] == 3 and shape[1] != 3 else "nchw"
    if shape[3 if layout == "nhwc" else 1] not in (3, None):
        raise UserError(f"{path} takes {shape}, not images of three colours; it is not a face recogniser of RGB images")
    height, width = shape[1:3] if layout == "nhwc" else shape[2:]
    if height != width:
        raise UserError(f"{path} takes images of {width}x{height} pixels; aligned faces are square")
    sources = {"layout": "shape"} if 3 in (shape[1], shape[3]) else {}
    if height:
        sources["size"] = "shape"
    sources |= {"colours": ASSUMED, "range": ASSUMED}
    found = ModelInput(size=height or 112, layout=layout, dtype=_TYPES[kind], batch=shape[0], sources=sources)
    return _in_range(found, "0..255", "it takes bytes") if kind == "UINT8" else found


# ------------------------------------------------------------------------------------------------------------------ arithmetic of pixels


@dataclass(frozen=True)
class _Step:
    """One node that computes on the pixels alone: they become factor * x + summand, by channel or all alike, or in reversed channel order."""

    factor: np.ndarray
    summand: np.ndarray
    reverses: bool = False


def _by_graph(path: Path, model: Any, image: str, found: ModelInput, stored: set[str]) -> ModelInput:
    factor, summand, reversed_ = np.ones(3), np.zeros(3), False
    for step in _steps(model, image, 3 if found.layout == "nhwc" else 1):
        factor, summand = factor * step.factor, summand * step.factor + step.summand
        if step.reverses:
            factor, summand, reversed_ = factor[::-1], summand[::-1], not reversed_
    if reversed_:  # from here on by the channels of the input
        factor, summand = factor[::-1], summand[::-1]
        found = _in_order(found, "bgr", "the graph reverses the channels")
    if not (np.allclose(factor, 1) and np.allclose(summand, 0)):
        mean = -summand / factor  # what it subtracts, in the input's units
        shown = ",".join(f"{value:g}" for value in dict.fromkeys(mean.round(4).tolist()))
        divisor = ",".join(f"{1 / value:g}" for value in dict.fromkeys(factor.tolist()))
        found = _in_range(
            found, _range_of(mean, factor), f"the graph normalises itself: mean {shown}, divisor {divisor}"
        )
        steps = np.diff(mean) / np.abs(mean).mean() if mean.any() else np.zeros(2)
        if (
            np.abs(steps).min() > 0.02 and steps[0] * steps[1] > 0
        ):  # photographs have more red than green, and least blue
            found = _in_order(found, "bgr" if steps[0] > 0 else "rgb", "by the order of the graph's means")
    elif found.assumed and (range_ := _by_statistics(path, model, image, found)) is not None:
        found = _in_range(found, range_, "from the first BatchNorm's statistics")
    return found


def _range_of(mean: np.ndarray, factor: np.ndarray) -> str:
    """The range of an input from which a graph subtracts `mean` before it multiplies by `factor`."""
    middle = float(mean.mean())
    if middle < -0.25:  # it turns centred pixels back
        return "-127.5..127.5" if middle < -1.5 else "-1..1"
    return "0..255" if middle > 1.5 or (not mean.any() and np.abs(factor).max() < 0.05) else "0..1"


def _in_order(found: ModelInput, colours: str, why: str) -> ModelInput:
    return replace(found, colours=colours, sources={**found.sources, "colours": why})


def _in_range(found: ModelInput, name: str, why: str) -> ModelInput:
    mean, std = RANGES[name]
    return replace(found, mean=mean, std=std, sources={**found.sources, "range": why})


def _steps(model: Any, image: str, axis: int) -> Iterator[_Step]:
    """The nodes between the image and the first layer, as far as one follows another and each is plain arithmetic. `axis` has the channels."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    tensor, one, zero = image, np.ones(3), np.zeros(3)
    while True:
        users = [node for node in model.graph.node if tensor in node.input]
        if len(users) != 1:
            return
        (node,) = users
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        others = [constants.get(name) for name in node.input if name and name != tensor]
        known = [numpy_helper.to_array(value).reshape(-1) for value in others if value is not None]
        if node.op_type == "Transpose":
            axis = list(given.get("perm", range(3, -1, -1))).index(axis)
        elif node.op_type in ("Gather", "GatherND", "Slice") and len(known) == len(others) and node.input[0] == tensor:
            # torch's exporter gathers from the first axis, which it moved there, by GatherND
            if given.get("batch_dims", 0) or not _reverses(node.op_type, known, given.get("axis", 0), axis):
                return
            yield _Step(one, zero, reverses=True)
        elif node.op_type in ("Add", "Sub", "Mul", "Div") and len(known) == len(others) == 1:
            value, first = known[0].astype(np.float64), node.input[0] == tensor
            if value.size not in (1, 3) or (node.op_type == "Div" and not first):
                return
            value = np.broadcast_to(value, 3)
            if node.op_type == "Add":
                yield _Step(one, value)
            elif node.op_type == "Sub":
                yield _Step(one, -value) if first else _Step(-one, value)
            else:
                yield _Step(value if node.op_type == "Mul" else 1 / value, zero)
        elif node.op_type not in ("Cast", "CastLike", "Identity"):
            return
        tensor = node.output[0]


def _reverses(kind: str, values: list[np.ndarray], axis: int, channels: int) -> bool:
    """Whether a Gather or a Slice turns the order of the three channels, and does nothing else."""
    if kind != "Slice":
        return axis % 4 == channels and [int(i) % 3 for i in values[0]] == [2, 1, 0]
    if len(values) != 4 or any(value.size != 1 for value in values):
        return False
    start, end, where, step = (int(value[0]) for value in values)
    return where % 4 == channels and step == -1 and (start == -1 or start >= 2) and end < -3


# ------------------------------------------------------------------------------------------------------------ statistics of a BatchNorm


def _by_statistics(path: Path, model: Any, image: str, found: ModelInput) -> str | None:
    """The range in which the first BatchNorm's stored mean and variance are what face-like images give; None if no range is clearly best."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    node = next((node for node in model.graph.node if node.op_type == "BatchNormalization"), None)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if node is None or any(name not in stored for name in node.input[1:5]):
        return None
    mean, variance = (numpy_helper.to_array(stored[name]).astype(np.float64) for name in node.input[3:5])
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
    together = found.batch or 4
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        scores = {}
        for name in RANGES:
            taken = _in_range(found, name, "")
            parts = faces(2 * together, found.size).split(together)
            seen = np.concatenate([session.run(None, {image: taken.given(part).numpy()})[0] for part in parts])
            scores[name] = _misfit(seen.astype(np.float64), mean, variance)
    except Exception:  # a graph that cannot be cut here says nothing
        return None
    best, second = sorted(scores, key=scores.__getitem__)[:2]
    clear = scores[best] < _FITS and scores[second] > _CLEAR * scores[best]
    return best if clear and best != "imagenet" else None


def _misfit(seen: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """How far a feature map [N, C, ...] is from stored statistics: median over channels of the Gaussians' symmetric divergence, its root."""
    own = np.moveaxis(seen, 1, 0).reshape(seen.shape[1], -1)
    alive = variance > 1e-8 * variance.max()
    if own.shape[0] != len(mean) or not alive.any():
        return float("inf")
    m, v = own.mean(1)[alive], np.maximum(own.var(1)[alive], 1e-12 * variance.max())
    mean, variance = mean[alive], variance[alive]
    square = (m - mean) ** 2
    divergence = 0.5 * ((v + square) / variance + (variance + square) / v) - 1
    return float(np.sqrt(np.median(divergence)))


def faces(count: int, size: int) -> torch.Tensor:
    """Images with the colours, the contrast and the smoothness of face crops, but no face: float32 RGB `[count, 3, size, size]` as ours."""
    generator = torch.Generator().manual_seed(0)
    field = torch.zeros(count, 3, size, size)
    for side, weight in ((3, 0.75), (7, 0.45), (28, 0.3), (size, 0.06)):  # large shapes weigh more, as in photographs
        grey = torch.randn(count, 1, side, side, generator=generator)
        colour = torch.randn(count, 3, side, side, generator=generator)
        drawn = 0.95 * grey + 0.3 * colour
        field += weight * torch.nn.functional.interpolate(drawn, (size, size), mode="bilinear", align_corners=False)
    field = field / field.std()
    pixels = field * _FACE_STD + torch.from_numpy(_FACE_MEAN).view(1, 3, 1, 1)
    return (pixels.clamp(0, 255) - 127.5) / 127.5
