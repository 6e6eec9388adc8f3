"""ONNX files: equal to torch, taken by the real clients, refused where their rules say so, in every precision and opset we offer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvtrain.backbones import create_backbone
from lvtrain.errors import UserError
from lvtrain.evaluation.bins import read_bin, write_bin
from lvtrain.export.clients import check
from lvtrain.export.convert import export
from lvtrain.export.model_card import Card
from lvtrain.export.onnx_export import compare, export_onnx, to_float16, to_int8
from lvtrain.export.packages import write_folder, write_insightface
from lvtrain.export.quantise import calibration_images
from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture
from tests.test_weights_convert import embed, small_vit


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("package")
    backbone = small_vit()
    parity = export_onnx(backbone, folder / "recognition.onnx")
    assert parity.largest_difference < 1e-4 and parity.smallest_cosine > 0.99999
    architecture = Architecture("vit_nano", 512)
    write_insightface(folder, folder / "recognition.onnx", architecture, model_id="test", licence="for tests")
    return backbone, folder


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)


def ours(backbone: torch.nn.Module, rgb: np.ndarray) -> np.ndarray:
    return embed(backbone, (torch.from_numpy(rgb).permute(0, 3, 1, 2).float() - 127.5) / 127.5).numpy()


@pytest.mark.parametrize(("name", "opset"), [("vit_nano", 14), ("vit_nano", 20)])
def test_opsets(name: str, opset: int, tmp_path: Path) -> None:
    backbone = small_vit()
    assert export_onnx(backbone, tmp_path / "m.onnx", opset=opset).largest_difference < 1e-5
    verdicts = {verdict.client: verdict.accepted for verdict in check(tmp_path / "m.onnx")}
    assert verdicts == {"insightface": True, "lvface": True, "uniface": True, "MFR-Ongoing": opset == 14}
    with pytest.raises(UserError, match=r"opset 13.* 14 to 20"):
        export_onnx(backbone, tmp_path / "m.onnx", opset=13)


@pytest.mark.parametrize("opset", [14, 17])  # 14 has no grid_sample, and what is traced at 17 fixes the batch
def test_part_fvit_needs_the_present_exporter(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"opset {opset} .* 18"):
        export_onnx(create_backbone("part_fvit_tiny", depth=1), tmp_path / "m.onnx", opset=opset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("iresnet18", {}),
        ("iresnet18", {"first_shortcut": "subsample"}),
        ("fvit_tiny", {}),
        ("part_fvit_tiny", {}),
        ("part_fvit_tiny", {"released": True}),
        ("dino_vit_tiny", {}),
    ],
)
def test_every_family_is_torch_in_onnxruntime(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = create_backbone(name, **overrides)
    parity = export_onnx(backbone, tmp_path / "m.onnx")
    assert parity.largest_difference < 1e-4 and parity.smallest_cosine > 0.99999
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    expected = embed(backbone.eval(), images)
    scale = max(1.0, float(expected.abs().max()))  # a fresh IResNet's values are large
    assert (load_model(tmp_path / "m.onnx").forward(images) - expected).abs().max() < 1e-4 * scale


def test_narrow_precisions(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    backbone, folder = exported
    plain = folder / "recognition.onnx"
    for narrow, share, least in ((to_float16, 0.55, 0.9999), (to_int8, 0.4, 0.97)):
        narrow(plain, tmp_path / "narrow.onnx")
        assert (tmp_path / "narrow.onnx").stat().st_size < share * plain.stat().st_size
        parity = compare(backbone, tmp_path / "narrow.onnx")
        assert least < parity.smallest_cosine < 1, narrow.__name__
        assert (
            "under 4 bytes" in {v.client: " ".join(v.reasons) for v in check(tmp_path / "narrow.onnx")}["MFR-Ongoing"]
        )


def test_a_file_that_does_not_agree_takes_nobodys_place(tmp_path: Path) -> None:
    """Values beyond float16's range: the export is refused, and what an earlier one wrote stays."""
    state = small_vit().state_dict()
    state["feature.0.weight"] *= 1e9
    source = tmp_path / "folder"
    write_folder(source, Architecture("vit_nano", 512), state, card=Card("test", "vit_nano", 512, 1))
    out = tmp_path / "m.onnx"
    out.write_bytes(b"earlier")
    with pytest.raises(UserError, match="float16"):
        export(source, out, precision="float16")
    assert out.read_bytes() == b"earlier" and sorted(tmp_path.iterdir()) == [source, out]


def test_every_client_accepts_but_the_old_server(exported: tuple[torch.nn.Module, Path]) -> None:
    verdicts = {verdict.client: verdict for verdict in check(exported[1] / "recognition.onnx")}
    for client in ("insightface", "lvface", "uniface"):
        assert verdicts[client].accepted, verdicts[client]
    # the server's runtime is from 2021; nothing but the opset stands against the file
    assert all("opset" in reason for reason in verdicts["MFR-Ongoing"].reasons)


def test_insightface_gives_our_embeddings(exported: tuple[torch.nn.Module, Path]) -> None:
    insightface = pytest.importorskip("insightface")
    backbone, folder = exported
    rgb = pictures(3)
    expected = ours(backbone, rgb)
    by_file = insightface.model_zoo.get_model(str(folder / "recognition.onnx"), providers=["CPUExecutionProvider"])
    by_package = insightface.model_zoo.get_model(
        str(folder), model_task="recognition", providers=["CPUExecutionProvider"]
    )
    for model in (by_file, by_package):
        got = model.get_feat([image[:, :, ::-1] for image in rgb])
        assert np.abs(got - expected).max() < 1e-4


def test_lvface_gives_our_embeddings(exported: tuple[torch.nn.Module, Path]) -> None:
    lvface = pytest.importorskip("lvface")
    backbone, folder = exported
    rgb = pictures(3)
    expected = ours(backbone, rgb)
    embedder = lvface.LVFaceOnnxEmbedder(str(folder / "recognition.onnx"))
    method = next(
        getattr(embedder, name)
        for name in ("embed", "embed_batch", "__call__", "get_embeddings")
        if hasattr(embedder, name)
    )
    got = np.stack([np.asarray(method(image)).reshape(-1) for image in rgb])
    scale = np.linalg.norm(expected, axis=1) / np.linalg.norm(got, axis=1)  # lvface may hand out unit vectors
    assert np.abs(got * scale[:, None] - expected).max() < 1e-4


def test_files_clients_would_refuse_are_refused(tmp_path: Path, exported: tuple[torch.nn.Module, Path]) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(exported[1] / "recognition.onnx"))
    for dim in (model.graph.input[0].type.tensor_type.shape.dim[0],):
        dim.Clear()
        dim.dim_value = 2
    narrow = numpy_helper.from_array(np.ones(3, dtype=np.float16), "narrow")
    model.graph.initializer.append(narrow)
    onnx.save(model, str(tmp_path / "static.onnx"))
    verdicts = {verdict.client: " ".join(verdict.reasons) for verdict in check(tmp_path / "static.onnx")}
    assert "fixed at 2" in verdicts["insightface"] and "fixed at 2" in verdicts["uniface"]
    assert "under 4 bytes" in verdicts["MFR-Ongoing"] and "not dynamic" in verdicts["MFR-Ongoing"]
    (tmp_path / "no.onnx").write_bytes(b"not onnx at all")
    with pytest.raises(UserError, match=r"no\.onnx"):
        check(tmp_path / "no.onnx")
    vector = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [vector], [vector])
    graph.output[0].name = "y"
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(tmp_path / "vector.onnx"))
    for opener in (check, load_model):
        with pytest.raises(UserError, match="not a face recogniser"):
            opener(tmp_path / "vector.onnx")


def onnxruntimes_own(source: Path, target: Path, images: np.ndarray) -> Path:
    """Static int8 as onnxruntime's guide makes it."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            self.parts = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.parts, None)
            return None if image is None else {"data": image[None]}

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    operations = {"op_types_to_quantize": ["Conv", "Gemm", "MatMul"]}
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(target), str(target), Reader(), per_channel=True, **operations, **types)
    return target


def first_convolution_in_int8(weight: np.ndarray, images: np.ndarray, calibration: np.ndarray, **conv: Any) -> float:
    """Cosine to float32, by numpy: the input in 256 steps over the calibration's range, a scale for each filter."""
    low, high = min(float(calibration.min()), 0.0), max(float(calibration.max()), 0.0)
    step = (high - low) / 255
    zero = np.rint(-128 - low / step)
    inputs = (np.clip(np.rint(images / step) + zero, -128, 127) - zero) * step
    scales = np.abs(weight).reshape(len(weight), -1).max(axis=1).reshape(-1, 1, 1, 1) / 127
    rounded = np.clip(np.rint(weight / scales), -127, 127) * scales
    wide, narrow = (
        torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(w.astype(np.float32)), **conv).numpy().ravel()
        for x, w in ((images, weight), (inputs.astype(np.float32), rounded))
    )
    return float(wide @ narrow / np.linalg.norm(wide) / np.linalg.norm(narrow))


def test_static_int8_for_one_image_at_a_time(tiny_faces: Path, tmp_path: Path) -> None:
    """A MobileFaceNet as a small device takes it.

    The file gives what onnxruntime's quantisation gives. The cosine of a layer is what numpy computes from its weights.
    """
    overrides = {"blocks": (1, 1, 1, 1), "scale": 1}
    torch.manual_seed(0)
    backbone = create_backbone("mobilefacenet", embedding_dim=64, **overrides).eval()
    architecture = Architecture("mobilefacenet", 64, 112, overrides)
    source, out, wide = (tmp_path / name for name in ("folder", "m.onnx", "wide.onnx"))
    write_folder(source, architecture, backbone.state_dict(), card=Card("test", "mobilefacenet", 64, 1))
    encoded, same = read_bin(tiny_faces / "heldout.bin")
    write_bin(faces := tmp_path / "faces.bin", encoded[:64], same[:32])
    export(source, out, precision="int8", batch=1, calibration=faces)
    export(source, wide, batch=1)

    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(out)).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert out.stat().st_size < 0.45 * wide.stat().st_size
    integers = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    layers = {layer["layer"]: layer["cosine"] for layer in json.loads((tmp_path / "m.layers.json").read_text())}
    assert len(layers) == len(integers) == 23 and {"layers.0.layers.0", "conv_sep.layers.0"} <= layers.keys()
    assert list(layers.values()) == sorted(layers.values()) and 0.9 < min(layers.values()) < max(layers.values()) < 1

    images = calibration_images(faces, 112)
    calibration = images[len(images) // 8 :]
    theirs = onnxruntimes_own(wide, tmp_path / "theirs.onnx", calibration)
    few = torch.from_numpy(images[:8])
    got, same, expected = (load_model(path).forward(few) for path in (out, theirs, wide))
    cosine = torch.nn.functional.cosine_similarity
    assert torch.equal(got, same)
    assert 0.95 < float(cosine(got, expected).min()) < 1
    initial = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(wide)).graph.initializer}
    (node,) = (node for node in onnx.load(str(wide)).graph.node if node.input[0] == "data")
    numpys = first_convolution_in_int8(
        initial[node.input[1]], images[len(images) // 8 :][:16], calibration, stride=2, padding=1
    )
    assert layers["layers.0.layers.0"] == pytest.approx(numpys, abs=2e-5)


def test_int8_that_cannot_be_judged_is_refused(tiny_faces: Path, tmp_path: Path) -> None:
    source, faces = tmp_path / "folder", tiny_faces / "heldout.bin"
    state = small_vit().state_dict()
    write_folder(source, Architecture("vit_nano", 512), state, card=Card("test", "vit_nano", 512, 1))
    for reason, options in (
        ("calibration images are for int8", {"calibration": faces}),
        ("300 are needed", {"calibration": faces, "precision": "int8", "batch": 150}),
        ("are for ONNX files", {"to": "folder", "precision": "int8"}),
    ):
        with pytest.raises(UserError, match=reason):
            export(source, tmp_path / "m.onnx", **options)
    assert not (tmp_path / "m.onnx").exists()


def test_a_file_that_gives_zeros_has_no_cosine(tmp_path: Path) -> None:
    import onnx

    backbone = small_vit()
    export_onnx(backbone, tmp_path / "m.onnx", batch=2)
    model = onnx.load(str(tmp_path / "m.onnx"))
    last = next(node for node in model.graph.node if node.output[0] == "embedding")
    zeros = onnx.helper.make_tensor("zeros", onnx.TensorProto.FLOAT, [1], [0.0])
    model.graph.initializer.append(zeros)
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "zeros"], ["embedding"]))
    onnx.save(model, str(tmp_path / "zeros.onnx"))
    assert compare(backbone, tmp_path / "m.onnx", batches=(2,)).smallest_cosine > 0.9999
    assert compare(backbone, tmp_path / "zeros.onnx", batches=(2,)).smallest_cosine == 0
