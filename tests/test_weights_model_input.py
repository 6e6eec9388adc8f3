"""How other people's networks take their images: found in the file, given by the user, and the same embeddings whichever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvtrain.errors import UserError
from lvtrain.evaluation.spread import COLLAPSED, Spread
from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture
from lvtrain.weights.model_input import IMAGENET, ModelInput
from lvtrain.weights.onnx.input import faces, read_input
from lvtrain.weights.source import open_source
from tests.runs import tool
from tests.test_weights_onnx import network as settled

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIDE, WIDTH, DIM = 32, 16, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
WEIGHT = np.random.default_rng(1).normal(size=(WIDTH, 3, 3, 3)).astype(np.float32)
LAST = np.random.default_rng(2).normal(size=(WIDTH, DIM)).astype(np.float32)
HELPER = onnx.helper


def ours(pixels: np.ndarray = PIXELS) -> torch.Tensor:
    return torch.from_numpy((pixels.astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)


def constant(name: str, values: Any) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values, dtype=np.float32), name)


def graph(
    path: Path,
    before: list[Any],
    *,
    constants: list[Any] = [],  # noqa: B006
    shape: tuple[Any, ...] = ("n", 3, SIDE, SIDE),
    kind: int = 1,
    norm: tuple[np.ndarray, np.ndarray] | None = None,
    weight: np.ndarray = WEIGHT,
    metadata: dict[str, str] | None = None,
    listed: bool = False,
    pixel: bool = False,
) -> Path:
    """`data`, the nodes of `before` that end in `x`, then a convolution, maybe a BatchNorm, pooling and a linear layer.

    With `pixel` the embedding is [n, d, 1, 1].
    """
    nodes = [
        *before,
        HELPER.make_node("Conv", ["x" if before else "data", "w"], ["conv"], pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    stored = [*constants, constant("w", weight), constant("last", LAST)]
    if norm is not None:
        stored += [constant("one", np.ones(WIDTH)), constant("zero", np.zeros(WIDTH))]
        stored += [constant("mean", norm[0]), constant("variance", norm[1])]
        nodes.append(HELPER.make_node("BatchNormalization", ["conv", "one", "zero", "mean", "variance"], ["norm"]))
    nodes += [
        HELPER.make_node("Relu", ["norm" if norm is not None else "conv"], ["relu"]),
        HELPER.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        HELPER.make_node("Flatten", ["pool"], ["flat"]),
        HELPER.make_node("MatMul", ["flat", "last"], ["e"]),
    ]
    if pixel:
        stored.append(onnx.numpy_helper.from_array(np.array([0, DIM, 1, 1]), "map"))
        nodes[-1].output[0] = "row"
        nodes.append(HELPER.make_node("Reshape", ["row", "map"], ["e"]))
    inputs = [HELPER.make_tensor_value_info("data", kind, shape)]
    if listed:
        inputs += [HELPER.make_tensor_value_info(t.name, 1, list(t.dims)) for t in stored]
    last = HELPER.make_tensor_value_info("e", 1, ["n", DIM, 1, 1] if pixel else ["n", DIM])
    made = HELPER.make_graph(nodes, "g", inputs, [last], stored)
    model = HELPER.make_model(made, opset_imports=[HELPER.make_opsetid("", 13)], ir_version=8)
    HELPER.set_model_props(model, metadata or {})
    onnx.save(model, str(path))
    return path


def asked(path: Path, images: np.ndarray) -> np.ndarray:
    """Asks onnxruntime itself, image by image, or by as many as the file takes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    together = session.get_inputs()[0].shape[0]
    parts = np.split(images, len(images) // (together if isinstance(together, int) else 1))
    return np.concatenate([session.run(None, {"data": part})[0].reshape(-1, DIM) for part in parts])


def node(kind: str, *names: str, **attributes: Any) -> Any:
    return HELPER.make_node(kind, list(names[:-1]), [names[-1]], **attributes)


CHANNELS = PIXELS.transpose(0, 3, 1, 2).astype(np.float32)
IMAGENET_MEAN, IMAGENET_STD = (np.array(values).reshape(1, 3, 1, 1) for values in IMAGENET)
FOUND: dict[str, tuple[dict[str, Any], np.ndarray, str]] = {
    "mxnet, weights are inputs": (
        {
            "before": [node("Sub", "data", "m", "s"), node("Mul", "s", "f", "x")],
            "constants": [constant("m", [127.5]), constant("f", [1 / 128])],
            "listed": True,
        },
        CHANNELS,
        "0..255",
    ),
    "division alone": (
        {"before": [node("Div", "data", "m", "x")], "constants": [constant("m", 255.0)]},
        CHANNELS,
        "0..255",
    ),
    "torchvision's, by channel": (
        {
            "before": [node("Sub", "data", "m", "s"), node("Div", "s", "f", "x")],
            "constants": [constant("m", IMAGENET_MEAN / 255), constant("f", IMAGENET_STD / 255)],
        },
        CHANNELS / np.float32(255),
        "0..1",
    ),
    "bytes, channels last": (
        {
            "before": [
                node("Cast", "data", "k", to=1),
                node("Transpose", "k", "t", perm=[0, 3, 1, 2]),
                node("Add", "t", "m", "s"),
                node("Mul", "s", "f", "x"),
            ],
            "constants": [constant("m", [-127.5]), constant("f", [1 / 127.5])],
            "shape": ("n", SIDE, SIDE, 3),
            "kind": 2,
        },
        PIXELS,
        "0..255",
    ),
    "one image, channels last": (
        {"before": [node("Transpose", "data", "x", perm=[0, 3, 1, 2])], "shape": (1, SIDE, SIDE, 3)},
        ours().permute(0, 2, 3, 1).numpy(),
        "-1..1",
    ),
    "one image of BGR bytes as floats, channels last, turned by the graph": (
        {
            "before": [
                node("Transpose", "data", "t", perm=[0, 3, 1, 2]),
                node("Gather", "t", "turn", "g", axis=1),
                node("Sub", "g", "m", "s"),
                node("Mul", "s", "f", "x"),
            ],
            "constants": [
                onnx.numpy_helper.from_array(np.array([2, 1, 0]), "turn"),
                constant("m", [127.5]),
                constant("f", [1 / 127.5]),
            ],
            "shape": (1, SIDE, SIDE, 3),
        },
        PIXELS[..., ::-1].astype(np.float32),
        "0..255",
    ),
    "Caffe's means, which are in the order of BGR": (
        {
            "before": [node("Sub", "data", "m", "x")],
            "constants": [constant("m", np.array([104.0, 117, 123]).reshape(1, 3, 1, 1))],
            "shape": (1, 3, SIDE, SIDE),
        },
        CHANNELS[:, ::-1],
        "0..255",
    ),
    "turns centred pixels back": (
        {"before": [node("Add", "data", "m", "x")], "constants": [constant("m", 127.5)]},
        CHANNELS - np.float32(127.5),
        "-127.5..127.5",
    ),
    "splits, joins in reverse and clips": (
        {
            "before": [
                node("Clip", "data", "low", "high", "k"),
                HELPER.make_node("Split", ["k"], ["c0", "c1", "c2"], axis=1),
                node("Concat", "c2", "c1", "c0", "j", axis=1),
                node("Sub", "j", "m", "s"),
                node("Mul", "s", "f", "x"),
            ],
            "constants": [constant(*each) for each in (("low", 0.0), ("high", 255.0), ("m", 127.5), ("f", 1 / 127.5))],
        },
        CHANNELS[:, ::-1],
        "0..255",
    ),
    "clips to its own range, in half precision": (
        {
            "before": [
                node("Cast", "data", "k", to=1),
                node("Clip", "k", "low", "high", "c"),
                node("Div", "c", "f", "d"),
                node("Sub", "d", "m", "x"),
            ],
            "constants": [constant(*each) for each in (("low", 0.0), ("high", 1.0), ("f", 0.5), ("m", 1.0))],
            "kind": 10,
        },
        (CHANNELS / np.float32(255)).astype(np.float16),
        "0..1",
    ),
    "constants and shapes that the graph computes": (
        {
            "before": [
                HELPER.make_node("Constant", [], ["a"], value_float=255.0),
                HELPER.make_node("Constant", [], ["b"], value_float=2.0),
                node("Div", "a", "b", "m"),
                node("Shape", "data", "sh"),
                node("Reshape", "data", "rows", "r"),
                node("Sub", "m", "r", "s"),
                node("Neg", "s", "n"),
                node("Div", "n", "m", "d"),
                node("Reshape", "d", "sh", "x"),
            ],
            "constants": [onnx.numpy_helper.from_array(np.array([0, 3, -1]), "rows")],
        },
        CHANNELS,
        "0..255",
    ),
    "fixed batch, an embedding of one pixel": (
        {
            "before": [node("Div", "data", "m", "x")],
            "constants": [constant("m", 255.0)],
            "shape": (3, 3, SIDE, SIDE),
            "pixel": True,
        },
        CHANNELS,
        "0..255",
    ),
    "metadata": ({"before": [], "metadata": {"lvtrain.input": "bgr 0..1"}}, CHANNELS[:, ::-1] / np.float32(255), "0..1"),
    "nothing says it": ({"before": []}, ours().numpy(), "-1..1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_file_is_fed_as_it_says(name: str, tmp_path: Path) -> None:
    options, images, range_ = FOUND[name]
    path = graph(tmp_path / "model.onnx", **options)
    model = load_model(path)
    assert model.takes.range == range_ and model.takes.assumed == (range_ == "-1..1")
    expected = asked(path, np.ascontiguousarray(images))
    np.testing.assert_allclose(model(ours()).numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(
        model.embed(PIXELS, batch=4), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4
    )


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ("bgr 0..255", CHANNELS[:, ::-1]),
        ("0..1", CHANNELS / np.float32(255)),
        ("mean=127.5 std=128", (CHANNELS - 127.5) / np.float32(128)),
        ("imagenet", (CHANNELS - IMAGENET_MEAN) / IMAGENET_STD),
        ("mean=1,2,3 std=4,5,6 bgr", (CHANNELS[:, ::-1] - [[[1]], [[2]], [[3]]]) / [[[4]], [[5]], [[6]]]),
    ],
)
def test_the_user_may_say_it(words: str, images: np.ndarray, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", [])
    model = load_model(path, takes=words)
    expected = asked(path, np.ascontiguousarray(images, dtype=np.float32))
    np.testing.assert_allclose(model(ours()).numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert ModelInput(size=SIDE).changed(model.takes.words) == model.takes  # what is printed can be given


def test_size_layout_and_batch_may_be_said_where_the_shape_does_not(tmp_path: Path) -> None:
    sides = ("n", "c", "h", "w")
    path = graph(tmp_path / "model.onnx", [node("Transpose", "data", "x", perm=[0, 3, 1, 2])], shape=sides)
    assert {"assumed"} == {read_input(path).sources[name] for name in ("layout", "size")}
    model = load_model(path, takes=f"nhwc {SIDE} batch=3")
    assert (model.takes.layout, model.takes.size, model.takes.batch) == ("nhwc", SIDE, 3)
    expected = asked(path, ours().permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(model(ours()).numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    fixed = graph(tmp_path / "fixed.onnx", [], shape=(1, 3, SIDE, SIDE))
    for words in ("batch=2", "nhwc", "64"):
        with pytest.raises(UserError, match="input"):
            read_input(fixed, words)


@pytest.mark.parametrize("words", ["0..1", "0..255", "-127.5..127.5", "-1..1"])
def test_a_batch_norm_shows_the_range_it_was_trained_in(words: str, tmp_path: Path, tiny_faces: Path) -> None:
    """Its statistics are of generated faces, which the reader has not seen."""
    from lvtrain.data import ShardDataset
    from lvtrain.weights.extract import decode

    dataset = ShardDataset(tiny_faces / "train")
    pixels = np.stack([decode(dataset.read(i)[0], 112) for i in range(0, 48)])
    # smoothing, edges, colour differences: like a trained first layer, and unlike noise
    taken = ModelInput().changed(words).given(ours(pixels))
    seen = torch.nn.functional.conv2d(taken, torch.from_numpy(WEIGHT), stride=2, padding=1)
    norm = (seen.mean((0, 2, 3)).numpy(), seen.var((0, 2, 3)).numpy())
    path = graph(tmp_path / "model.onnx", [], norm=norm, shape=("n", 3, 112, 112))
    found = read_input(path)
    assert found.range == words and not found.assumed


def test_statistics_that_fit_nothing_decide_nothing(tmp_path: Path) -> None:
    norm = (np.full(WIDTH, 5.0), np.full(WIDTH, 1e-3))
    found = read_input(graph(tmp_path / "model.onnx", [], norm=norm))
    assert found.range == "-1..1" and found.assumed


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(("n", 1, SIDE, SIDE), 1), (("n", 3, SIDE, 2 * SIDE), 1), (("n", 3), 1), (("n", 3, SIDE, SIDE), 7)],
    ids=["grey", "not square", "no image", "int64"],
)
def test_what_takes_no_faces_is_refused(shape: tuple[Any, ...], kind: int, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_input(graph(tmp_path / "model.onnx", [], shape=shape, kind=kind))


@pytest.mark.parametrize(
    "words",
    [
        "yuv",
        "255..0",
        "mean=127.5",
        "mean=1,2 std=1,2",
        "mean=0.485 std=0.229",
        "std=0 mean=1",
        "nhwc",
        "64",
        "batch=0",
    ],
)
def test_words_that_cannot_be_meant_are_refused(words: str, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", [])
    with pytest.raises(UserError, match="input"):
        read_input(path, words)


def test_torch_weights_take_what_is_given(tmp_path: Path) -> None:
    import lvtrain

    shape: dict[str, Any] = {"blocks": (1, 1, 1, 1), "scale": 1}
    network = settled(Architecture("mobilefacenet", DIM, 112, shape))
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()

    def close(words: str, images: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> None:
        with torch.no_grad():
            expected = network(images)
        got = load_model(path, takes=words)(ours(pixels))
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        if state is not None:
            own = lvtrain.create_backbone("mobilefacenet", embedding_dim=DIM, **shape).eval()
            own.load_state_dict(state)
            with torch.no_grad():
                assert float((own(ours(pixels)) - expected).abs().max()) < 1e-4 * float(expected.abs().max())

    close("0..255", raw)
    close("bgr 0..1", raw.flip(1) / 255)
    words = "bgr mean=127.5 std=1,2,3"
    close(
        words,
        (raw.flip(1) - 127.5) / torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1),
        open_source(path, takes=words).state(),
    )
    with pytest.raises(UserError, match=r"127\.5"):
        open_source(path, takes="0..255")


def _spread(forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, batch: int) -> Spread:
    spread = Spread(forward)
    for part in images.split(batch):
        spread(torch.cat([part, part[-1:].expand(batch - len(part), -1, -1, -1)]))  # filled up, as evaluation does
    return spread


def test_the_spread_is_the_mean_cosine_of_all_pairs() -> None:
    images = faces(21, 16)
    unit = torch.nn.functional.normalize(images.flatten(1).double(), dim=1)
    cosines = (unit @ unit.T)[~torch.eye(21, dtype=torch.bool)]
    spread = _spread(lambda x: x.flatten(1), images, 8)
    assert spread.images == 21 and spread.mean_cosine == pytest.approx(float(cosines.mean()), abs=1e-9)
    assert (spread.warning() != "") == (float(cosines.mean()) > COLLAPSED)
    assert "21 of 21" in _spread(lambda x: 0 * x.flatten(1), images, 8).warning()


def test_a_model_that_is_fed_wrongly_is_named(tiny_faces: Path, tmp_path: Path) -> None:
    """It needs -127.5..127.5 and is fed -1..1: the bias of its first layer is then all that counts."""
    bias = [constant("bias", np.random.default_rng(3).normal(size=(1, WIDTH, 1, 1)) * 90)]
    first = [node("Conv", "data", "w", "y", pads=[1, 1, 1, 1]), node("Add", "y", "bias", "z")]
    path = graph(
        tmp_path / "model.onnx",
        [*first, node("Conv", "z", "mix", "x")],
        constants=[*bias, constant("mix", np.random.default_rng(4).normal(size=(3, WIDTH, 1, 1)))],
        shape=("n", 3, 112, 112),
    )
    found = {}
    for words in ("", "-127.5..127.5"):
        out = tmp_path / f"out{len(found)}"
        options = ["--input", words] if words else []
        options += ["--cpu", "--benchmark", f"faces:{tiny_faces / 'train'}", "-o", out]
        done = tool("evaluate", path, *options)
        assert done.exit_code == 0, done.output
        found[words] = json.loads((out / "evaluation.json").read_text())
    assert found[""]["mean_cosine"] > 0.9 and "-127.5..127.5" in found[""]["warning"]
    assert found["-127.5..127.5"]["mean_cosine"] < found[""]["mean_cosine"]
    assert "-127.5..127.5 (given)" in found["-127.5..127.5"]["input"]
