"""tools/embed.py: a folder or a dataset as a .npy and a .csv of its rows; nothing is dropped, nothing is replaced unasked."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lvtrain
from lvtrain.data import ShardDataset
from lvtrain.datasets.subset import write_subset
from lvtrain.evaluation.embeddings import read_embeddings
from lvtrain.export.model_card import Card
from lvtrain.export.packages import write_folder
from lvtrain.weights.architecture import Architecture
from lvtrain.weights.space import space_of
from tests.runs import tool
from tests.shard_data import jpeg, make_dataset

SHAPE: dict[str, Any] = {"blocks": (1, 1, 1, 1), "scale": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    architecture = Architecture("mobilefacenet", 16, 112, SHAPE)
    folder = tmp_path_factory.mktemp("model") / "folder"
    return write_folder(
        folder, architecture, architecture.create().state_dict(), card=Card("t", "mobilefacenet", 16, 1)
    )


def test_the_input_can_be_given_and_a_constant_model_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, rows = onnx.helper, np.array([[1.0, 2, 3, 4]], dtype=np.float32)
    stored = [onnx.numpy_helper.from_array(np.zeros((3, 4), np.float32), "w"), onnx.numpy_helper.from_array(rows, "b")]
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["e"]),
    ]
    values = [
        helper.make_tensor_value_info("data", 1, ["n", 3, 112, 112]),
        helper.make_tensor_value_info("e", 1, ["n", 4]),
    ]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(tmp_path / "m.onnx")
    )
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    done = tool("embed", folder, tmp_path / "out.npy", "--model", tmp_path / "m.onnx", "--input", "bgr 0..1")
    assert done.exit_code == 0, done.output
    assert "BGR (given)" in done.stdout and "0..1 (given)" in done.stdout
    assert "mean cosine is 1.00" in done.stderr


def test_all_files_of_a_folder_have_one_mode(model: Path) -> None:
    assert len({path.stat().st_mode for path in model.iterdir()}) == 1


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_with_all_that_lies_in_folders(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "faces"
    names = ["id2/a.jpg", "id10/b, c.jpg", "id10/deep/d.png", "loose.jpg"]
    for number, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(Image.open(_file(number, tmp_path))))
        image.save(source / name, quality=95)
    (source / "id2" / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (112, 90)).save(source / "id2" / "wide.png")
    (source / "id2" / "notes.txt").write_text("not an image")
    (source / "@eaDir").mkdir()
    (source / "@eaDir" / "thumbnail.jpg").write_bytes(b"")
    done = tool("embed", source, tmp_path / "out.npy", "--model", model, "--batch", "2")
    assert done.exit_code == 0, done.output
    assert "found 6 = embedded 4 + unreadable 2; left out 2" in done.output
    found, table = np.load(tmp_path / "out.npy"), rows_of(tmp_path / "out.csv")
    expected = ["loose.jpg", "id2/a.jpg", "id2/broken.jpg", "id2/wide.png", "id10/b, c.jpg", "id10/deep/d.png"]
    assert [row["name"] for row in table] == expected and [row["row"] for row in table] == list("012345")
    assert [row["identity"] for row in table] == ["", "id2", "id2", "id2", "id10", "id10"]
    bad = [bool(row["error"]) for row in table]
    assert bad == [False, False, True, True, False, False] and "112x90" in table[3]["error"]
    assert found.dtype == np.float32 and found.shape == (6, 16) and not found[bad].any()
    sound = [source / row["name"] for row in table if not row["error"]]
    alone = lvtrain.load_model(model).embed(sound)
    np.testing.assert_allclose(found[~np.array(bad)], alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.csv", "out.json", "out.npy"]
    assert read_embeddings(tmp_path / "out.npy").space == space_of(model)


def _file(number: int, folder: Path) -> Path:
    path = folder / f"{number}.jpg"
    path.write_bytes(jpeg(number))
    return path


def test_a_dataset_and_a_subset_by_sample_id(model: Path, tmp_path: Path) -> None:
    dataset = ShardDataset(make_dataset(tmp_path / "data", samples=41, replaced={7: b"no image"}))
    assert tool("embed", tmp_path / "data", tmp_path / "out.npy", "-m", model, "--mirror").exit_code == 0
    found, table = np.load(tmp_path / "out.npy"), rows_of(tmp_path / "out.csv")
    assert len(found) == len(table) == 41 and [row for row in range(41) if table[row]["error"]] == [7]
    for sample in (0, 3, 40):
        data, label = dataset.read(sample)
        assert table[sample]["name"] == dataset.describe(sample)[1]
        assert table[sample]["identity"] == dataset.label_names()[label]
        np.testing.assert_allclose(found[sample], lvtrain.load_model(model).embed(data, mirror=True)[0], atol=1e-6)
    ids = np.arange(3, 41, 2)
    write_subset(tmp_path / "part.json", dataset, ids, criteria={})
    assert tool("embed", tmp_path / "part.json", tmp_path / "some.npy", "-m", model, "--mirror").exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "some.npy"), found[ids], atol=1e-6)
    before = (tmp_path / "part.json").read_bytes()  # part.npy would have its facts in part.json
    assert tool("embed", tmp_path / "part.json", tmp_path / "part.npy", "-m", model, "--overwrite").exit_code == 2
    assert (tmp_path / "part.json").read_bytes() == before


def test_refusals_leave_what_is_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out.npy"

    def refused(source: Path, to: Path) -> str:
        done = tool("embed", source, to, "-m", model)
        assert done.exit_code == 2 and done.output.strip().splitlines()[-1].startswith("embed: error:"), done.output
        return str(done.output)

    assert "broken.jpg" in refused(tmp_path / "faces", out)
    assert list(tmp_path.glob("*out*")) == []  # neither file, nor one that was begun
    refused(tmp_path / "missing", out)
    refused(model, out)  # a folder without an image
    refused(tmp_path / "faces", tmp_path / "out.bin")
    (tmp_path / "faces" / "good.jpg").write_bytes(jpeg(1))
    files = [out, tmp_path / "out.csv", tmp_path / "out.json"]
    for there in files:
        there.write_bytes(b"precious")
        refused(tmp_path / "faces", out)
        assert there.read_bytes() == b"precious"
        done = tool("embed", tmp_path / "faces", out, "-m", model, "--overwrite")
        assert done.exit_code == 0 and np.load(out).shape == (2, 16)
        for path in files:
            path.unlink()
