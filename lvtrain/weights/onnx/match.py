"""Reads insightface's ONNX packs (w600k_r50, w600k_mbf, glintr100 and others) as weights of our IResNet or MobileFaceNet.

The file's operations are matched with the network's, traced with torch.fx, from the output to the image. A BatchNorm that the
export folded into the layer before it becomes one that only adds that layer's bias, so the embeddings do not change.
(`norms.restore_statistics` then gives it statistics to train with.) The embeddings are compared with the file's, so a graph
that only looks similar is refused.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lvtrain.backbones.iresnet import IResNet
from lvtrain.backbones.registry import published_sizes
from lvtrain.errors import UserError
from lvtrain.weights.architecture import Architecture, fit, recognise
from lvtrain.weights.model_input import ModelInput
from lvtrain.weights.onnx.file import session
from lvtrain.weights.onnx.graph import OnnxGraph, Operation, read_graph
from lvtrain.weights.onnx.input import read_input

_CLOSE = 1e-4  # largest difference to the file's embeddings; relative to the largest value if that is above 1
_LEAVES = (nn.Conv2d, _BatchNorm, nn.PReLU, nn.Linear, nn.MaxPool2d, nn.Dropout, nn.Identity, nn.Flatten)


@dataclass
class OnnxWeights:
    """Weights by our names.

    `folded`: BatchNorms that the file has no more; `difference` of the embeddings to the file's, as `_CLOSE`; `input`: colour order and range of its images.
    """

    architecture: Architecture
    state: dict[str, torch.Tensor]
    folded: list[str]
    difference: float
    input: str

    def __str__(self) -> str:
        folded = f", {len(self.folded)} BatchNorms were folded" if self.folded else ""
        return f"ONNX graph{folded}, embeddings differ from the file's by {self.difference:.0e} of the largest"


def read_onnx(path: Path, takes: str = "") -> OnnxWeights:
    """The weights take RGB, (x - 127.5) / 127.5, and give the file's embeddings.

    Args:
        path: an ONNX file.
        takes: how the file takes its images, where it does not say so itself; see `ModelInput.changed`.

    Raises:
        UserError: it is not one of these networks. The line says what was found.
    """
    graph, taken = read_graph(path), read_input(path, takes)
    try:
        architecture = _guess(graph)
        with torch.device("meta"):
            match = _match(graph, architecture.create().eval(), taken)
        architecture = replace(recognise(match.state), image_size=architecture.image_size)
    except _Mismatch as error:
        raise UserError(f"{path} {error}; an IResNet, MobileFaceNet or MobileNet of insightface is expected") from error
    difference = _difference(path, taken, architecture, match)
    if not difference <= _CLOSE:
        raise UserError(
            f"{path} looks like {architecture.name}, but its embeddings differ by {difference:.1e} from those of the weights read from it; not used"
        )
    return OnnxWeights(architecture, match.state, match.folded, difference, taken.pixels())


class _Mismatch(Exception): ...


def _guess(graph: OnnxGraph) -> Architecture:
    """The only network that these convolutions can be, by their count and strides."""
    operations = list(graph.reachable())
    convs = [operation for operation in operations if operation.kind == "conv"]
    linears = [operation for operation in operations if operation.kind == "linear"]
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(o.kind for o in operations).most_common(5))
    found = f"is an ONNX graph of {counts}"
    if not convs or not linears or graph.output not in graph.operations:
        raise _Mismatch(found)
    width, _, kernel, _ = convs[0].tensors["weight"].shape
    stride = convs[0].settings["strides"][0]
    found += f", first convolution {kernel}x{kernel} to {width} channels, stride {stride}"
    strides = [conv.settings["strides"][0] for conv in convs[1:] if conv.tensors["weight"].shape[2] == 3]
    embedding_dim, features = linears[-1].tensors["weight"].shape
    if (kernel, stride) == (3, 1) and len(convs) == 27 and convs[1].settings["group"] == width:
        return Architecture("mobilenet", embedding_dim, graph.image_size or 112, {"scale": width})
    if (kernel, stride, width) == (3, 1, 64):
        image_size = graph.image_size or 16 * math.isqrt(features // 512)
        layers = _runs(strides[1::2])
        names = [name for name, size in published_sizes(IResNet).items() if size["layers"] == layers]
        if not names:
            raise _Mismatch(f"{found}, layers of {layers} blocks")
        subsample = any(operation.kind == "pool" for operation in operations)
        overrides: dict[str, Any] = {"first_shortcut": "subsample"} if subsample else {}
        return Architecture(names[0], embedding_dim, image_size, overrides)
    if (kernel, stride) == (3, 2) and width % 64 == 0:
        image_size = graph.image_size or 16 * max(conv.tensors["weight"].shape[2] for conv in convs)
        first, *others = _runs([2, *strides])
        overrides = {"blocks": (first - 1, *(count - 1 for count in others)), "scale": width // 64}
        if len(others) != 3 or min(overrides["blocks"]) < 1:
            raise _Mismatch(found)
        return Architecture("mobilefacenet", embedding_dim, image_size, overrides)
    raise _Mismatch(found)


def _runs(strides: list[int]) -> tuple[int, ...]:
    """How many there are from each stride above 1 up to the next."""
    starts = [position for position, stride in enumerate(strides) if stride > 1]
    return tuple(end - start for start, end in zip(starts, [*starts[1:], len(strides)]))


class _Layers(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _LEAVES)


@dataclass
class _Match:
    taken: ModelInput
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    def put(self, name: str, **arrays: np.ndarray) -> None:
        for what, array in arrays.items():
            self.state[f"{name}.{what}"] = torch.from_numpy(np.array(array, dtype=np.float32))


def _match(graph: OnnxGraph, backbone: nn.Module, taken: ModelInput) -> _Match:
    """Lays the network's graph beside the file's, from the output to the image.

    Raises:
        _Mismatch: where they differ.
    """
    traced = _Layers().trace(backbone, concrete_args={"return_tokens": False})
    uses, match = graph.uses(), _Match(taken)
    seen: dict[fx.Node, str] = {}
    (end,) = (node for node in traced.nodes if node.op == "output")
    waiting = [(_source(end.args[0], backbone), graph.output)]
    while waiting:
        node, tensor = waiting.pop()
        if node in seen:
            if seen[node] != tensor:
                raise _Mismatch(f"joins other layers than ours at {node.name}")
            continue
        seen[node] = tensor
        if node.op == "placeholder":
            if tensor not in graph.image:
                raise _Mismatch(f"has {_kind(graph, tensor)} before what should be its first layer")
            continue
        operands = [_source(operand, backbone) for operand in node.args if isinstance(operand, fx.Node)]
        found = graph.operations.get(tensor, Operation("the image", ()))
        if node.target is operator.add:
            waiting += zip(operands, _sides(graph, uses, backbone, operands, found))
            continue
        module = backbone.get_submodule(str(node.target))
        if isinstance(module, _BatchNorm) and found.kind != "norm":
            _fold(match, str(node.target), module)
            waiting.append((operands[0], tensor))
            continue
        if not _same_layer(module, found):
            raise _Mismatch(f"has {_kind(graph, tensor)} where ours has {node.target}")
        _take(match, graph, node, module, found)
        waiting.append((operands[0], found.inputs[0]))
    return match


def _source(node: Any, backbone: nn.Module) -> fx.Node:
    """The node that a node's numbers come from; nodes that do not change numbers are skipped."""
    while node.op == "call_method" or (
        node.op == "call_module"
        and isinstance(backbone.get_submodule(node.target), (nn.Dropout, nn.Identity, nn.Flatten))
    ):
        node = node.args[0]
    return node


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _kind(graph: OnnxGraph, tensor: str) -> str:
    found = graph.operations.get(tensor)
    if found is None:
        return "the image"
    shape = "x".join(map(str, found.tensors["weight"].shape)) if "weight" in found.tensors else ""
    return f"{found.kind} {shape}".strip()


def _sides(
    graph: OnnxGraph, uses: Counter[str], backbone: nn.Module, operands: list[fx.Node], found: Operation
) -> tuple[str, ...]:
    """The file's two summands in our order. The one that is used again is the block's input; otherwise the layer below decides."""
    if found.kind != "add":
        raise _Mismatch(f"has {found.kind} where ours adds {' and '.join(map(_name, operands))}")

    def fits(node: fx.Node, tensor: str) -> bool:
        if (len(_users(node, backbone)) > 1) != (uses[tensor] > 1):
            return False
        while node.op == "call_module":
            module = backbone.get_submodule(str(node.target))
            if not isinstance(module, _BatchNorm):
                return _same_layer(module, graph.operations.get(tensor, Operation("", ())))
            if (operation := graph.operations.get(tensor)) is not None and operation.kind == "norm":
                tensor = operation.inputs[0]
            node = _source(node.args[0], backbone)
        return True

    for inputs in (found.inputs, found.inputs[::-1]):
        if all(map(fits, operands, inputs)):
            return inputs
    raise _Mismatch(
        f"adds {_kind(graph, found.inputs[0])} and {_kind(graph, found.inputs[1])} where ours adds {' and '.join(map(_name, operands))}"
    )


def _users(node: fx.Node, backbone: nn.Module) -> set[fx.Node]:
    """The nodes that use a node's numbers; nodes that do not change numbers are skipped."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user.op != "output" and _source(user, backbone) is _source(node, backbone):
            found |= _users(user, backbone)
        else:
            found.add(user)
    return found


def _same_layer(module: nn.Module, found: Operation) -> bool:
    weight = found.tensors.get("weight")
    if isinstance(module, nn.Conv2d):
        sides = [2 * list(module.padding), list(module.stride), list(module.dilation), module.groups]
        theirs = [
            list(v) if isinstance(v, (list, tuple)) else v
            for v in map(found.settings.get, ("pads", "strides", "dilations", "group"))
        ]
        return found.kind == "conv" and weight is not None and weight.shape == module.weight.shape and sides == theirs
    if isinstance(module, nn.MaxPool2d):
        sizes = [list(found.settings.get(name) or ()) for name in ("kernel_shape", "strides")]
        return found.kind == "pool" and sizes == [2 * [module.kernel_size], 2 * [module.stride]]
    kinds = {nn.Linear: "linear", nn.PReLU: "prelu", _BatchNorm: "norm"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)
    if kind != found.kind or weight is None:
        return False
    return weight.shape == module.weight.shape or (kind == "prelu" and weight.size == 1)  # type: ignore[union-attr]


def _take(match: _Match, graph: OnnxGraph, node: fx.Node, module: nn.Module, found: Operation) -> None:
    """One layer's tensors under its name. If the layer has no bias, the file's bias goes to the BatchNorm after it."""
    name, weight = str(node.target), found.tensors.get("weight")
    if isinstance(module, _BatchNorm):
        assert weight is not None
        mean, variance = found.tensors["mean"], found.tensors["variance"].astype(np.float64)
        scale = np.sqrt((variance + module.eps) / (variance + found.settings["epsilon"]))
        match.put(name, weight=weight * scale, bias=found.tensors["bias"], running_mean=mean, running_var=variance)
    elif isinstance(module, nn.PReLU):
        assert weight is not None
        match.put(name, weight=np.broadcast_to(weight, module.weight.shape))
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        assert weight is not None
        if found.inputs[0] in graph.image:
            weight = _for_our_pixels(weight, match.taken, *graph.image[found.inputs[0]])
        match.put(name, weight=weight)
        bias = found.tensors.get("bias")
        if module.bias is not None:
            match.put(name, bias=np.zeros(len(weight)) if bias is None else bias)
        elif bias is not None:
            _to_norm(match, node, torch.from_numpy(np.array(bias, dtype=np.float32)))


def _to_norm(match: _Match, node: fx.Node, bias: torch.Tensor) -> None:
    (behind,) = node.users
    norm = str(behind.target)
    if norm in match.folded:
        match.state[f"{norm}.bias"] += bias
    else:  # x + bias - mean
        match.state[f"{norm}.running_mean"] -= bias


def _fold(match: _Match, name: str, module: _BatchNorm) -> None:
    """A BatchNorm that does not change its input."""
    zeros = np.zeros(module.num_features)
    match.put(name, weight=zeros + 1, bias=zeros, running_mean=zeros, running_var=zeros + 1 - module.eps)
    match.folded.append(name)


def _for_our_pixels(weight: np.ndarray, taken: ModelInput, factor: float, summand: float) -> np.ndarray:
    """The first layer's weight [width, 3, ...] for RGB, (x - 127.5) / 127.5, where the file computes factor * z + summand on z as `taken` says.

    Raises:
        _Mismatch: a mean that is not the middle of the range: where the image is padded, no weight can stand in for it.
    """
    mean, std = np.array(taken.mean), np.array(taken.std)
    scale, shift = factor * 127.5 / std, factor * (127.5 - mean) / std + summand
    if np.abs(shift).max() > 1e-5 * max(1.0, np.abs(scale).max()):
        raise _Mismatch(
            f"normalises pixels (0 to 255) itself, with mean {(127.5 - shift * 127.5 / scale)[0]:g} and divisor {127.5 / scale[0]:g}; "
            "only a mean of 127.5 can be read"
        )
    scaled = weight * scale.astype(np.float32).reshape(1, 3, *(1,) * (weight.ndim - 2))
    return scaled[:, ::-1] if taken.colours == "bgr" else scaled


def _difference(path: Path, taken: ModelInput, architecture: Architecture, match: _Match) -> float:
    backbone = architecture.create().eval()
    fit(backbone, match.state)
    size, together = architecture.image_size, taken.batch or 1  # a file may promise any batch and hold reshapes for one
    images = torch.rand(2 * together, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ours = backbone(images)
    run = session(path, exact=True)
    theirs = torch.cat([torch.from_numpy(run(taken.given(part).numpy())) for part in images.split(together)])
    if theirs.shape != ours.shape:
        return math.inf
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1))
