"""The ten-fold protocol against a plain loop over scikit-learn's folds, and TAR at FAR against counting."""

import numpy as np
import pytest
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from lvtrain.errors import UserError
from lvtrain.evaluation import verification


def loop_of_the_field(first: np.ndarray, second: np.ndarray, issame: np.ndarray) -> tuple[float, float, list[float]]:
    """The protocol as FORMATS describes it, pair by pair and threshold by threshold."""
    distances = np.sum(np.square(normalize(first) - normalize(second)), 1)
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen = [], []
    for train, test in KFold(n_splits=10, shuffle=False).split(np.arange(len(issame))):
        scores = [np.mean((distances[train] < threshold) == issame[train]) for threshold in thresholds]
        best = thresholds[int(np.argmax(scores))]
        chosen.append(float(best))
        accuracies.append(np.mean((distances[test] < best) == issame[test]))
    return float(np.mean(accuracies)), float(np.std(accuracies)), chosen


def pairs(count: int, dim: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    issame = np.arange(count) % 2 == 0
    first = generator.normal(size=(count, dim))
    second = np.where(issame[:, None], first, generator.normal(size=(count, dim))) + noise * generator.normal(
        size=(count, dim)
    )
    return first, second, issame


@pytest.mark.parametrize(
    ("count", "dim", "noise"), [(10, 3, 1.0), (37, 2, 0.5), (600, 8, 1.5), (1003, 16, 3.0), (6000, 32, 2.0)]
)
def test_ten_fold_equals_the_loop(count: int, dim: int, noise: float) -> None:
    first, second, issame = pairs(count, dim, noise, seed=count)
    ours = verification.ten_fold(verification.squared_distances(first, second), issame)
    accuracy, std, thresholds = loop_of_the_field(first, second, issame)
    assert abs(ours.accuracy - accuracy) < 1e-12
    assert abs(ours.std - std) < 1e-12
    assert ours.thresholds.tolist() == thresholds


def test_ties_are_decided_as_the_protocol_does() -> None:
    """Distances that lie exactly on thresholds: the comparison is strict, and the first best threshold wins."""
    generator = np.random.default_rng(3)
    issame = np.arange(400) % 2 == 0
    distances = np.where(issame, generator.integers(0, 220, 400), generator.integers(150, 400, 400)) * 0.01
    ours = verification.ten_fold(distances, issame)
    for fold, (train, test) in enumerate(KFold(10).split(distances)):
        scores = [np.mean((distances[train] < threshold) == issame[train]) for threshold in np.arange(0, 4, 0.01)]
        best = np.arange(0, 4, 0.01)[int(np.argmax(scores))]
        assert ours.thresholds[fold] == best
        assert abs(ours.fold_accuracy[fold] - np.mean((distances[test] < best) == issame[test])) < 1e-15


def test_order_of_pairs_matters_as_in_the_protocol() -> None:
    first, second, issame = pairs(500, 4, 1.0, seed=5)
    shuffled = np.random.default_rng(0).permutation(500)
    distances = verification.squared_distances(first, second)
    assert (
        verification.ten_fold(distances, issame).std != verification.ten_fold(distances[shuffled], issame[shuffled]).std
    )


def test_tar_at_far_by_counting() -> None:
    first, second, issame = pairs(4001, 8, 1.2, seed=1)
    cosines = 1 - verification.squared_distances(first, second) / 2
    far, tar, _ = verification.roc(cosines, issame)
    negatives = int((~issame).sum())
    figures = verification.tar_at_far(far, tar, negatives=negatives)
    assert set(figures) == {"1e-03", "1e-02", "1e-01"}  # 2000 negative pairs cannot speak of 1e-4
    for target, figure in figures.items():
        best = 0.0
        for threshold in cosines:
            if np.mean(cosines[~issame] >= threshold) <= float(target):
                best = max(best, float(np.mean(cosines[issame] >= threshold)))
        assert abs(figure - best) < 1e-12


def test_tar_at_far_with_tied_scores() -> None:
    issame = np.array([True] * 10 + [False] * 10)
    cosines = np.array([0.9] * 5 + [0.5] * 5 + [0.5] * 2 + [0.1] * 8)
    far, tar, _ = verification.roc(cosines, issame)
    # accepting 0.5 would accept both tied negatives: FAR 0.2
    assert verification.tar_at_far(far, tar, (0.1, 0.2), negatives=10) == {"1e-01": 0.5, "2e-01": 1.0}


def test_collapsed_embeddings_give_a_half() -> None:
    issame = np.arange(100) % 2 == 0
    ones = np.ones((100, 4))
    ours = verification.ten_fold(verification.squared_distances(ones, ones), issame)
    assert (ours.accuracy, ours.std) == (0.5, 0.0)


def test_nan_is_an_error_not_a_figure() -> None:
    first, second, issame = pairs(100, 4, 1.0, seed=0)
    first[7, 2] = np.nan
    with pytest.raises(UserError, match="1 of 100 embeddings are NaN"):
        verification.squared_distances(first, second)
    with pytest.raises(UserError, match="NaN"):
        verification.ten_fold(np.full(100, np.nan), issame)
    with pytest.raises(UserError, match="both positive and negative"):
        verification.ten_fold(np.zeros(100), np.ones(100, bool))


def test_summary_is_json_and_consistent() -> None:
    import json

    first, second, issame = pairs(2000, 8, 1.0, seed=2)
    summary = json.loads(json.dumps(verification.summary(verification.squared_distances(first, second), issame)))
    assert summary["pairs"] == 2000 and summary["positive_pairs"] == 1000
    assert sum(summary["histogram"]["positive"]) == sum(summary["histogram"]["negative"]) == 1000
    assert len(summary["roc"]["far"]) == len(summary["roc"]["tar"]) <= 400
    assert summary["roc"]["far"][-1] == summary["roc"]["tar"][-1] == 1.0
    assert np.all(np.diff(summary["roc"]["tar"]) >= 0)
    worst = summary["hardest"]["positive"][0]
    assert issame[worst[0]]
    assert worst[1] == pytest.approx(min(1 - verification.squared_distances(first, second)[issame] / 2))
