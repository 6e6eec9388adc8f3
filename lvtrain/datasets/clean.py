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

Standard deviations are estimated from the median deviation, because the faults lie at the far ends of these
distributions.

Nothing is copied or deleted. The result is lists, and sample ids and labels for `lvtrain.datasets.subset.write_subset`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lvtrain import randomness
from lvtrain.data.subset import DROPPED
from lvtrain.datasets.contact_sheet import decode
from lvtrain.errors import UserError

_CHUNK = 1 << 16
_EXACT = 100_000  # up to this many vectors the neighbour search is exhaustive
_NEIGHBOURS = 6
_SAMPLED = 200_000  # cosines drawn to estimate a threshold
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


@dataclass
class Findings:
    """What was found. Sample ids and labels are those of the whole dataset.

    Attributes:
        outliers: (sample, label, cosine to its own centre, label it looks most like, cosine to that one's centre).
        same_person: groups of labels that are one identity, with the highest cosine between their centres.
        duplicates: (kept sample, repeated sample, pixel correlation), the smaller id kept.
        overlaps: (evaluation set, image number in it, label, cosine to its centre).
        repeated_images: (evaluation set, image number, sample, pixel correlation).
        unusable: samples whose embedding is zero or not finite.
    """

    limits: dict[str, float]
    outliers: list[tuple[int, int, float, int, float]] = field(default_factory=list)
    same_person: list[tuple[list[int], float]] = field(default_factory=list)
    duplicates: list[tuple[int, int, float]] = field(default_factory=list)
    overlaps: list[tuple[str, int, int, float]] = field(default_factory=list)
    repeated_images: list[tuple[str, int, int, float]] = field(default_factory=list)
    unusable: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return {
            "outliers": len(self.outliers),
            "same_person_groups": len(self.same_person),
            "near_duplicates": len(self.duplicates),
            "overlapping_identities": len({label for _, _, label, _ in self.overlaps}),
            "images_of_evaluation_sets": len(self.repeated_images),
            "unusable_embeddings": len(self.unusable),
        }

    def as_json(self, names: list[str]) -> dict[str, Any]:
        """The lists as JSON objects with named values; `names[label]` is an identity's name."""
        return {
            "limits": self.limits,
            "outliers": [
                {"sample": sample, "label": label, "identity": names[label], "cosine": cosine}
                | {"closest_label": other, "closest_identity": names[other], "closest_cosine": other_cosine}
                for sample, label, cosine, other, other_cosine in self.outliers
            ],
            "same_person": [
                {"identities": [{"label": label, "identity": names[label]} for label in group], "cosine": cosine}
                for group, cosine in self.same_person
            ],
            "duplicates": [
                {"kept_sample": first, "repeated_sample": second, "correlation": correlation}
                for first, second, correlation in self.duplicates
            ],
            "overlaps": [
                {"evaluation_set": name, "image": image, "label": label, "identity": names[label], "cosine": cosine}
                for name, image, label, cosine in self.overlaps
            ],
            "repeated_images": [
                {"evaluation_set": name, "image": image, "sample": sample, "correlation": correlation}
                for name, image, sample, correlation in self.repeated_images
            ],
            "unusable": [{"sample": sample} for sample in self.unusable],
        }


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
    classes = int(labels.max()) + 1
    if classes < 3:
        raise UserError(f"{classes} identities are too few for statistics; cleaning needs at least 3")
    unit, usable = _unit(embeddings)
    sums, counts = _sums(unit, labels, classes, usable)
    own = _own_cosine(unit, labels, sums, counts, member=usable)
    outlier_limit = given.outlier if given.outlier is not None else _outlier_limit(unit, labels, sums, usable)
    lost = int((own < outlier_limit).sum())
    if lost > usable.sum() / 2:
        raise UserError(
            f"{lost} of {len(labels)} samples are as far from their own identity as from others; the embeddings are of another "
            f"dataset or of an untrained model (or give a lower --outlier than {outlier_limit:.2f})"
        )
    # centres are computed again without the outliers, so that many outliers of one identity do not hide each other
    member = usable & ~(own < outlier_limit)
    core, core_counts = _sums(unit, labels, classes, member)
    own = _own_cosine(unit, labels, core, core_counts, member=member)
    outlying = usable & (own < outlier_limit)
    member = usable & ~outlying
    core, core_counts = _sums(unit, labels, classes, member)
    centres = _normalised(core)
    alive = np.flatnonzero(core_counts > 0)
    same_limit = (
        given.same_person
        if given.same_person is not None
        else _same_person_limit(unit, labels, member, classes, centres[alive])
    )
    used = {
        "outlier": outlier_limit,
        "same_person": same_limit,
        "near_duplicate": given.near_duplicate,
        "same_pixels": given.same_pixels,
    }
    findings = Findings(used, unusable=np.flatnonzero(~usable).tolist())
    _find_outliers(
        findings, unit, labels, own, np.flatnonzero(outlying), centres, alive, at_any=given.outlier is not None
    )
    _find_same_person(findings, centres, alive, same_limit)
    thumbnails = _Thumbnails(read)
    _find_duplicates(findings, unit, usable, thumbnails, given)
    if evaluation:
        limit = (
            given.overlap if given.overlap is not None else _overlap_limit(unit, labels, own, member, centres, alive)
        )
        findings.limits["overlap"] = limit
        for part in evaluation:
            _find_overlap(findings, part, unit, usable, centres, alive, thumbnails, limit, given)
    return findings


def choose(
    findings: Findings, labels: np.ndarray, classes: int, *, same_person: str = "merge", min_images: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the samples to keep. Leaves out outliers, repeats, unusable samples and identities of an evaluation set.

    Args:
        findings: of `analyse`.
        labels: int [n] of all samples.
        classes: number of identities.
        same_person: `merge` each group under one label, `drop` all but its largest identity, or `keep` them apart.
        min_images: identities with fewer images left are dropped.

    Returns:
        Sample ids int64 to keep, and the new label of each identity, uint32 [classes] (`DROPPED` if it is left out).
    """
    keep = np.ones(len(labels), dtype=bool)
    keep[[sample for sample, *_ in findings.outliers]] = False
    keep[[sample for _, sample, _ in findings.duplicates]] = False
    keep[[sample for _, _, sample, _ in findings.repeated_images]] = False
    keep[findings.unusable] = False
    merged = np.arange(classes)
    lost = np.zeros(classes, dtype=bool)
    lost[[label for _, _, label, _ in findings.overlaps]] = True
    images = np.bincount(labels[keep], minlength=classes)
    for group, _ in findings.same_person:
        if same_person == "merge":
            merged[group] = min(group)
            lost[group] |= lost[group].any()
        elif same_person == "drop":
            lost[[label for label in group if label != max(group, key=lambda one: (images[one], -one))]] = True
    keep &= ~lost[labels]
    images = np.bincount(merged[labels[keep]], minlength=classes)
    enough = images[merged] >= max(min_images, 1)
    keep &= enough[labels]
    used = np.unique(merged[labels[keep]])
    label_of = np.full(classes, DROPPED, dtype=np.uint32)
    place = np.searchsorted(used, merged)
    valid = (
        (place < len(used)) & (used[np.minimum(place, len(used) - 1)] == merged) & ~lost
        if len(used)
        else np.zeros(classes, bool)
    )
    label_of[valid] = place[valid]
    return np.flatnonzero(keep), label_of


# ------------------------------------------------------------------------------------------------------------- cosines and centres


def _normalised(rows: np.ndarray) -> np.ndarray:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _unit(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _sums(unit: np.ndarray, labels: np.ndarray, classes: int, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the members of each identity, float32 [classes, d], and their number [classes]."""
    from scipy.sparse import csr_array

    sums = np.zeros((classes, unit.shape[1]), dtype=np.float32)
    for start in range(0, len(unit), _CHUNK):
        part = labels[start : start + _CHUNK]
        weight = member[start : start + _CHUNK].astype(np.float32)
        picker = csr_array((weight, (part, np.arange(len(part)))), shape=(classes, len(part)))
        sums += picker @ unit[start : start + _CHUNK]
    return sums, np.bincount(labels[member], minlength=classes)


def _own_cosine(
    unit: np.ndarray, labels: np.ndarray, sums: np.ndarray, counts: np.ndarray, *, member: np.ndarray
) -> np.ndarray:
    """Cosine of each sample to the mean of the other members of its identity, float32 [n]; NaN where there are none."""
    cosine = np.full(len(unit), np.nan, dtype=np.float32)
    squares = (sums**2).sum(axis=1)
    for start in range(0, len(unit), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        label, inside = labels[chunk], member[chunk].astype(np.float32)
        dot = (unit[chunk] * sums[label]).sum(axis=1)
        # removing a member e from the sum s: e.(s - e) = e.s - 1 and |s - e|^2 = |s|^2 - 2 e.s + 1
        length = np.sqrt(np.maximum(squares[label] - inside * (2 * dot - 1), 1e-12))
        others = counts[label] - member[chunk]
        cosine[chunk] = np.where(others > 0, (dot - inside) / length, np.nan)
    return cosine


def _outlier_limit(unit: np.ndarray, labels: np.ndarray, sums: np.ndarray, usable: np.ndarray) -> float:
    rows = np.flatnonzero(usable)
    picked = rows[(randomness.uniform(0, "clean/rows", np.arange(_SAMPLED)) * len(rows)).astype(np.int64)]
    other = (
        labels[picked]
        + 1
        + (randomness.uniform(0, "clean/other", np.arange(_SAMPLED)) * (len(sums) - 1)).astype(np.int64)
    ) % len(sums)
    centres = _normalised(sums)
    cosines = np.concatenate(
        [
            (unit[picked[i : i + _CHUNK]] * centres[other[i : i + _CHUNK]]).sum(axis=1)
            for i in range(0, _SAMPLED, _CHUNK)
        ]
    )
    return _usual(cosines, 3)


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


def _same_person_limit(
    unit: np.ndarray, labels: np.ndarray, member: np.ndarray, classes: int, centres: np.ndarray
) -> float:
    half = randomness.bits(0, "clean/half", np.arange(len(unit))) & np.uint64(1) == 1
    one, one_count = _sums(unit, labels, classes, member & half)
    two, two_count = _sums(unit, labels, classes, member & ~half)
    both = (one_count >= 2) & (two_count >= 2)
    halves = (_normalised(one[both]) * _normalised(two[both])).sum(axis=1)
    if not len(halves):
        raise UserError(
            "no identity has four images, so the limit for one person cannot be computed; give --same-person"
        )
    return _between(neighbours(centres, centres, 2)[0][:, 1], halves)


def _overlap_limit(
    unit: np.ndarray, labels: np.ndarray, own: np.ndarray, member: np.ndarray, centres: np.ndarray, alive: np.ndarray
) -> float:
    rows = np.flatnonzero(member & np.isfinite(own))
    rows = rows[np.unique((randomness.uniform(0, "clean/overlap", np.arange(20_000)) * len(rows)).astype(np.int64))]
    cosines, found = neighbours(unit[rows], centres[alive], 2)
    strange = np.where(alive[found[:, 0]] == labels[rows], cosines[:, 1], cosines[:, 0])
    return _between(strange, own[rows])


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


# ------------------------------------------------------------------------------------------------------------------------ findings


def _find_outliers(
    findings: Findings,
    unit: np.ndarray,
    labels: np.ndarray,
    own: np.ndarray,
    samples: np.ndarray,
    centres: np.ndarray,
    alive: np.ndarray,
    *,
    at_any: bool,
) -> None:
    """Adds the outliers among `samples`: those closer to another identity, or with `at_any` all of them."""
    if not len(samples):
        return
    cosines, found = neighbours(unit[samples], centres[alive], 2)
    for sample, cosine, row in zip(samples.tolist(), cosines, alive[found]):
        other = 0 if row[0] != labels[sample] else 1
        if at_any or own[sample] < cosine[other]:
            findings.outliers.append(
                (sample, int(labels[sample]), float(own[sample]), int(row[other]), float(cosine[other]))
            )
    findings.outliers.sort(key=lambda outlier: outlier[2])


def _find_same_person(findings: Findings, centres: np.ndarray, alive: np.ndarray, limit: float) -> None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    cosines, found = neighbours(centres[alive], centres[alive], _NEIGHBOURS)
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


def _find_duplicates(
    findings: Findings, unit: np.ndarray, usable: np.ndarray, thumbnails: _Thumbnails, limits: Limits
) -> None:
    rows = np.flatnonzero(usable)
    cosines, found = neighbours(unit[rows], unit[rows], _NEIGHBOURS)
    left, right = np.repeat(rows, found.shape[1]), rows[found.ravel()]
    likely = (cosines.ravel() >= limits.near_duplicate) & (left < right) & (found.ravel() >= 0)
    # a sample may be listed by its neighbour, without listing it itself
    also = (cosines.ravel() >= limits.near_duplicate) & (left > right) & (found.ravel() >= 0)
    pairs = np.unique(
        np.concatenate([np.stack([left[likely], right[likely]], 1), np.stack([right[also], left[also]], 1)]), axis=0
    )
    repeated: set[int] = set()
    for first, second in pairs.tolist():
        if second not in repeated:
            correlation = thumbnails.correlation(first, second)
            if correlation >= limits.same_pixels:
                repeated.add(second)
                findings.duplicates.append((first, second, correlation))


def _find_overlap(
    findings: Findings, part: EvaluationSet, unit: np.ndarray, usable: np.ndarray, centres: np.ndarray, alive: np.ndarray,
    thumbnails: _Thumbnails, limit: float, limits: Limits,
) -> None:  # fmt: skip
    queries, good = _unit(part.embeddings)
    if queries.shape[1] != unit.shape[1]:
        raise UserError(
            f"{part.name} was embedded in {queries.shape[1]} dimensions, the dataset in {unit.shape[1]}; use one model for both"
        )
    cosines, found = neighbours(queries, centres[alive], 1)
    for image in np.flatnonzero((cosines[:, 0] >= limit) & good).tolist():
        findings.overlaps.append((part.name, image, int(alive[found[image, 0]]), float(cosines[image, 0])))
    rows = np.flatnonzero(usable)
    cosines, found = neighbours(queries, unit[rows], 1)
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
            picture = decode(self._read(sample))
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
