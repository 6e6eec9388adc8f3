"""MegaFace figures against plain loops; feature files against the devkit's layout."""

import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from lvtrain.errors import UserError
from lvtrain.evaluation.sets import megaface


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 30, 120)
    centres = generator.normal(size=(30, 12))
    probes = centres[labels] + 0.5 * generator.normal(size=(120, 12))
    return probes * 3, labels, generator.normal(size=(5000, 12))


def loops(
    probes: np.ndarray, labels: np.ndarray, distractors: np.ndarray
) -> tuple[dict[int, float], np.ndarray, np.ndarray]:
    probes = probes / np.linalg.norm(probes, axis=1, keepdims=True)
    distractors = distractors / np.linalg.norm(distractors, axis=1, keepdims=True)
    hits: dict[int, list[bool]] = {1: [], 10: []}
    positive = []
    for i in range(len(probes)):
        against = probes[i] @ distractors.T
        for j in range(len(probes)):
            if i != j and labels[i] == labels[j]:
                mate = probes[i] @ probes[j]
                for rank, row in hits.items():
                    row.append(int((against >= mate).sum()) < rank)
                if i < j:
                    positive.append(mate)
    return (
        {rank: float(np.mean(row)) for rank, row in hits.items()},
        np.array(positive),
        (probes @ distractors.T).ravel(),
    )


@pytest.mark.parametrize("tile", [777, 100_000])
def test_against_loops(tile: int) -> None:
    probes, labels, distractors = sample()
    ours = megaface.score(probes, labels, distractors, tile=tile)
    identification, positive, negative = loops(probes, labels, distractors)
    assert ours["pairs"] == len(positive)
    for rank, figure in identification.items():
        assert abs(ours["identification"][f"rank_{rank}"] - figure) < 1e-9
    far, tar, _ = roc_curve(
        np.append(np.ones(len(positive)), np.zeros(len(negative))),
        np.append(positive, negative),
        drop_intermediate=False,
    )
    assert list(ours["tar_at_far"]) == ["1e-05", "1e-04", "1e-03"]  # 600,000 negatives
    for target, figure in ours["tar_at_far"].items():
        assert abs(figure - tar[far <= float(target)].max()) < 1e-9


def write_feature(path: Path, feature: np.ndarray) -> None:
    """As the devkit packs it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("4i", len(feature), 1, 4, 5) + struct.pack(f"{len(feature)}f", *feature))


def test_feature_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    written = {}
    for person in ("a", "b"):
        for image in range(3):
            feature = generator.normal(size=7).astype(np.float32)
            write_feature(tmp_path / person / f"{image}_ours.bin", feature)
            written[f"{person}{image}"] = feature
    features, labels = megaface.read_features(tmp_path, labelled=True)
    assert np.array_equal(features, np.stack(list(written.values())))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "a" / "0_ours.bin").write_bytes(struct.pack("4i", 7, 1, 4, 5) + b"12345")
    with pytest.raises(UserError, match="cut short"):
        megaface.read_features(tmp_path, labelled=True)
    (tmp_path / "a" / "0_ours.bin").write_bytes(b"no")
    with pytest.raises(UserError, match=r"0_ours\.bin"):
        megaface.read_features(tmp_path, labelled=True)
    write_feature(tmp_path / "a" / "0_ours.bin", np.zeros(8))
    with pytest.raises(UserError, match="different lengths"):
        megaface.read_features(tmp_path, labelled=True)


def test_planted_errors() -> None:
    probes, labels, distractors = sample()
    distractors[17] = probes[5]
    with pytest.raises(UserError, match="distractor"):
        megaface.score(probes, labels, distractors)
    with pytest.raises(UserError, match="two probe images"):
        megaface.score(probes, np.arange(120), distractors)
    with pytest.raises(UserError, match="different models"):
        megaface.score(probes[:, :5], labels, distractors)
    probes[0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        megaface.score(probes, labels, distractors)
