"""What cleaning found, as lists, and which samples are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lvtrain.data.subset import DROPPED


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
    valid = np.isin(merged, used) & ~lost
    label_of[valid] = place[valid]
    return np.flatnonzero(keep), label_of
