"""TinyFace from its published layout (MATLAB's lists written by scipy), against a plain sort of every probe's row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import suite
from lvtrain.evaluation.sets import tinyface
from lvtrain.weights import extract

ALONE = World(0, 1, 0, torch.device("cpu"))


def make_tinyface(folder: Path, identities: int = 20, distractors: int = 60) -> Path:
    """Identities with one to three gallery images and one or two probes each; small images of several sizes."""
    generator = np.random.default_rng(0)
    place = folder / "Testing_Set"
    faces = generator.integers(0, 256, (identities, 5, 5, 3))
    lists: dict[str, list[tuple[str, int]]] = {"gallery": [], "probe": []}

    def save(path: Path, face: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = np.clip(face + generator.normal(0, 60, face.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).resize((int(generator.integers(14, 30)), 20)).save(path)

    for identity, face in enumerate(faces):
        for kind, sub, most in (("gallery", "Gallery_Match", 4), ("probe", "Probe", 3)):
            for number in range(int(generator.integers(1, most))):
                name = f"{7 * identity + 3}_{kind}{number}.jpg"
                lists[kind].append((name, 7 * identity + 3))
                save(place / sub / name, face)
    for number in range(distractors):
        save(place / "Gallery_Distractor" / f"{number}.jpg", generator.integers(0, 256, (5, 5, 3)))
    for kind, file in (("gallery", "gallery_match_img_ID_pairs.mat"), ("probe", "probe_img_ID_pairs.mat")):
        generator.shuffle(lists[kind])
        names = np.array([[name] for name, _ in lists[kind]], dtype=object)  # a cell array, as published
        savemat(place / file, {f"{kind}_set": names, f"{kind}_ids": [[int(label)] for _, label in lists[kind]]})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tinyface(tmp_path_factory.mktemp("tinyface"))


def plain_ranks(files: list[Path], rows: np.ndarray) -> list[int]:
    """Position of the first right entry in each probe's sorted row; who is who comes from the names."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    who = [int(file.stem.split("_")[0]) if "_" in file.stem else -1 for file in files]
    gallery = [i for i, file in enumerate(files) if file.parent.name != "Probe"]
    found = []
    for i, file in enumerate(files):
        if file.parent.name == "Probe":
            order = sorted(gallery, key=lambda j: -float(rows[i] @ rows[j]))
            found.append(1 + [who[j] for j in order].index(who[i]))
    return found


def test_it_is_what_sorting_says(folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(147, 12)).eval()
    setting = extract.Setting(ALONE, "cpu", 32)
    task = suite.parse(f"tiny:{folder}")
    assert task.kind == "tinyface"
    result = suite.evaluate(model, [task], setting)["tiny"]
    files = sorted(folder.rglob("*.jpg"))
    ranks = np.array(plain_ranks(files, setting.embed(model, files)))
    assert result["probe"] == len(ranks) and result["distractors"] == 60 and not result["as_published"]
    for n in (1, 5, 10, 20, 50):
        assert result["rank"][str(n)] == pytest.approx((ranks <= n).mean(), abs=1e-9)
    assert 0.1 < result["rank"]["1"] < 1
    assert suite.figure(result) == result["rank"]["1"]


def test_several_gallery_images_and_ties() -> None:
    """The best gallery image of an identity counts; an equal distractor counts against the model."""
    found = tinyface.TinyFace([], np.array([1, 1, 2]), np.array([1, 2, 2]), distractors=1)
    gallery = [[1, 0], [0, 1], [-1, 0.5], [-1, -1]]
    result = tinyface.score(found, np.array([*gallery, [0, 2], [-1, 0.5], [-3, -3]], dtype=float))
    assert result["rank"]["1"] == pytest.approx(2 / 3)  # the last probe is nearest to the distractor
    tied = tinyface.score(found, np.array([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1]], dtype=float))
    assert tied["rank"]["1"] == 0


def test_aligned_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    for file in folder.rglob("*.jpg"):
        target = tmp_path / file.parent.name / f"{file.stem}.png"
        target.parent.mkdir(exist_ok=True)
        Image.open(file).save(target)
    found = tinyface.read_tinyface(folder / "Testing_Set", tmp_path)
    assert all(file.suffix == ".png" for file in found.files) and found.distractors == 60
    (tmp_path / "Probe" / f"{found.files[-1].stem}.png").unlink()
    with pytest.raises(UserError, match="lacks 1 of"):
        tinyface.read_tinyface(folder, tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = make_tinyface(tmp_path)
    path = folder / "Testing_Set" / "probe_img_ID_pairs.mat"
    savemat(path, {"probe_set": np.array(["3_probe0.jpg"], dtype=object), "probe_ids": [99]})
    with pytest.raises(UserError, match="identity 99"):
        tinyface.read_tinyface(folder)
    savemat(path, {"gallery_set": [1]})
    with pytest.raises(UserError, match="probe_set"):
        tinyface.read_tinyface(folder)
    savemat(path, {"probe_set": np.array(["3_probe0.jpg", "3_probe1.jpg"], dtype=object), "probe_ids": [1.25, 1.5]})
    with pytest.raises(UserError, match="whole numbers"):
        tinyface.read_tinyface(folder)
    image = next((folder / "Testing_Set" / "Probe").rglob("*.jpg"))
    image.with_suffix(".png").write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="one name"):
        tinyface.read_tinyface(folder)
    image.with_suffix(".png").unlink()
    path.write_bytes(b"not a list")
    with pytest.raises(UserError, match="not TinyFace's list"):
        tinyface.read_tinyface(folder)
    path.unlink()
    with pytest.raises(UserError, match="Testing_Set"):
        tinyface.read_tinyface(folder)
