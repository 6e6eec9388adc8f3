"""Identification, one against many: rank-N, and TPIR at FPIR, as ISO/IEC 19795-1 and NIST's FRTE 1:N define them.

The gallery holds one template an identity: the mean of the unit embeddings of its first images. Every other image is a probe.

- Mated search: the probe against the whole gallery. Its rank is 1 + how many other identities score at least as high as its own.
- Unmated search: the same probe against the gallery without its identity, so that every image serves. An identity with too few images to
  be enrolled has unmated searches only.

FPIR(t) is the share of unmated searches whose best score is at least t. TPIR(t) is the share of mated searches whose own identity comes first,
with a score of at least t. It is 1 - FNIR(t) with R = 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.verification import normalise

RANKS = (1, 5, 10, 20)
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
_CHUNK = 4096


def identify(embeddings: np.ndarray, labels: np.ndarray, *, enrolled: int = 1) -> dict[str, Any]:
    """Rank-N and TPIR at FPIR of a labelled set.

    Args:
        embeddings: [N, d], any norm.
        labels: int [N], of the identities; the first images of each, in this order, are enrolled.
        enrolled: images an identity in the gallery.

    Returns:
        JSON values: gallery (identities), mated and unmated (searches), rank: N -> share, and tpir_at_fpir: target -> {tpir, fpir,
        threshold}. Ranks that the gallery does not have, and FPIRs that the unmated searches cannot resolve, are left out.

    Raises:
        UserError: NaN embeddings, or fewer than two identities with more images than are enrolled.
    """
    rows = normalise(embeddings)
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable")
    position = np.empty(len(labels), dtype=np.int64)  # of an image among those of its identity
    ordered = labels[order]
    position[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered, side="left")
    names, counts = np.unique(labels, return_counts=True)
    known = names[counts > enrolled]
    if len(known) < 2:
        raise UserError(
            f"identification needs two identities with more than {enrolled} image(s), to enrol and to search for; there are {len(known)}"
        )
    is_known = np.isin(labels, known)
    in_gallery = is_known & (position < enrolled)
    templates = np.zeros((len(known), rows.shape[1]), dtype=np.float32)
    np.add.at(templates, np.searchsorted(known, labels[in_gallery]), rows[in_gallery])
    templates = normalise(templates)
    probes = np.flatnonzero(~in_gallery)
    own = np.where(is_known[probes], np.searchsorted(known, labels[probes]).clip(max=len(known) - 1), -1)
    score, rank, best_other = _search(rows[probes], templates, own)
    mated = own >= 0
    return {
        "gallery": len(known),
        "enrolled": enrolled,
        "mated": int(mated.sum()),
        "unmated": len(probes),
        "rank": {str(n): float((rank[mated] <= n).mean()) for n in RANKS if n <= len(known)},
        "tpir_at_fpir": _rates(np.where(rank[mated] == 1, score[mated], -np.inf), best_other),
    }


def _search(probes: np.ndarray, templates: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each probe's cosine to its own template, its rank, and the highest cosine to another; NaN and 0 for a probe without one."""
    score = np.full(len(probes), np.nan, dtype=np.float32)
    rank = np.zeros(len(probes), dtype=np.int64)
    other = np.empty(len(probes), dtype=np.float32)
    for start in range(0, len(probes), _CHUNK):
        part = slice(start, start + _CHUNK)
        cosines, mates = probes[part] @ templates.T, own[part]
        has = np.flatnonzero(mates >= 0)
        score[part][has] = cosines[has, mates[has]]
        cosines[has, mates[has]] = -np.inf
        rank[part][has] = 1 + (cosines[has] >= score[part][has][:, None]).sum(axis=1)
        other[part] = cosines.max(axis=1)
    return score, rank, other


def _rates(mated: np.ndarray, unmated: np.ndarray) -> dict[str, dict[str, float]]:
    """The largest TPIR of any threshold with FPIR at most the target."""
    falling = np.sort(unmated)[::-1]
    found = {}
    for target in TARGETS:
        allowed = int(np.floor(target * len(falling) * (1 + 1e-12)))
        if allowed < 1:
            continue
        threshold = np.nextafter(falling[allowed], np.float32(np.inf)) if allowed < len(falling) else falling[-1]
        found[f"{target:.0e}"] = {
            "tpir": float((mated >= threshold).mean()),
            "fpir": float((unmated >= threshold).mean()),
            "threshold": float(threshold),
        }
    return found
