"""The cosine threshold at a false match rate f, with an interval.

- From pairs alone (a `.bin` set): the number of impostor scores above the true threshold is Binomial(n, f), so two order
  statistics of the scores enclose it.
- From a labelled set: a bootstrap over identities. Pairs share images and identities, so they are not independent;
  identities are. Identities are drawn with replacement (Poisson weights), and a pair weighs the product of its two
  identities' weights. This interval is wider.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binom

from lvtrain.errors import UserError
from lvtrain.evaluation.verification import normalise, resolved

TARGETS = (1e-3, 1e-4, 1e-5, 1e-6)
_CONFIDENCE = 0.95  # of the thresholds' intervals
_TAILS = [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]
# a larger labelled set is cut to whole identities, because the bootstrap needs single pairs
MAX_IMAGES = 20_000


def from_pairs(cosines: np.ndarray, issame: np.ndarray, *, targets: tuple[float, ...] = TARGETS) -> dict[str, Any]:
    """Thresholds from the scores of pairs [P]. Targets with fewer than one expected false match are listed as unresolved.

    Returns:
        JSON values: per target threshold, low, high (its interval), fnmr (positives refused at the threshold), impostor_pairs.

    Raises:
        UserError: no genuine pairs, or so few impostor pairs that no target is resolved.
    """
    cosines, issame = np.asarray(cosines, dtype=np.float64), np.asarray(issame, dtype=bool)
    impostors, genuine = np.sort(cosines[~issame])[::-1], cosines[issame]
    _check(len(impostors), genuine, targets)
    results = _head(len(impostors), genuine, targets, "order statistics of independent pairs")
    for target in resolved(targets, len(impostors)):
        fewest, most = binom.ppf(_TAILS, len(impostors), target).astype(int)
        threshold = _after(impostors, int(target * len(impostors) * (1 + 1e-12)))
        # few impostors above it: the threshold is high; many: low
        results["thresholds"][f"{target:.0e}"] = _entry(
            threshold, _after(impostors, most), _after(impostors, fewest), genuine
        )
    return results


def from_people(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    targets: tuple[float, ...] = TARGETS,
    replicates: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """Thresholds from all pairs of a labelled set, [N, d] and [N], with an interval from a bootstrap over identities.

    If there are more than MAX_IMAGES images, a random choice of whole identities is used; the result says how many images.

    Raises:
        UserError: NaN embeddings, fewer than 20 identities, no positive pair, too few impostor pairs for any target.
    """
    generator = np.random.default_rng(seed)
    _, identities = np.unique(labels, return_inverse=True)
    if identities.max() + 1 < 20:
        raise UserError(
            f"a threshold's interval cannot be found from {identities.max() + 1} identities; 20 or more are needed"
        )
    kept = _whole_identities(identities, generator)
    rows, identities = normalise(embeddings[kept]).astype(np.float32), identities[kept]
    order = np.argsort(identities, kind="stable")
    rows, identities = rows[order], identities[order]
    impostors, genuine, first, second, negatives = _tails(rows, identities, 3 * max(targets))
    _check(negatives, genuine, targets)
    results = _head(negatives, genuine, targets, "bootstrap over identities")
    results.update(images=len(rows), people=len(np.unique(identities)))
    possible = resolved(targets, negatives)
    order = np.argsort(-impostors, kind="stable")
    impostors, first, second = impostors[order], first[order], second[order]
    sizes = np.bincount(identities, minlength=identities.max() + 1).astype(np.float64)
    thresholds = np.empty((replicates, len(possible)))
    for replicate in range(replicates):
        weight = generator.poisson(1.0, len(sizes)).astype(np.float64)
        above = np.cumsum(weight[first] * weight[second])
        # all impostor pairs of the drawn identities: half of (sum of weighted sizes) squared minus each identity with itself
        all_pairs = ((weight * sizes).sum() ** 2 - ((weight * sizes) ** 2).sum()) / 2
        positions = np.searchsorted(above, np.array(possible) * all_pairs * (1 + 1e-12), side="right")
        thresholds[replicate] = [_after(impostors, int(position)) for position in positions]
    for column, target in enumerate(possible):
        threshold = _after(impostors, int(target * negatives * (1 + 1e-12)))
        low, high = np.quantile(thresholds[:, column], _TAILS)
        results["thresholds"][f"{target:.0e}"] = _entry(threshold, float(low), float(high), genuine)
    return results


def _after(falling: np.ndarray, accepted: int) -> float:
    """The lowest score that accepts at most `accepted` impostors: just above the first one too many."""
    if accepted >= len(falling):
        return float(falling[-1])
    return float(np.nextafter(falling[accepted], 2.0))


def _entry(threshold: float, low: float, high: float, genuine: np.ndarray) -> dict[str, float]:
    return {"threshold": threshold, "low": low, "high": high, "fnmr": float((genuine < threshold).mean())}


def _head(impostors: int, genuine: np.ndarray, targets: tuple[float, ...], method: str) -> dict[str, Any]:
    possible = resolved(targets, impostors)
    return {
        "method": method,
        "confidence": _CONFIDENCE,
        "impostor_pairs": impostors,
        "genuine_pairs": len(genuine),
        "thresholds": {},
        "unresolved": [f"{target:.0e}" for target in targets if target not in possible],
    }


def pairs_needed(target: float) -> int:
    """With fewer impostor pairs than this, a false match rate of `target` has less than one expected false match."""
    return round(1 / target)


def _check(impostors: int, genuine: np.ndarray, targets: tuple[float, ...]) -> None:
    if not impostors or not len(genuine):
        raise UserError("calibration needs both genuine and impostor pairs")
    if not resolved(targets, impostors):
        needed = ", ".join(f"{target:.0e} needs {pairs_needed(target):,}" for target in targets)
        raise UserError(
            f"{impostors:,} impostor pairs are too few for a threshold: FMR {needed}; calibrate on a larger set"
        )


def _whole_identities(identities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Positions of the images of randomly chosen identities, at most MAX_IMAGES."""
    sizes = np.bincount(identities)
    chosen = generator.permutation(len(sizes))
    chosen = chosen[np.cumsum(sizes[chosen]) <= MAX_IMAGES]
    return np.flatnonzero(np.isin(identities, chosen))


def _tails(
    rows: np.ndarray, identities: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """The highest `share` of impostor scores with the identities of each, all genuine scores, and the number of impostor pairs."""
    sizes = np.bincount(identities)
    total = len(rows) * (len(rows) - 1) // 2 - int((sizes * (sizes - 1) // 2).sum())
    wanted = max(1000, int(share * total))
    impostors, genuine = np.empty(0, np.float32), []
    ends = np.empty((0, 2), np.int64)
    floor, tile = -2.0, 2048
    for start in range(0, len(rows), tile):
        scores = rows[start : start + tile] @ rows[start:].T
        later = np.arange(start, len(rows))[None, :] > np.arange(start, min(start + tile, len(rows)))[:, None]
        same = identities[start : start + tile, None] == identities[None, start:]
        genuine.append(scores[later & same])
        one, two = np.nonzero(later & ~same & (scores > floor))
        impostors = np.concatenate([impostors, scores[one, two]])
        ends = np.concatenate([ends, np.stack([identities[start + one], identities[start + two]], axis=1)])
        if len(impostors) > 2 * wanted:
            best = np.argpartition(-impostors, wanted)[:wanted]
            impostors, ends = impostors[best], ends[best]
            floor = float(impostors.min())
    return impostors.astype(np.float64), np.concatenate(genuine), ends[:, 0], ends[:, 1], total
