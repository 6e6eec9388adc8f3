"""Error against discarded share: does a quality value know which images will be refused?

The error-versus-discard characteristic of ISO/IEC 29794-1 (Grother and Tabassi, 2007, "Performance of biometric quality measures"; definitions as in
Schlett et al., 2023, arXiv 2303.13294). The threshold is fixed before anything is discarded. A genuine comparison has the lower quality of its two
images. Comparisons are discarded from the lowest quality up, those of equal quality together; FNMR is the share of the rest that is refused. The
curve is a step function: at a share r, as many are discarded as stay within r.

`area` is the mean FNMR over shares from 0 to LIMIT. A quality value that says nothing keeps `area` at the FNMR of all comparisons; one that knows
every error has `area_best`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SHARES = np.arange(0, 51) / 100
LIMIT = 0.2


def error_versus_discard(genuine: np.ndarray, quality: np.ndarray, at: Mapping[str, float]) -> dict[str, Any]:
    """JSON values of the curve.

    Args:
        genuine: cosines of genuine comparisons [P].
        quality: the lower quality of each comparison's two images [P].
        at: FMR -> threshold.

    Returns:
        quality, comparisons, discarded (SHARES), limit; at: FMR -> {threshold, fnmr at every share, area, area_best}.
    """
    order = np.argsort(quality, kind="stable")
    ordered, count = quality[order], len(order)
    # where a new quality begins, everything before it can be discarded
    cuts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    curves = {}
    for fmr, threshold in at.items():
        refused = (genuine < threshold)[order]
        left = refused.sum() - np.append(0, np.cumsum(refused))[cuts]
        fnmr = left / (count - cuts)
        curves[fmr] = {
            "threshold": float(threshold),
            "fnmr": fnmr[np.searchsorted(cuts, SHARES * count * (1 + 1e-12), side="right") - 1].tolist(),
            "area": _mean(cuts / count, fnmr),
            "area_best": _best(float(refused.mean())),
        }
    return {
        "quality": "embedding norm",
        "comparisons": count,
        "discarded": SHARES.tolist(),
        "limit": LIMIT,
        "at": curves,
    }


def genuine_pairs(rows: np.ndarray, labels: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines float32 [P] of all genuine pairs of a labelled set, and the lower quality of each.

    Args:
        rows: unit rows [N, d].
        labels: int [N].
        quality: [N].
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(labels[order][1:] != labels[order][:-1]) + 1
    cosines, lower = [], []
    for mine in np.split(order, starts):
        if len(mine) > 1:
            one, other = np.triu_indices(len(mine), 1)
            of_one = rows[mine].astype(np.float32)
            cosines.append((of_one @ of_one.T)[one, other])
            lower.append(np.minimum(quality[mine][one], quality[mine][other]))
    return np.concatenate(cosines), np.concatenate(lower)


def _mean(starts: np.ndarray, values: np.ndarray) -> float:
    """Mean over [0, LIMIT] of the step function that has `values` from `starts` on."""
    ends = np.minimum(np.append(starts[1:], 1.0), LIMIT)
    return float((np.clip(ends - starts, 0, None) * values).sum() / LIMIT)


def _best(start: float) -> float:
    """Mean over [0, LIMIT] of (start - r) / (1 - r), as long as it is positive: every discarded comparison is an error."""
    end = min(start, LIMIT)
    # the integral of (start - r) / (1 - r) from 0 to end
    return float((end + (1 - start) * np.log1p(-end)) / LIMIT) if end < 1 else 0.0
