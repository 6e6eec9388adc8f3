"""Finds faults of a dataset from embeddings: wrong labels, one identity under two labels, repeated images, test identities.

Cosines of two models cannot be compared. So the thresholds are computed from the dataset, unless they are given.

Outlier:
    Its cosine to its own identity is below the threshold, and it is closer to another identity. The threshold is the
    median cosine to a random other identity plus 3 standard deviations. The second condition keeps images that are
    merely difficult.
Same person:
    Half way between two values: what nearest identities hardly ever reach (median plus 4 standard deviations), and what
    two halves of one identity reach nine times in ten.
Overlap with an evaluation set:
    The same threshold, computed for single images and centres.
Near duplicate:
    A cosine of 0.9 makes a candidate. The pixels decide: the correlation of 32 x 32 grey thumbnails, also mirrored.

Nothing is copied or deleted. The result is lists, and sample ids and labels for `lvtrain.datasets.subset.write_subset`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lvtrain.data.images import try_decode
from lvtrain.datasets.findings import Findings
from lvtrain.datasets.vectors import Centres, Vectors, neighbours, unit_rows
from lvtrain.errors import UserError

_NEIGHBOURS = 6
_SIDE = 32

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Limits:
    """Thresholds, cosines; None = computed from the data. `same_pixels` is a correlation."""

    outlier: float | None = None
    same_person: float | None = None
    overlap: float | None = None
    near_duplicate: float = 0.9
    same_pixels: float = 0.98

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not -1 <= value <= 1:
                raise UserError(f"{name.replace('_', ' ')} {value} is not a cosine; give a number from -1 to 1")


@dataclass(frozen=True)
class EvaluationSet:
    """A verification set: embeddings [m, d] of its images, and `read`, from image number to encoded image."""

    name: str
    embeddings: np.ndarray
    read: Read


def analyse(
    embeddings: np.ndarray,
    labels: np.ndarray,
    read: Read,
    *,
    limits: Limits | None = None,
    evaluation: list[EvaluationSet] | None = None,
) -> Findings:
    """Finds all the faults that the module describes.

    Args:
        embeddings: float [n, d] of all samples, by id, of any scale; may be a memory map.
        labels: int [n].
        read: from sample id to encoded image.
        limits: thresholds; None = computed from the data.
        evaluation: verification sets to compare with.

    Raises:
        UserError: shapes do not fit, there are too few identities for statistics, or the embeddings do not separate them.
    """
    given = limits or Limits()
    if embeddings.ndim != 2 or len(embeddings) != len(labels):
        raise UserError(
            f"embeddings have the shape {tuple(embeddings.shape)}, the dataset has {len(labels)} samples; embed this dataset again"
        )
    vectors = Vectors(embeddings, labels)
    if vectors.classes < 3:
        raise UserError(f"{vectors.classes} identities are too few for statistics; cleaning needs at least 3")
    usable = vectors.usable
    centres = Centres(vectors, usable)
    own = centres.own_cosines()
    outlier_limit = given.outlier if given.outlier is not None else centres.outlier_limit()
    lost = int((own < outlier_limit).sum())
    if lost > usable.sum() / 2:
        raise UserError(
            f"{lost} of {len(labels)} samples are as far from their own identity as from others; the embeddings are of another "
            f"dataset or of an untrained model (or give a lower --outlier than {outlier_limit:.2f})"
        )
    # centres are computed again without the outliers, so that many outliers of one identity do not hide each other
    own = Centres(vectors, usable & ~(own < outlier_limit)).own_cosines()
    outlying = usable & (own < outlier_limit)
    centres = Centres(vectors, usable & ~outlying)
    same_limit = given.same_person if given.same_person is not None else centres.same_person_limit()
    used = {"outlier": outlier_limit, "same_person": same_limit}
    used |= {"near_duplicate": given.near_duplicate, "same_pixels": given.same_pixels}
    findings = Findings(used, unusable=np.flatnonzero(~usable).tolist())
    _find_outliers(findings, centres, own, np.flatnonzero(outlying), at_any=given.outlier is not None)
    _find_same_person(findings, centres, same_limit)
    thumbnails = _Thumbnails(read)
    _find_duplicates(findings, vectors, thumbnails, given)
    if evaluation:
        findings.limits["overlap"] = given.overlap if given.overlap is not None else centres.overlap_limit(own)
        for part in evaluation:
            _find_overlap(findings, part, centres, thumbnails, given)
    return findings


def _find_outliers(findings: Findings, centres: Centres, own: np.ndarray, samples: np.ndarray, *, at_any: bool) -> None:
    """Adds the outliers among `samples`: those closer to another identity, or with `at_any` all of them."""
    if not len(samples):
        return
    labels = centres.vectors.labels
    cosines, found = centres.nearest(centres.vectors.unit[samples], 2)
    for sample, cosine, row in zip(samples.tolist(), cosines, found):
        other = 0 if row[0] != labels[sample] else 1
        if at_any or own[sample] < cosine[other]:
            findings.outliers.append(
                (sample, int(labels[sample]), float(own[sample]), int(row[other]), float(cosine[other]))
            )
    findings.outliers.sort(key=lambda outlier: outlier[2])


def _find_same_person(findings: Findings, centres: Centres, limit: float) -> None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    alive, unit = centres.alive, centres.unit[centres.alive]
    cosines, found = neighbours(unit, unit, _NEIGHBOURS)
    left = np.repeat(np.arange(len(alive)), found.shape[1])
    right, value = found.ravel(), cosines.ravel()
    linked = (value >= limit) & (left != right) & (right >= 0)
    left, right, value = left[linked], right[linked], value[linked]
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(alive), len(alive)))
    _, group = connected_components(graph, directed=False)
    for number in np.unique(group[left]):
        members = alive[np.flatnonzero(group == number)]
        findings.same_person.append((members.tolist(), float(value[group[left] == number].max())))
    findings.same_person.sort(key=lambda one: -one[1])


def _find_duplicates(findings: Findings, vectors: Vectors, thumbnails: _Thumbnails, limits: Limits) -> None:
    rows = np.flatnonzero(vectors.usable)
    cosines, found = neighbours(vectors.unit[rows], vectors.unit[rows], _NEIGHBOURS)
    pairs = np.stack([np.repeat(rows, found.shape[1]), rows[found.ravel()]], axis=1)
    likely = (cosines.ravel() >= limits.near_duplicate) & (pairs[:, 0] != pairs[:, 1]) & (found.ravel() >= 0)
    # either of two samples may be listed by the other one alone
    pairs = np.unique(np.sort(pairs[likely], axis=1), axis=0)
    repeated: set[int] = set()
    for first, second in pairs.tolist():
        if second not in repeated:
            correlation = thumbnails.correlation(first, second)
            if correlation >= limits.same_pixels:
                repeated.add(second)
                findings.duplicates.append((first, second, correlation))


def _find_overlap(
    findings: Findings, part: EvaluationSet, centres: Centres, thumbnails: _Thumbnails, limits: Limits
) -> None:
    vectors = centres.vectors
    queries, good = unit_rows(part.embeddings)
    if queries.shape[1] != vectors.unit.shape[1]:
        raise UserError(
            f"{part.name} was embedded in {queries.shape[1]} dimensions, the dataset in {vectors.unit.shape[1]}; use one model for both"
        )
    cosines, labels = centres.nearest(queries, 1)
    for image in np.flatnonzero((cosines[:, 0] >= findings.limits["overlap"]) & good).tolist():
        findings.overlaps.append((part.name, image, int(labels[image, 0]), float(cosines[image, 0])))
    rows = np.flatnonzero(vectors.usable)
    cosines, found = neighbours(queries, vectors.unit[rows], 1)
    theirs = _Thumbnails(part.read)
    for image in np.flatnonzero((cosines[:, 0] >= limits.near_duplicate) & good).tolist():
        sample = int(rows[found[image, 0]])
        correlation = _correlation(theirs.of(image), thumbnails.of(sample))
        if correlation >= limits.same_pixels:
            findings.repeated_images.append((part.name, image, sample, correlation))


class _Thumbnails:
    """Grey 32 x 32 thumbnails with mean 0 and length 1, made on demand and cached."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._made: dict[int, np.ndarray | None] = {}

    def of(self, sample: int) -> np.ndarray | None:
        if sample not in self._made:
            if len(self._made) > 200_000:
                self._made.clear()
            picture = try_decode(self._read(sample), upright=False)
            self._made[sample] = None if picture is None else _thumbnail(picture)
        return self._made[sample]

    def correlation(self, first: int, second: int) -> float:
        return _correlation(self.of(first), self.of(second))


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    small = np.asarray(
        Image.fromarray(picture).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32
    )
    small = small - small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def _correlation(first: np.ndarray | None, second: np.ndarray | None) -> float:
    if first is None or second is None:
        return -1.0
    return float(max((first * second).sum(), (first * second[:, ::-1]).sum()))
