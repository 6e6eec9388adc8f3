"""Embeddings of a dataset, the centres of its identities, and the thresholds that follow from their cosines.

Standard deviations are estimated from the median deviation, because faults lie at the far ends of the distributions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lvtrain import randomness
from lvtrain.errors import UserError

_CHUNK = 1 << 16
_EXACT = 100_000  # up to this many vectors the neighbour search is exhaustive
_SAMPLED = 200_000  # cosines drawn to estimate a threshold


class Vectors:
    """The embeddings of all samples, by id.

    Args:
        embeddings: float [n, d], of any scale; may be a memory map.
        labels: int [n].

    Attributes:
        unit: float32 [n, d], of length 1; zero where not usable.
        usable: bool [n]; False where an embedding is zero or not finite.
        classes: number of identities.
    """

    def __init__(self, embeddings: np.ndarray, labels: np.ndarray) -> None:
        self.labels, self.classes = labels, int(labels.max()) + 1
        self.unit, self.usable = unit_rows(embeddings)

    def sums(self, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the members (bool [n]) of each identity, float32 [classes, d], and their number [classes]."""
        from scipy.sparse import csr_array

        sums = np.zeros((self.classes, self.unit.shape[1]), dtype=np.float32)
        for start in range(0, len(self.unit), _CHUNK):
            part = self.labels[start : start + _CHUNK]
            weight = member[start : start + _CHUNK].astype(np.float32)
            picker = csr_array((weight, (part, np.arange(len(part)))), shape=(self.classes, len(part)))
            sums += picker @ self.unit[start : start + _CHUNK]
        return sums, np.bincount(self.labels[member], minlength=self.classes)


class Centres:
    """The centre of each identity, from its samples in `member`.

    Attributes:
        member: bool [n].
        unit: float32 [classes, d], of length 1.
        alive: int64, the identities that have members.
    """

    def __init__(self, vectors: Vectors, member: np.ndarray) -> None:
        self.vectors, self.member = vectors, member
        self._sums, self._counts = vectors.sums(member)
        self.unit = normalised(self._sums)
        self.alive = np.flatnonzero(self._counts > 0)

    def own_cosines(self) -> np.ndarray:
        """Cosine of each sample to the mean of the other members of its identity, float32 [n]; NaN where there are none."""
        unit, labels = self.vectors.unit, self.vectors.labels
        cosine = np.full(len(unit), np.nan, dtype=np.float32)
        squares = (self._sums**2).sum(axis=1)
        for start in range(0, len(unit), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            label, inside = labels[chunk], self.member[chunk].astype(np.float32)
            dot = (unit[chunk] * self._sums[label]).sum(axis=1)
            # removing a member e from the sum s: e.(s - e) = e.s - 1 and |s - e|^2 = |s|^2 - 2 e.s + 1
            length = np.sqrt(np.maximum(squares[label] - inside * (2 * dot - 1), 1e-12))
            others = self._counts[label] - self.member[chunk]
            cosine[chunk] = np.where(others > 0, (dot - inside) / length, np.nan)
        return cosine

    def nearest(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Highest cosines [q, count] of each query to centres, and their labels."""
        cosines, rows = neighbours(queries, self.unit[self.alive], count)
        return cosines, self.alive[rows]

    # --------------------------------------------------------------------------------------------------------- thresholds

    def outlier_limit(self) -> float:
        """Median cosine to a random other identity, plus 3 standard deviations."""
        rows = np.flatnonzero(self.member)
        number = np.arange(_SAMPLED)
        picked = rows[(randomness.uniform(0, "clean/rows", number) * len(rows)).astype(np.int64)]
        further = (randomness.uniform(0, "clean/other", number) * (self.vectors.classes - 1)).astype(np.int64)
        other = (self.vectors.labels[picked] + 1 + further) % self.vectors.classes
        chunks = (slice(start, start + _CHUNK) for start in range(0, _SAMPLED, _CHUNK))
        cosines = [(self.vectors.unit[picked[chunk]] * self.unit[other[chunk]]).sum(axis=1) for chunk in chunks]
        return _usual(np.concatenate(cosines), 3)

    def same_person_limit(self) -> float:
        """Between the cosines of nearest identities, and those of two halves of one identity."""
        half = randomness.bits(0, "clean/half", np.arange(len(self.member))) & np.uint64(1) == 1
        one, one_count = self.vectors.sums(self.member & half)
        two, two_count = self.vectors.sums(self.member & ~half)
        both = (one_count >= 2) & (two_count >= 2)
        halves = (normalised(one[both]) * normalised(two[both])).sum(axis=1)
        if not len(halves):
            raise UserError(
                "no identity has four images, so the limit for one person cannot be computed; give --same-person"
            )
        return _between(self.nearest(self.unit[self.alive], 2)[0][:, 1], halves)

    def overlap_limit(self, own: np.ndarray) -> float:
        """The same for single images and centres; `own` [n] are the images' cosines to their own."""
        labels = self.vectors.labels
        rows = np.flatnonzero(self.member & np.isfinite(own))
        rows = rows[np.unique((randomness.uniform(0, "clean/overlap", np.arange(20_000)) * len(rows)).astype(np.int64))]
        cosines, found = self.nearest(self.vectors.unit[rows], 2)
        strange = np.where(found[:, 0] == labels[rows], cosines[:, 1], cosines[:, 0])
        return _between(strange, own[rows])


def _usual(cosines: np.ndarray, deviations: float) -> float:
    """Median plus `deviations` standard deviations, estimated from the median deviation."""
    middle = float(np.median(cosines))
    return middle + deviations * 1.4826 * float(np.median(np.abs(cosines - middle)))


def _between(different: np.ndarray, same: np.ndarray) -> float:
    """A threshold between the cosines of different identities and those of the same one.

    It lies above the first, and half way to the value that nine in ten of the second reach, if that is higher.
    """
    guard = _usual(different, 4)
    return max(guard, (guard + float(np.quantile(same, 0.1))) / 2)


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows [k, d] of length 1, float32."""
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def unit_rows(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 [n, d] (zero where unusable), and which are usable, bool [n]."""
    unit = np.zeros(embeddings.shape, dtype=np.float32)
    usable = np.zeros(len(embeddings), dtype=bool)
    for start in range(0, len(embeddings), _CHUNK):
        part = np.asarray(embeddings[start : start + _CHUNK], dtype=np.float32)
        length = np.linalg.norm(part, axis=1)
        good = np.isfinite(length) & (length > 0)
        usable[start : start + len(part)] = good
        unit[start : start + len(part)][good] = part[good] / length[good, None]
    return unit, usable


def neighbours(queries: np.ndarray, base: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Highest cosines [q, count] of each query and their rows in `base`. All vectors are unit float32.

    Up to 100 000 vectors the search is exhaustive, beyond that it uses an inverted file.

    Raises:
        UserError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("cleaning searches with faiss; install lvtrain[tools]") from None
    count = min(count, len(base))
    if len(base) <= _EXACT:
        index: Any = faiss.IndexFlatIP(base.shape[1])
    else:
        lists = int(4 * len(base) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(base.shape[1]), base.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.train(base[:: max(1, len(base) // (64 * lists))])
        index.nprobe = min(lists, 48)
    index.add(np.ascontiguousarray(base))
    cosines, rows = index.search(np.ascontiguousarray(queries), count)
    return cosines, rows
