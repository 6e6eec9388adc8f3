"""1:1 verification: insightface's ten-fold accuracy, TAR at FAR, ROC, and the distribution of pair cosines.

The ten-fold protocol is arcface_torch's, to the last bit: embedding of the image plus embedding of its mirror, L2-normalised; squared distance d;
thresholds 0, 0.01, ..., 3.99; a pair is accepted where d < threshold; the first best threshold on nine folds is used on the
tenth; mean and population standard deviation over folds.

TAR at FAR differs from arcface_torch, which interpolates an unstable curve. Here it is the largest TAR of any threshold whose
FAR does not exceed the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.bins import FOLDS

THRESHOLDS = np.arange(0, 4, 0.01)
FAR_TARGETS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# of a benchmark in the report: points of the ROC (at most, even in log FAR), histogram bins, worst pairs of each kind
_ROC_POINTS, _HISTOGRAM_BINS, _HARDEST = 400, 80, 8


@dataclass(frozen=True)
class TenFold:
    """Ten-fold result: accuracy and std in [0, 1]; thresholds [10] as squared distances, one per fold; fold_accuracy [10]."""

    accuracy: float
    std: float
    thresholds: np.ndarray
    fold_accuracy: np.ndarray


def normalise(embeddings: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float64 [N, d]; a zero row stays zero, as sklearn's `normalize` leaves it.

    Raises:
        UserError: NaN or infinite values, with the number of bad rows.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise diverged(int(bad.sum()), len(rows), "embeddings")
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.where(norms == 0, 1.0, norms)[:, None]


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """`normalise` as float32 [N, d], in blocks: no float64 copy of a large set is made."""
    rows = np.empty(embeddings.shape, dtype=np.float32)
    for start in range(0, len(rows), 65536):
        rows[start : start + 65536] = normalise(embeddings[start : start + 65536])
    return rows


def diverged(bad: int, count: int, what: str) -> UserError:
    """The error for values that are not finite."""
    return UserError(
        f"{bad} of {count} {what} are NaN or infinite; the model has diverged, or its precision is too low"
    )


def squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared L2 distances of normalised pairs: [P, d], [P, d] -> float64 [P] in [0, 4]; the cosine is 1 - d/2."""
    return np.square(normalise(first) - normalise(second)).sum(1)


def ten_fold(distances: np.ndarray, issame: np.ndarray) -> TenFold:
    """Ten-fold accuracy as insightface computes it.

    Folds are consecutive, as `KFold(10)` cuts them.

    Args:
        distances: squared distances [P].
        issame: bool [P].

    Raises:
        UserError: fewer than ten pairs, or NaN distances.
    """
    distances, issame = _checked(distances, issame)
    if len(distances) < FOLDS:
        raise UserError(f"{len(distances)} pairs cannot be cut into {FOLDS} folds")
    # counts[f, k]: how many pairs of fold f are decided correctly at threshold k
    right = np.empty((FOLDS, len(THRESHOLDS)), dtype=np.int64)
    sizes = np.empty(FOLDS, dtype=np.int64)
    for fold, pairs in enumerate(np.array_split(np.arange(len(distances)), FOLDS)):
        near, far = np.sort(distances[pairs][issame[pairs]]), np.sort(distances[pairs][~issame[pairs]])
        # side="left" counts d < threshold, the protocol's strict comparison
        accepted = np.searchsorted(near, THRESHOLDS, side="left")
        false_accepted = np.searchsorted(far, THRESHOLDS, side="left")
        right[fold] = accepted + len(far) - false_accepted
        sizes[fold] = len(pairs)
    training = (right.sum(0) - right) / (sizes.sum() - sizes)[:, None]
    best = training.argmax(axis=1)
    accuracy = right[np.arange(FOLDS), best] / sizes
    return TenFold(float(accuracy.mean()), float(accuracy.std()), THRESHOLDS[best], accuracy)


def roc(cosines: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FAR, TAR and cosine threshold of every distinct threshold, falling thresholds (accept where cosine >= threshold); float64 [K] each."""
    cosines, issame = _checked(cosines, issame)
    from sklearn.metrics import roc_curve  # a fifth of a rank's start, which need not wait for it

    return roc_curve(issame, cosines, drop_intermediate=False)


def tar_at_far(
    far: np.ndarray, tar: np.ndarray, targets: tuple[float, ...] = FAR_TARGETS, *, negatives: int
) -> dict[str, float]:
    """The largest TAR with FAR <= target, for every target that `negatives` pairs can resolve."""
    return {
        f"{target:.0e}": float(tar[np.searchsorted(far, target * (1 + 1e-12), side="right") - 1])
        for target in resolved(targets, negatives)
    }


def resolved(targets: Sequence[float], count: int) -> list[float]:
    """The targets of an error rate that `count` comparisons can resolve: those that allow at least one error. The others are left out of figures."""
    return [target for target in targets if target * count * (1 + 1e-12) >= 1]


def summary(distances: np.ndarray, issame: np.ndarray) -> dict[str, Any]:
    """Everything that the report shows of one benchmark, as JSON values.

    Args:
        distances: squared L2 distances of normalised embeddings, [P].
        issame: bool [P].
    """
    folds = ten_fold(distances, issame)
    distances, issame = _checked(distances, issame)
    cosines = 1.0 - distances / 2.0
    far, tar, _ = roc(cosines, issame)
    positive, negative = cosines[issame], cosines[~issame]
    edges = np.linspace(-1.0, 1.0, _HISTOGRAM_BINS + 1)
    clipped = np.clip(cosines, -1.0, 1.0)
    kept = thin(far, _ROC_POINTS)
    order = np.argsort(cosines, kind="stable")
    worst_positive = order[issame[order]][:_HARDEST]
    worst_negative = order[~issame[order]][::-1][:_HARDEST]
    threshold = float(folds.thresholds.mean())
    return {
        "accuracy": folds.accuracy,
        "std": folds.std,
        "threshold": threshold,
        "cosine_threshold": 1.0 - threshold / 2.0,
        "fold_accuracy": folds.fold_accuracy.tolist(),
        "tar_at_far": tar_at_far(far, tar, negatives=len(negative)),
        "pairs": len(issame),
        "positive_pairs": len(positive),
        "positive_mean": float(positive.mean()),
        "negative_mean": float(negative.mean()),
        "roc": {"far": far[kept].tolist(), "tar": tar[kept].tolist()},
        "histogram": {
            "edges": edges.tolist(),
            "positive": np.histogram(clipped[issame], edges)[0].tolist(),
            "negative": np.histogram(clipped[~issame], edges)[0].tolist(),
        },
        "hardest": {
            "positive": [[int(pair), float(cosines[pair])] for pair in worst_positive],
            "negative": [[int(pair), float(cosines[pair])] for pair in worst_negative],
        },
    }


def thin(far: np.ndarray, points: int) -> np.ndarray:
    """Positions of at most `points` thresholds: the best TAR below each of a row of FARs that is even in log scale."""
    lowest = far[far > 0].min(initial=1.0)
    wanted = np.concatenate([[0.0], np.geomspace(lowest, 1.0, points - 1)])
    return np.unique(np.searchsorted(far, wanted * (1 + 1e-12), side="right") - 1)


def _checked(scores: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, issame = np.asarray(scores, dtype=np.float64), np.asarray(issame, dtype=bool)
    if scores.shape != issame.shape or scores.ndim != 1:
        raise UserError(f"{scores.shape} distances for {issame.shape} pairs; both must be one row of the same length")
    if not np.isfinite(scores).all():
        raise diverged(int((~np.isfinite(scores)).sum()), len(scores), "pair distances")
    if issame.all() or not issame.any():
        raise UserError("verification needs both positive and negative pairs")
    return scores, issame
