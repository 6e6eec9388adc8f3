"""Identification, one against many: rank-N, and TPIR at FPIR, as ISO/IEC 19795-1 and NIST's FRTE 1:N define them.

- Mated search: the probe's identity is in the gallery. Its rank is 1 + how many gallery entries of other identities score at least as
  high as the best entry of its own. So a tie counts against the model.
- Unmated search: the probe's identity is not in the gallery.

FPIR(t) is the share of unmated searches whose best score is at least t. TPIR(t) is the share of mated searches whose own identity scores at
least t and has a rank of at most R. It is 1 - FNIR(t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.verification import normalise

RANKS = (1, 5, 10, 20)
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
_CELLS = 1 << 25  # scores held at once


@dataclass(frozen=True)
class Searches:
    """Every probe against one gallery; arrays over probes [P].

    Attributes:
        is_mated: bool; the probe's identity is in the gallery.
        own: float32, the best score of an entry of the probe's identity; NaN for a probe that is not mated.
        rank: int64, of the probe's identity, from 1; 0 for a probe that is not mated.
        other: float32, the best score of an entry of another identity; -inf if there is none.
    """

    is_mated: np.ndarray
    own: np.ndarray
    rank: np.ndarray
    other: np.ndarray

    def rank_shares(self, ranks: tuple[int, ...], entries: int) -> dict[str, float]:
        """Rank N -> the share of mated searches with a rank of at most N, for every N that a gallery of `entries` has."""
        found = self.rank[self.is_mated]
        return {str(n): float((found <= n).mean()) for n in ranks if n <= entries}

    def tpir_at_fpir(
        self, targets: tuple[float, ...], *, unmated: np.ndarray | None = None, most: int | None = None
    ) -> dict[str, dict[str, float]]:
        """The largest TPIR of any threshold with FPIR at most the target, for every target that the unmated searches can resolve.

        Args:
            targets: FPIRs.
            unmated: best scores of the unmated searches; by default those of the probes that are not mated.
            most: R, the rank up to which a mated search counts; None for any rank.
        """
        mated = self.own[self.is_mated]
        if most is not None:
            mated = np.where(self.rank[self.is_mated] <= most, mated, -np.inf)
        return _rates(mated, self.other[~self.is_mated] if unmated is None else unmated, targets)


def search(probes: np.ndarray, probe_labels: np.ndarray, gallery: np.ndarray, gallery_labels: np.ndarray) -> Searches:
    """Searches every probe in the gallery. Memory is that of 2^25 scores above the rows.

    Args:
        probes: unit rows [P, d].
        probe_labels: int [P], their identities.
        gallery: unit rows [G, d]; an identity may have several.
        gallery_labels: int [G].
    """
    rows, entries = probes.astype(np.float32), gallery.astype(np.float32)
    is_mated = np.isin(probe_labels, gallery_labels)
    own = np.full(len(rows), np.nan, dtype=np.float32)
    rank = np.zeros(len(rows), dtype=np.int64)
    other = np.empty(len(rows), dtype=np.float32)
    step = max(1, _CELLS // max(1, len(entries)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scores = rows[part] @ entries.T
        same = np.asarray(probe_labels)[part, None] == np.asarray(gallery_labels)[None, :]
        best = np.where(same, scores, -np.inf).max(axis=1)
        scores[same] = -np.inf
        has = is_mated[part]
        own[part][has] = best[has]
        rank[part][has] = 1 + (scores[has] >= best[has, None]).sum(axis=1)
        other[part] = scores.max(axis=1)
    return Searches(is_mated, own, rank, other)


def identify(embeddings: np.ndarray, labels: np.ndarray, *, enrolled: int = 1) -> dict[str, Any]:
    """Rank-N and TPIR at FPIR of a labelled set.

    The gallery holds one template an identity: the mean of the unit embeddings of its first images. Every other image is a probe. For FPIR,
    each probe is also searched for in the gallery without its identity, so that every image serves. An identity with too few images to be
    enrolled has unmated searches only. TPIR counts rank 1.

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
    in_gallery = np.isin(labels, known) & (position < enrolled)
    templates = np.zeros((len(known), rows.shape[1]), dtype=np.float32)
    np.add.at(templates, np.searchsorted(known, labels[in_gallery]), rows[in_gallery])
    found = search(rows[~in_gallery], labels[~in_gallery], normalise(templates), known)
    return {
        "gallery": len(known),
        "enrolled": enrolled,
        "mated": int(found.is_mated.sum()),
        "unmated": len(found.other),
        "rank": found.rank_shares(RANKS, len(known)),
        "tpir_at_fpir": found.tpir_at_fpir(TARGETS, unmated=found.other, most=1),
    }


def _rates(mated: np.ndarray, unmated: np.ndarray, targets: tuple[float, ...]) -> dict[str, dict[str, float]]:
    falling = np.sort(unmated)[::-1]
    found = {}
    for target in targets:
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
