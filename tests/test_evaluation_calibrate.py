"""Thresholds at a false match rate: by counting, and intervals that hold as often as they say."""

import numpy as np
import pytest
from scipy.stats import norm

from lvtrain.errors import UserError
from lvtrain.evaluation.scores import calibrate


def drawn(seed: int, pairs: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    issame = np.arange(pairs) % 2 == 0
    return generator.normal(np.where(issame, 0.6, 0.0), 0.1), issame


def test_threshold_by_counting() -> None:
    cosines, issame = drawn(0)
    result = calibrate.from_pairs(cosines, issame, targets=(1e-2, 1e-3, 1e-4, 1e-6))
    assert result["unresolved"] == ["1e-06"]
    impostors = cosines[~issame]
    for target, entry in result["thresholds"].items():
        assert np.mean(impostors >= entry["threshold"]) <= float(target)
        # any lower threshold that accepts one more impostor breaks the target
        following = impostors[impostors < entry["threshold"]].max()
        assert np.mean(impostors >= following) > float(target)
        assert entry["low"] <= entry["threshold"] <= entry["high"]
        assert entry["fnmr"] == np.mean(cosines[issame] < entry["threshold"])


def test_interval_of_pairs_holds_the_truth_as_often_as_it_says() -> None:
    truth = norm.isf(1e-2, 0.0, 0.1)
    inside = 0
    for seed in range(300):
        entry = calibrate.from_pairs(*drawn(seed, 4000), targets=(1e-2,))["thresholds"]["1e-02"]
        inside += entry["low"] <= truth <= entry["high"]
    assert 0.90 < inside / 300 <= 1.0


def population(seed: int, people: int = 60, images: int = 6, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), images)
    return generator.normal(size=(people, dim))[labels] + 0.4 * generator.normal(size=(len(labels), dim)), labels


def test_people_point_estimate_is_the_full_count() -> None:
    embeddings, labels = population(0)
    result = calibrate.from_people(embeddings, labels, targets=(1e-2, 1e-3), replicates=50)
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    upper = np.triu_indices(len(rows), 1)
    cosines, same = (rows @ rows.T)[upper], (labels[:, None] == labels[None, :])[upper]
    expected = calibrate.from_pairs(cosines, same, targets=(1e-2, 1e-3))
    assert result["impostor_pairs"] == expected["impostor_pairs"]
    for target, entry in expected["thresholds"].items():
        assert result["thresholds"][target]["threshold"] == pytest.approx(entry["threshold"], abs=1e-6)
        assert result["thresholds"][target]["fnmr"] == pytest.approx(entry["fnmr"], abs=1e-9)


def test_people_interval_is_wider_and_holds() -> None:
    """Few identities, many images each: pairs are far from independent, and the interval of independent pairs is far too narrow."""
    truth = np.median(
        [
            calibrate.from_people(*population(seed, people=400, images=3), targets=(1e-2,), replicates=2)["thresholds"][
                "1e-02"
            ]["threshold"]
            for seed in range(8)
        ]
    )
    inside_people = inside_pairs = 0
    for seed in range(100, 130):
        embeddings, labels = population(seed, people=40)
        entry = calibrate.from_people(embeddings, labels, targets=(1e-2,), replicates=150)["thresholds"]["1e-02"]
        inside_people += entry["low"] <= truth <= entry["high"]
        rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        upper = np.triu_indices(len(rows), 1)
        pair = calibrate.from_pairs(
            (rows @ rows.T)[upper], (labels[:, None] == labels[None, :])[upper], targets=(1e-2,)
        )["thresholds"]["1e-02"]
        inside_pairs += pair["low"] <= truth <= pair["high"]
    assert inside_people >= 24  # of 30; 95% is meant
    assert inside_people > inside_pairs


def test_refusals() -> None:
    embeddings, labels = population(0, people=10)
    with pytest.raises(UserError, match="from 10 identities"):
        calibrate.from_people(embeddings, labels)
    with pytest.raises(UserError, match="impostor"):
        calibrate.from_pairs(np.zeros(10), np.ones(10, bool))
    embeddings, labels = population(0, people=20, images=2)
    for refused in (
        lambda: calibrate.from_people(embeddings, labels),
        lambda: calibrate.from_pairs(np.zeros(1520), np.arange(1520) < 760),
    ):
        with pytest.raises(UserError, match=r"7[26]0 .*1e-03.* 1,000, 1e-04.* 10,000, 1e-05"):
            refused()
