"""Clustering faces by identity: K-means, DBSCAN and agglomerative clustering on normalised embeddings; pairwise F, BCubed F and NMI.

Pairwise: precision and recall of "these two are one identity" over all pairs of images. BCubed (Bagga and Baldwin, 1998): for
each image, the share of its cluster that is its identity, and the share of its identity that is in its cluster, averaged over
images. F is their harmonic mean.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from sklearn.cluster import DBSCAN, AgglomerativeClustering, KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from lvtrain.errors import UserError
from lvtrain.evaluation.verification import normalise

Algorithm = Literal["kmeans", "dbscan", "agglomerative"]
ALGORITHMS: tuple[Algorithm, ...] = ("kmeans", "dbscan", "agglomerative")
# agglomerative clustering holds all distances: 20,000 images are 3.2 GB
MAX_AGGLOMERATIVE = 20_000


def cluster(
    embeddings: np.ndarray, algorithm: Algorithm, *, clusters: int | None = None, cosine: float = 0.4
) -> np.ndarray:
    """Cluster of every embedding, int64 [N]; DBSCAN's unclustered images (noise) each become one cluster.

    Args:
        embeddings: [N, d], any norm.
        algorithm: `kmeans`, `dbscan` or `agglomerative`.
        clusters: number of clusters: required for kmeans; for agglomerative, None = `cosine` decides.
        cosine: images with at least this cosine are neighbours (dbscan); clusters with at least this mean cosine are joined
            (agglomerative).

    Raises:
        UserError: NaN embeddings, kmeans without a number of clusters, too many images for agglomerative.
    """
    rows = normalise(embeddings)
    if algorithm == "kmeans":
        if not clusters:
            raise UserError("kmeans needs the number of clusters")
        return KMeans(clusters, n_init=3, random_state=0).fit_predict(rows).astype(np.int64)
    if algorithm == "dbscan":
        # on the unit sphere, cosine >= c is distance <= sqrt(2 - 2c), for which scikit-learn has fast neighbour searches
        # an image with one neighbour is a core
        scan = DBSCAN(eps=float(np.sqrt(2 - 2 * cosine)) + 1e-12, min_samples=2)
        found = scan.fit_predict(rows).astype(np.int64)
        alone = np.flatnonzero(found < 0)
        found[alone] = found.max() + 1 + np.arange(len(alone))
        return found
    if len(rows) > MAX_AGGLOMERATIVE:
        raise UserError(
            f"agglomerative clustering of {len(rows)} images needs {8 * len(rows) ** 2 / 1e9:.0f} GB; use dbscan, or fewer images"
        )
    threshold = None if clusters else 1.0 - cosine
    model = AgglomerativeClustering(
        n_clusters=clusters, metric="cosine", linkage="average", distance_threshold=threshold
    )
    return model.fit_predict(rows).astype(np.int64)


def scores(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Pairwise and BCubed precision, recall and F, and NMI (arithmetic mean), of clusters `found` [N] against identities `labels` [N].

    A clustering without any pair has pairwise precision 1, because it predicted nothing wrong. Without a pair to find,
    recall is 1.
    """
    table = contingency_matrix(labels, found, sparse=True).astype(np.int64)
    together = int((table.data.astype(np.int64) ** 2).sum())
    sizes_true = np.asarray(table.sum(axis=1)).ravel()
    sizes = np.asarray(table.sum(axis=0)).ravel()
    count = len(labels)
    right = (together - count) / 2
    predicted, true = (int((sizes**2).sum()) - count) / 2, (int((sizes_true**2).sum()) - count) / 2
    precision, recall = (right / predicted if predicted else 1.0), (right / true if true else 1.0)
    cells = table.tocoo()
    squares = cells.data.astype(np.float64) ** 2
    b_precision, b_recall = (
        float((squares / sizes[cells.col]).sum() / count),
        float((squares / sizes_true[cells.row]).sum() / count),
    )
    return {
        "pairwise_precision": precision,
        "pairwise_recall": recall,
        "pairwise_f": _f(precision, recall),
        "bcubed_precision": b_precision,
        "bcubed_recall": b_recall,
        "bcubed_f": _f(b_precision, b_recall),
        "nmi": float(normalized_mutual_info_score(labels, found)),
    }


def run(
    embeddings: np.ndarray, labels: np.ndarray, *, cosine: float = 0.4, algorithms: tuple[Algorithm, ...] = ALGORITHMS
) -> dict[str, Any]:
    """Scores of every algorithm. kmeans gets the true number of identities, as in the literature; the others get the cosine."""
    people = len(np.unique(labels))
    results: dict[str, Any] = {"images": len(labels), "people": people, "cosine": cosine}
    for algorithm in algorithms:
        if algorithm == "agglomerative" and len(labels) > MAX_AGGLOMERATIVE:
            continue
        found = cluster(embeddings, algorithm, clusters=people if algorithm == "kmeans" else None, cosine=cosine)
        results[algorithm] = {**scores(labels, found), "clusters": len(np.unique(found))}
    return results


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
