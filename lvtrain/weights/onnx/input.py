"""What an ONNX file says of the images it takes: its metadata, its input's shape and type, its first nodes, its first BatchNorm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.errors import UserError
from lvtrain.weights.model_input import ASSUMED, METADATA, RANGES, SHAPE, ModelInput
from lvtrain.weights.onnx.file import load

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
    model = load(path)
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
        found = _by_graph(path, model, inputs[0].name, found)
    return found.changed(words)


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
    sources = {"colours": ASSUMED, "range": ASSUMED}
    sources["layout"] = SHAPE if 3 in (shape[1], shape[3]) else ASSUMED
    sources["size"] = SHAPE if height else ASSUMED
    if shape[0]:
        sources["batch"] = SHAPE
    found = ModelInput(size=height or 112, layout=layout, dtype=_TYPES[kind], batch=shape[0], sources=sources)
    return _in_range(found, "0..255", "it takes bytes") if kind == "UINT8" else found


# ------------------------------------------------------------------------------------------------------------------ arithmetic of pixels


def _by_graph(path: Path, model: Any, image: str, found: ModelInput) -> ModelInput:
    """What the graph does to pixels before its first layer: measured, so that the operations do not matter."""
    measured = _arithmetic(model, image, found)
    if measured is None:  # by the channels of the input
        factor, summand, is_reversed = np.ones(3), np.zeros(3), False
    else:
        factor, summand, is_reversed = measured
    if is_reversed:
        found = _in_order(found, "bgr", "the graph reverses the channels")
    if not (np.allclose(factor, 1, atol=1e-3) and np.allclose(summand, 0, atol=1e-3)):
        mean = (-summand / factor).round(4)  # what it subtracts, in the input's units
        mean[np.abs(mean * factor) < 1e-3] = 0.0  # rounding of what is none
        shown = ",".join(f"{value:g}" for value in dict.fromkeys(_digits(mean)))
        divisor = ",".join(f"{value:g}" for value in dict.fromkeys(_digits(1 / factor)))
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


def _digits(values: np.ndarray) -> list[float]:
    """As they were meant: float32 leaves six digits that are right."""
    return [float(f"{value:.6g}") for value in values.tolist()]


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


def _arithmetic(model: Any, image: str, found: ModelInput) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Factor and summand that each channel of the input gets before the first layer, float64 [3] each, and whether the channels are reversed.

    Images of one colour each show it, however the graph computes it. None if the first layer sees anything else than
    factor * pixel + summand by channel.
    """
    wanted = _before_first_layer(model, image)
    generator = np.random.default_rng(0)
    count = -(-_COLOURS // (found.batch or 1)) * (found.batch or 1)
    seen = []
    for low, high in ((0.0, 255.0), (0.0, 1.0), (-1.0, 1.0)):  # a graph may clip its pixels to its own range
        drawn = generator.uniform(low, high, (count, 3)).round(0 if found.dtype == "uint8" else 2)
        colours = torch.from_numpy(drawn).to(getattr(torch, found.dtype))
        shape = (count, found.size, found.size, 3) if found.layout == "nhwc" else (count, 3, found.size, found.size)
        pixels = colours.view(count, *((1, 1, 3) if found.layout == "nhwc" else (3, 1, 1))).expand(shape)
        try:
            values = _outputs(model, image, wanted, pixels.contiguous().numpy(), found.batch)
        except Exception:  # a part that onnxruntime cannot run alone says nothing
            return None
        seen.append([(colours.double().numpy(), value) for value in values])
    last_first = (pair for tensor in reversed(list(zip(*seen))) for pair in tensor)
    return next((fit for pair in last_first if (fit := _fitted(*pair)) is not None), None)


_COLOURS = 8  # images from which the twelve numbers of an affine map of colours are fitted
_LAYERS = {
    *("Conv", "ConvInteger", "ConvTranspose", "QLinearConv", "Einsum", "Gemm", "MatMul", "MatMulInteger"),
    *("QLinearMatMul", "BatchNormalization", "InstanceNormalization", "LayerNormalization"),
}


def _fitted(colours: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """The affine map by channel from `colours` [n, 3] to a tensor [n, ...] that is a feature map of one colour an image."""
    if values.ndim != 4 or values.dtype.kind not in "fui" or not np.isfinite(values).all():
        return None
    axis = 1 if values.shape[1] == 3 else 3
    if values.shape[axis] != 3 or min(values.shape[1:]) < 3:
        return None
    flat = np.moveaxis(values, axis, 1).reshape(len(values), 3, -1).astype(np.float64)
    mean, scale = flat.mean(2), np.abs(flat).max()
    if not scale or np.abs(flat - mean[..., None]).max() > 1e-3 * scale:
        return None
    known = np.concatenate([colours, np.ones((len(colours), 1))], axis=1)
    solved, *_ = np.linalg.lstsq(known, mean, rcond=None)
    if np.abs(known @ solved - mean).max() > 2e-3 * np.ptp(mean):
        return None
    matrix, summand = solved[:3].T, solved[3]
    for is_reversed, one in ((False, matrix), (True, matrix[::-1])):  # by the input's channels
        factor = one.diagonal()
        if np.abs(one - np.diag(factor)).max() < 1e-2 * np.abs(factor).min():
            return factor, summand[::-1] if is_reversed else summand, is_reversed
    return None


def _before_first_layer(model: Any, image: str) -> list[str]:
    """The tensors that the image becomes on its way to the first layer, in order; the image itself is none of them."""
    makers = {output: node for node in model.graph.node for output in node.output}
    depends, first = {image}, None
    for node in model.graph.node:
        if depends.intersection(node.input) and node.op_type != "Shape":
            if node.op_type in _LAYERS:
                first = node.input[0]
                break
            depends.update(node.output)
    needed, waiting = set(), [first] if first else []
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += makers[name].input if name in makers else []
    return [output for node in model.graph.node for output in node.output if output in needed & depends]


def _outputs(model: Any, image: str, wanted: list[str], images: np.ndarray, batch: int | None) -> list[np.ndarray]:
    """The tensors `wanted` of some images, a multiple of `batch`, by onnxruntime. No other part of the model is loaded."""
    import onnx
    import onnxruntime

    if not wanted:
        return []
    nodes, needed = [], set(wanted)
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(filter(None, node.input))  # an optional input that is left out has no name
    part = onnx.helper.make_graph(
        nodes[::-1],
        "part",
        [value for value in model.graph.input if value.name == image],
        [onnx.helper.make_empty_tensor_value_info(name) for name in wanted],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    made = onnx.helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    parts = np.split(images, len(images) // (batch or len(images)))
    return [np.concatenate(each) for each in zip(*(session.run(wanted, {image: part}) for part in parts))]


# ------------------------------------------------------------------------------------------------------------ statistics of a BatchNorm


def _by_statistics(path: Path, model: Any, image: str, found: ModelInput) -> str | None:
    """The range in which the first BatchNorm's stored mean and variance are what face-like images give; None if no range is clearly best."""
    from onnx import numpy_helper

    node = next((node for node in model.graph.node if node.op_type == "BatchNormalization"), None)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if node is None or any(name not in stored for name in node.input[1:5]):
        return None
    mean, variance = (numpy_helper.to_array(stored[name]).astype(np.float64) for name in node.input[3:5])
    together = found.batch or 4
    images = faces(2 * together, found.size)
    try:
        scores = {}
        for name in RANGES:
            taken = _in_range(found, name, "").given(images).numpy()
            (seen,) = _outputs(model, image, [node.input[0]], taken, found.batch)
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
