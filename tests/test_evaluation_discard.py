"""Error against discarded share, held against code that discards one set of comparisons after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lvtrain.distributed.world import World
from lvtrain.evaluation import suite
from lvtrain.evaluation.scores.discard import LIMIT, SHARES, error_versus_discard, genuine_pairs
from lvtrain.weights import extract
from tests.test_evaluation_groups import faces  # noqa: F401


def plain(genuine: np.ndarray, quality: np.ndarray, threshold: float, share: float) -> float:
    """FNMR of the comparisons that are left when the largest discard of whole quality values within `share` is made."""
    left = genuine
    for limit in sorted(set(quality)):
        if (quality < limit).sum() / len(genuine) <= share + 1e-12:
            left = genuine[quality >= limit]
    return float((left < threshold).mean())


def sample(ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    quality = rng.integers(1, 12, 437) if ties else rng.gamma(4.0, size=437)
    return np.tanh(0.3 * quality + rng.normal(0, 0.5, 437) - 0.3), quality.astype(float)


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_what_discarding_gives(ties: bool) -> None:
    genuine, quality = sample(ties)
    found = error_versus_discard(genuine, quality, {"1e-02": 0.2, "1e-03": 0.5})
    assert found["comparisons"] == 437 and found["discarded"] == SHARES.tolist()
    for curve in found["at"].values():
        expected = [plain(genuine, quality, curve["threshold"], share) for share in SHARES]
        assert curve["fnmr"] == pytest.approx(expected, abs=1e-12)
        assert curve["fnmr"][0] == (genuine < curve["threshold"]).mean()
        middles = (np.arange(400) + 0.5) * LIMIT / 400
        area = np.mean([plain(genuine, quality, curve["threshold"], share) for share in middles])
        assert curve["area"] == pytest.approx(area, abs=3e-4)
        start = curve["fnmr"][0]
        best = (
            quad(lambda r, start=start: max(0.0, (start - r) / (1 - r)), 0, LIMIT, points=[min(start, LIMIT / 2)])[0]
            / LIMIT
        )
        assert curve["area_best"] == pytest.approx(best, abs=1e-6)
        assert curve["area_best"] < curve["area"] < start  # the quality says something


def test_a_quality_that_says_nothing_changes_nothing() -> None:
    genuine, _ = sample(False)
    curve = error_versus_discard(genuine, np.ones(len(genuine)), {"x": 0.5})["at"]["x"]
    assert set(curve["fnmr"]) == {(genuine < 0.5).mean()} and curve["area"] == pytest.approx(curve["fnmr"][0])
    perfect = error_versus_discard(genuine, genuine, {"x": 0.5})["at"]["x"]
    assert perfect["area"] == pytest.approx(perfect["area_best"], abs=1 / len(genuine))


def test_genuine_pairs_are_those_of_the_matrix() -> None:
    rng = np.random.default_rng(1)
    rows, labels, quality = rng.normal(size=(50, 8)), rng.integers(0, 14, 50), rng.random(50)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, lower = genuine_pairs(rows, labels, quality)
    first, second = np.triu_indices(50, 1)
    same = labels[first] == labels[second]
    expected = np.stack([(rows @ rows.T)[first, second], np.minimum(quality[first], quality[second])])[:, same]
    got = np.stack([cosines, lower])
    assert got[:, np.lexsort(got)] == pytest.approx(expected[:, np.lexsort(expected)], abs=1e-6)


def test_protocols_give_the_curve(faces: Path, tmp_path: Path) -> None:  # noqa: F811
    """By the norm of the embedding that is compared, at thresholds that all impostor comparisons give."""
    from lvtrain.evaluation.bins import write_bin

    files = sorted((faces / "faces").rglob("*.png"))[:80]
    chosen = [
        file for k in range(80) for file in (files[k], files[(k + 1) % 4 + 4 * (k // 4)] if k % 2 else files[k - 4])
    ]
    write_bin(tmp_path / "pairs.bin", [file.read_bytes() for file in chosen], [k % 2 == 1 for k in range(80)])
    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(192, 8)).eval()
    setting = extract.Setting(World(0, 1, 0, torch.device("cpu")), "cpu", 16, 32)
    tasks = [suite.parse(f"pairs:{tmp_path / 'pairs.bin'}"), suite.parse(f"all:{faces / 'faces'}")]
    results = suite.evaluate(model, tasks, setting)
    assert results["pairs"]["error_versus_discard"]["at"] == {}, "40 impostor pairs cannot resolve an FMR of 1e-2"
    found = results["all"]["error_versus_discard"]
    assert set(found["at"]) == {"1e-02", "1e-03"} and found["comparisons"] == 24 * 6
    assert results["pairs"]["error_versus_discard"]["comparisons"] == 40
    images = setting.embed(model, sorted((faces / "faces").rglob("*.png"))).astype(float)
    sizes = np.linalg.norm(images, axis=1)
    images /= sizes[:, None]
    pairs = [(i, j) for p in range(24) for i in range(4 * p, 4 * p + 4) for j in range(i + 1, 4 * p + 4)]
    genuine = np.array([images[i] @ images[j] for i, j in pairs])
    quality = np.array([min(sizes[i], sizes[j]) for i, j in pairs])
    for curve in found["at"].values():
        assert curve["fnmr"][20] == pytest.approx(plain(genuine, quality, curve["threshold"], 0.2), abs=1e-9)
