"""ONNX files of insightface's networks as trainable networks: every export style, folded BatchNorms, refusals.

onnxruntime says what a file computes, torch what a network computes.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx import TrainingMode

from lvtrain.backbones import create_backbone
from lvtrain.errors import UserError
from lvtrain.weights.architecture import Architecture, fit
from lvtrain.weights.onnx.file import session
from lvtrain.weights.onnx.match import OnnxWeights, read_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIDE = 32
IMAGES = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
NETWORKS = {
    "iresnet18": Architecture("iresnet18", 24, SIDE),
    "adaface18": Architecture("iresnet18", 24, SIDE, {"first_shortcut": "subsample"}),
    "mobilefacenet": Architecture("mobilefacenet", 24, SIDE),
    "mobilefacenet of other sizes": Architecture("mobilefacenet", 24, SIDE, {"blocks": (2, 1, 3, 1), "scale": 1}),
    "mobilenet": Architecture("mobilenet", 24, SIDE, {"scale": 8}),
}
OLD = {"dynamo": False, "opset_version": 11}
STYLES: dict[str, dict[str, Any]] = {
    "old": OLD,
    "old, batch of 2": OLD | {"batch": 2},
    "old, constants not folded": OLD | {"do_constant_folding": False},
    "old, nothing fused": OLD | {"opset_version": 13, "training": TrainingMode.PRESERVE},
    "old, weights are inputs": OLD | {"keep_initializers_as_inputs": True, "dynamic_axes": {"data": {0: "batch"}}},
    "dynamo": {"dynamo": True, "opset_version": 18},
    "dynamo, dynamic batch": {"dynamo": True, "opset_version": 20, "dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},), "batch": 2},
    "dynamo, not optimised": {"dynamo": True, "opset_version": 20, "optimize": False},
}  # fmt: skip
UNFUSED = {"old, constants not folded", "old, nothing fused", "dynamo, not optimised"}
CONVOLUTIONS = {
    "iresnet18": 21,
    "adaface18": 20,
    "mobilefacenet": 49,
    "mobilefacenet of other sizes": 33,
    "mobilenet": 27,
}
PAIRS = [(name, style) for name in ("iresnet18", "mobilefacenet of other sizes") for style in STYLES]
PAIRS += [
    (name, style) for name in ("adaface18", "mobilefacenet", "mobilenet") for style in ("old", "dynamo, dynamic batch")
]


def network(architecture: Architecture) -> nn.Module:
    """Random weights with statistics that go with them; no tensor is a constant that an exporter could share or drop."""
    torch.manual_seed(0)
    backbone = architecture.create().train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    with torch.no_grad():
        backbone(torch.randn(16, 3, architecture.image_size, architecture.image_size))
    return backbone.eval()


def export(backbone: nn.Module, path: Path, *, batch: int = 1, images: torch.Tensor = IMAGES, **options: Any) -> Path:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(backbone, (images[:batch],), str(path), input_names=["data"], **options)
    return path


def embeddings(weights: OnnxWeights, images: torch.Tensor = IMAGES) -> torch.Tensor:
    backbone = weights.architecture.create().eval()
    fit(backbone, weights.state)
    with torch.inference_mode():
        return backbone(images)


def assert_close(got: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert (expected - expected[:1]).abs().max() > 0.1, "the images must tell"
    assert float((got - expected).abs().max()) <= share * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iresnet18 with every BatchNorm in place."""
    return export(
        network(NETWORKS["iresnet18"]), tmp_path_factory.mktemp("plain") / "plain.onnx", **STYLES["old, nothing fused"]
    )


@pytest.mark.parametrize(("name", "style"), PAIRS)
def test_every_style_gives_the_networks_embeddings(name: str, style: str, tmp_path: Path) -> None:
    backbone = network(NETWORKS[name])
    weights = read_onnx(export(backbone, tmp_path / "model.onnx", **STYLES[style]))
    assert weights.architecture == NETWORKS[name]
    assert_close(embeddings(weights), backbone(IMAGES).detach())
    if style in UNFUSED:
        assert weights.folded == []
        trained = {name: value for name, value in backbone.state_dict().items() if "num_batches" not in name}
        assert weights.state.keys() == trained.keys()
        assert all(torch.equal(weights.state[name], value) for name, value in trained.items())
    else:
        assert len(weights.folded) >= CONVOLUTIONS[name]


def test_a_folded_norm_changes_nothing_but_adds_the_layers_bias(tmp_path: Path) -> None:
    weights = read_onnx(export(network(NETWORKS["iresnet18"]), tmp_path / "model.onnx", **OLD))
    assert {"bn1", "layer1.0.bn2", "layer1.0.bn3", "layer1.0.downsample.1"} <= set(weights.folded)
    assert not {"layer1.0.bn1", "bn2", "features"} & set(weights.folded)
    norm = nn.BatchNorm2d(64).eval()
    fit(norm, {name.removeprefix("bn1."): value for name, value in weights.state.items() if name.startswith("bn1.")})
    x = torch.randn(2, 64, 3, 3)
    bias = weights.state["bn1.bias"]
    assert bias.abs().min() > 0
    assert torch.allclose(norm(x), x + bias.view(1, -1, 1, 1), atol=1e-6)


def test_a_file_that_onnxruntime_rewrote(plain: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "rewritten.onnx")
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    weights = read_onnx(tmp_path / "rewritten.onnx")
    assert len(weights.folded) >= 20
    assert_close(embeddings(weights), network(NETWORKS["iresnet18"])(IMAGES).detach())


def edited(source: Path, out: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(str(source))
    change(model.graph)
    onnx.save(model, str(out))
    return out


def normalising(mean: float, divisor: float, epsilon: float | None = 2e-5) -> Callable[[Any], None]:
    """Pixels of 0 to 255 are taken, as MXNet's exports do, with its epsilon."""

    def change(graph: Any) -> None:
        first = next(node for node in graph.node if node.op_type == "Conv")
        first.input[0] = "normalised"
        for name, value in (("mean", mean), ("factor", 1 / divisor)):
            graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [value]))
        graph.node.insert(0, onnx.helper.make_node("Mul", ["centred", "factor"], ["normalised"]))
        graph.node.insert(0, onnx.helper.make_node("Sub", ["data", "mean"], ["centred"]))
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon" and epsilon is not None:
                    attribute.f = epsilon

    return change


@pytest.mark.parametrize("divisor", [127.5, 128.0])
def test_normalisation_inside_the_file_and_another_epsilon(plain: Path, divisor: float, tmp_path: Path) -> None:
    path = edited(plain, tmp_path / "mxnet.onnx", normalising(127.5, divisor))
    run = session(path)
    expected = torch.cat([torch.from_numpy(run(((image + 1) * 127.5)[None].numpy())) for image in IMAGES])
    assert_close(embeddings(read_onnx(path)), expected)


def leaky(graph: Any) -> None:
    node = [node for node in graph.node if node.op_type == "PRelu"][4]
    node.op_type = "LeakyRelu"
    del node.input[1]


def sums(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type == "Add"]


def without_branch(graph: Any) -> None:
    """A residual sum that takes its block's input twice."""
    sums(graph)[1].input[0] = sums(graph)[1].input[1]


def another_shortcut(graph: Any) -> None:
    """A residual sum that takes the shortcut of the block before: the same shape, another network."""
    sums(graph)[1].input[1] = sums(graph)[0].input[1]


def two_outputs(graph: Any) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info(graph.node[0].output[0], onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (normalising(128.0, 128.0), "mean 128 and divisor 128"),
        (leaky, r"LeakyRelu .*layer2\.1\.prelu"),
        (without_branch, r"layers of \(1, 2"),
        (another_shortcut, r"layer1\.0\.bn3 .*layer1\.0\.downsample\.1"),
        (two_outputs, "1 inputs and 2 outputs"),
    ],
)
def test_a_graph_that_only_looks_alike_is_refused(
    plain: Path, change: Callable[[Any], None], found: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=found) as refusal:
        read_onnx(edited(plain, tmp_path / "other.onnx", change))
    assert "\n" not in str(refusal.value)


def test_other_networks_and_damaged_files_are_refused(plain: Path, tmp_path: Path) -> None:
    vit = export(create_backbone("vit_nano", depth=1, image_size=SIDE).eval(), tmp_path / "vit.onnx", dynamo=True)
    with pytest.raises(UserError, match="6 linear, 4 Transpose"):
        read_onnx(vit)
    plainer = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.PReLU(64), nn.Flatten(), nn.Linear(64 * 16 * 16, 8)).eval()
    with pytest.raises(UserError, match="3x3 to 64 channels, stride 2"):
        read_onnx(export(plainer, tmp_path / "plainer.onnx", **OLD))
    (tmp_path / "cut.onnx").write_bytes(plain.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.onnx"):
        read_onnx(tmp_path / "cut.onnx")


def test_what_differs_numerically_is_refused(plain: Path, tmp_path: Path) -> None:
    """The same layers in the same order, but a flattening that mixes up positions and channels."""

    def transposed(graph: Any) -> None:
        node = next(node for node in graph.node if node.op_type == "Flatten")
        graph.node.insert(
            list(graph.node).index(node),
            onnx.helper.make_node("Cast", [node.input[0]], ["rounded"], to=onnx.TensorProto.INT32),
        )
        graph.node.insert(
            list(graph.node).index(node),
            onnx.helper.make_node("Cast", ["rounded"], ["again"], to=onnx.TensorProto.FLOAT),
        )
        node.input[0] = "again"

    with pytest.raises(UserError, match="embeddings differ"):
        read_onnx(edited(plain, tmp_path / "mixed.onnx", transposed))
