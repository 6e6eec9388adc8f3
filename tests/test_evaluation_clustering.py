"""Clustering scores against counting over all pairs; the three algorithms on identities that can be separated."""

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score, precision_recall_fscore_support

from lvtrain.errors import UserError
from lvtrain.evaluation.scores import clustering


def counted(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Pair by pair with scikit-learn, image by image for BCubed."""
    upper = np.triu_indices(len(labels), 1)
    same = (labels[:, None] == labels[None, :])[upper]
    said = (found[:, None] == found[None, :])[upper]
    precision, recall, f, _ = precision_recall_fscore_support(same, said, average="binary")
    b_precision = np.mean([np.mean(labels[found == found[i]] == labels[i]) for i in range(len(labels))])
    b_recall = np.mean([np.mean(found[labels == labels[i]] == found[i]) for i in range(len(labels))])
    return {
        "pairwise_precision": precision,
        "pairwise_recall": recall,
        "pairwise_f": f,
        "bcubed_precision": b_precision,
        "bcubed_recall": b_recall,
        "bcubed_f": 2 * b_precision * b_recall / (b_precision + b_recall),
        "nmi": normalized_mutual_info_score(labels, found),
    }


@pytest.mark.parametrize(("people", "clusters"), [(5, 5), (12, 3), (3, 40), (30, 30)])
def test_scores_by_counting(people: int, clusters: int) -> None:
    generator = np.random.default_rng(people)
    labels = generator.integers(0, people, 200) * 11 - 40  # any integers will do
    found = np.where(generator.random(200) < 0.5, labels % clusters, generator.integers(0, clusters, 200))
    ours, expected = clustering.scores(labels, found), counted(labels, found)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(ours[name] - value) < 1e-9, name


def test_ends_of_the_scale() -> None:
    labels = np.array([0, 0, 1, 1])
    assert set(clustering.scores(labels, labels + 5).values()) == {1.0}
    apart = clustering.scores(labels, np.arange(4))
    assert (apart["pairwise_precision"], apart["pairwise_recall"], apart["pairwise_f"]) == (1.0, 0.0, 0.0)
    assert (apart["bcubed_precision"], apart["bcubed_recall"]) == (1.0, 0.5)


def people(noise: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(25), 8)
    return generator.normal(size=(25, 64))[labels] + noise * generator.normal(size=(200, 64)), labels


def test_algorithms_find_people_that_can_be_told_apart() -> None:
    embeddings, labels = people(0.3)
    results = clustering.run(embeddings, labels)
    assert results["people"] == 25
    for algorithm in clustering.ALGORITHMS:
        assert results[algorithm]["bcubed_f"] > 0.98, algorithm
    mixed = labels.copy()
    mixed[::3] = np.roll(mixed[::3], 7)
    assert clustering.run(embeddings, mixed)["dbscan"]["bcubed_f"] < 0.7


def test_noise_of_dbscan_is_not_one_cluster() -> None:
    embeddings, _ = people(0.3)
    found = clustering.cluster(np.concatenate([embeddings, np.random.default_rng(1).normal(size=(10, 64))]), "dbscan")
    assert len(np.unique(found[200:])) == 10
    assert not np.isin(found[200:], found[:200]).any()


def test_refusals() -> None:
    embeddings, _ = people(0.3)
    with pytest.raises(UserError, match="number of clusters"):
        clustering.cluster(embeddings, "kmeans")
    with pytest.raises(UserError, match="GB"):
        clustering.cluster(np.zeros((clustering.MAX_AGGLOMERATIVE + 1, 1)), "agglomerative")
    embeddings[0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        clustering.cluster(embeddings, "dbscan")
