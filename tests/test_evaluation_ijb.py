"""IJB 1:1 on a generated release, against a reference that walks templates one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_curve

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation.sets import ijb
from lvtrain.weights import extract

ALONE = World(0, 1, 0, torch.device("cpu"))


def make_release(folder: Path, templates: int = 40, people: int = 20, seed: int = 0) -> Path:
    """Loose crops of 140 x 150 pixels with points, several media a template, several faces a medium; every file as the release spells it."""
    generator = np.random.default_rng(seed)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    faces, points = [], []
    number = 1
    for template in range(templates):
        for medium in range(int(generator.integers(1, 4))):
            for _ in range(int(generator.integers(1, 4))):
                name = f"{number}.jpg"
                number += 1
                shade = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(shade).resize((140, 150)).save(folder / "loose_crop" / name)
                faces.append(f"{name} {1000 + 7 * (templates - template)} {medium}")
                eyes = generator.normal([[50, 60], [90, 60], [70, 80], [55, 105], [85, 105]], 2.0)
                points.append(
                    " ".join([name, *(f"{value:.3f}" for value in eyes.ravel()), f"{generator.uniform(0.5, 1):.4f}"])
                )
    ids = sorted({int(face.split()[1]) for face in faces})
    pairs = []
    for _ in range(600):
        first, second = generator.choice(templates, 2, replace=False)
        pairs.append(f"{ids[first]} {ids[second]} {int(first % people == second % people)}")
    for name, lines in (("face_tid_mid", faces), ("template_pair_label", pairs), ("name_5pts_score", points)):
        (folder / "meta" / f"ijbtest_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def reference(release: ijb.Release, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The field's loop: template by template, medium by medium."""
    templates = {}
    for template in np.unique(release.templates):
        rows = np.flatnonzero(release.templates == template)
        parts = []
        for medium in np.unique(release.media[rows]):
            chosen = rows[release.media[rows] == medium]
            parts.append((features[chosen].astype(np.float64) * weights[chosen, None]).mean(0))
        fused = np.sum(parts, axis=0)
        templates[template] = fused / np.linalg.norm(fused)
    return np.array([templates[a] @ templates[b] for a, b in zip(release.first, release.second)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("ijb"))


@pytest.mark.parametrize("detector_scores", [True, False])
def test_against_the_loop(folder: Path, detector_scores: bool) -> None:
    release = ijb.read_release(folder)
    features = np.random.default_rng(1).normal(size=(len(release.files), 100)).astype(np.float32)
    weights = release.scores if detector_scores else np.ones(len(release.files))
    expected = reference(release, features, weights)
    names, templates = ijb.template_features(features, release.templates, release.media, weights)
    ours = ijb.pair_cosines(templates, np.searchsorted(names, release.first), np.searchsorted(names, release.second))
    assert np.abs(ours - expected).max() < 1e-12

    result = ijb.score_pairs(release, features, detector_scores=detector_scores)
    far, tar, _ = roc_curve(release.issame, expected)
    far, tar = np.flipud(far), np.flipud(tar)
    negatives = (~release.issame).sum()
    assert set(result["nearest"]) == {"1e-02", "1e-01"}  # 570 negative pairs resolve no lower one
    for target in (1e-2, 1e-1):
        # the field's own expression for its table
        _, nearest = min(list(zip(abs(far - target), range(len(far)))))
        assert abs(result["nearest"][f"{target:.0e}"] - tar[nearest]) < 1e-9
    for target, figure in result["tar_at_far"].items():
        assert abs(figure - tar[far <= float(target)].max()) < 1e-9
        assert float(target) * negatives >= 1


def test_whole_protocol_with_and_without_flip(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(147, 16)).eval()
    release = ijb.read_release(folder)
    crops = ijb.AlignedCrops(release)
    pixels = torch.stack([torch.from_numpy(crops[i]) for i in range(len(crops))]).permute(0, 3, 1, 2).float()
    pixels = (pixels - 127.5) / 127.5
    with torch.no_grad():
        straight, mirrored = model(pixels).numpy(), model(pixels.flip(3)).numpy()
    for flip, features in ((True, straight + mirrored), (False, straight)):
        result = ijb.run(model, folder, extract.Setting(ALONE, "cpu", 16), flip=flip)
        expected = ijb.score_pairs(release, features)
        for target, figure in expected["nearest"].items():
            assert result["nearest"][target] == pytest.approx(figure, abs=1e-9)
        assert result["flip"] is flip and result["templates"] == 40


def test_alignment_brings_the_points_to_the_template(folder: Path) -> None:
    from lvtrain.data import align

    release = ijb.read_release(folder)
    matrix = align.similarity(release.points[3], align.template())
    moved = release.points[3] @ matrix[:, :2].T + matrix[:, 2]
    assert np.abs(moved - align.template()).max() < 6  # points were drawn with 2 pixels of noise
    assert ijb.AlignedCrops(release)[3].shape == (112, 112, 3)


def edit(folder: Path, name: str, change) -> None:
    path = folder / "meta" / f"ijbtest_{name}.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def swap_two(lines: list[str]) -> list[str]:
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("name_5pts_score", swap_two, "same order"),
        ("name_5pts_score", lambda lines: lines[:-1], "cut short"),
        ("name_5pts_score", lambda lines: [lines[0].replace(lines[0].split()[1], "x"), *lines[1:]], "than numbers"),
        ("name_5pts_score", lambda lines: [lines[0].replace(lines[0].split()[1], "nan"), *lines[1:]], "line 1: points"),
        ("name_5pts_score", lambda lines: [f"1.jpg {'50 ' * 10}0.9", *lines[1:]], "points coincide"),
        ("face_tid_mid", lambda lines: lines[:-1], "cut short"),
        ("face_tid_mid", lambda lines: [*lines[:-1], lines[-1].split()[0]], "1 values, 3 expected"),
        ("face_tid_mid", lambda lines: [*lines[:-1], lines[-1].split()[0] + " x 1"], "must be integers"),
        ("template_pair_label", lambda lines: [*lines, "1 2 1"], "names template 1"),
        ("template_pair_label", lambda lines: [*lines, "1007"], "three a pair"),
        ("template_pair_label", lambda lines: [*lines, "1007 1014 x"], "something else than numbers"),
        ("template_pair_label", lambda lines: [*lines, "1007 1014 2"], "must be 0 or 1"),
    ],
)
def test_planted_errors_are_named(tmp_path: Path, name: str, change, message: str) -> None:
    folder = make_release(tmp_path / "r")
    edit(folder, name, change)
    with pytest.raises(UserError, match=message):
        ijb.read_release(folder)


def test_missing_crop_and_missing_faces(tmp_path: Path) -> None:
    folder = make_release(tmp_path / "r", templates=6, people=3)
    (folder / "loose_crop" / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"2\.jpg"):
        ijb.run(extract.raw_pixels, folder, extract.Setting(ALONE, "cpu", 4))
    for path in (folder / "meta").iterdir():
        path.rename(path.with_name(path.name.replace("ijbtest", "ijbc")))
    with pytest.raises(UserError, match="469375"):
        ijb.read_release(folder)
    assert len(ijb.read_release(folder, complete=False).files) > 6
    with pytest.raises(UserError, match="meta"):
        ijb.read_release(tmp_path)
