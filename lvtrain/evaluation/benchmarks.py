"""A model on one verification set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.evaluation import verification
from lvtrain.evaluation.bins import read_bin
from lvtrain.evaluation.group_files import groups_of
from lvtrain.evaluation.scores import groups as scores
from lvtrain.evaluation.scores.discard import error_versus_discard
from lvtrain.weights import extract

DISCARD_TARGETS = (1e-2, 1e-3, 1e-4)


def verify_set(
    forward: extract.Forward, path: str | Path, setting: extract.Setting, *, groups: Path | None = None
) -> dict[str, Any]:
    """`verification.summary` of one `.bin` set, error against discarded share, and `xnorm`: the mean norm of the embeddings before they are normalised.

    With `groups`, the table image,group, also error rates by group.
    """
    images, issame = read_bin(path)
    # an even batch holds whole pairs, so distances are computed batch by batch and no embedding is kept
    even = replace(setting, batch=setting.batch + setting.batch % 2)
    pairs = even.run(forward, images, pair_rows)[: len(issame)]
    distances, norms, finite, quality = pairs.T
    if not finite.all():
        raise verification.diverged(int((finite == 0).sum()), len(issame), "pairs")
    result = {**verification.summary(distances, issame), "xnorm": float(norms.mean())}
    labels = np.asarray(issame, dtype=bool)
    cosines = 1.0 - distances / 2.0
    at = scores.thresholds(cosines, labels, DISCARD_TARGETS)
    result["error_versus_discard"] = error_versus_discard(cosines[labels], quality[labels], at)
    if groups is not None:
        sides = 2 * np.arange(len(labels))
        compared = scores.Pairs(cosines, labels, sides, sides + 1)
        identities = compared.identities(_repeats(images))
        result["groups"] = scores.of_pairs(compared, groups_of_images(len(images), groups), identities)
    return result


def groups_of_images(count: int, path: Path) -> np.ndarray:
    """The group of every image of a `.bin` set, object [count], from a table image,group.

    Raises:
        UserError: as `group_files.groups_of`.
    """
    return groups_of(path, "image", [str(position) for position in range(count)])


def _repeats(images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of images that a set holds twice, and of their first appearance: lists of pairs use an image often."""
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(hashlib.sha256(image).digest(), position) for position, image in enumerate(images)]
    return np.array(first, dtype=np.int64), np.arange(len(first))


def pair_rows(views: np.ndarray) -> np.ndarray:
    """float32 [2 views, 2 p, d] of whole pairs -> float64 [p, 4].

    The columns are the squared distance, the mean norm of the pair's four embeddings, 1 if all are finite, and the lower norm of the two
    embeddings that are compared, before they are normalised.

    Few passes and few copies, because the baseline's "embedding" is 37,632 pixels.
    """
    embeddings = views[0].astype(np.float64)
    embeddings += views[1]
    squares = np.einsum("nd,nd->n", embeddings, embeddings)
    with np.errstate(invalid="ignore"):
        embeddings /= np.sqrt(np.where(squares == 0, 1.0, squares))[:, None]
        difference = embeddings[0::2] - embeddings[1::2]
    distances = np.einsum("pd,pd->p", difference, difference)
    norms = np.sqrt(np.einsum("vnd,vnd->vn", views, views, dtype=np.float64)).mean(0)
    finite = np.isfinite(distances) & np.isfinite(norms[0::2] + norms[1::2])
    lower = np.sqrt(np.minimum(squares[0::2], squares[1::2]))
    return np.stack([np.where(finite, distances, 0.0), (norms[0::2] + norms[1::2]) / 2, finite, lower], axis=1)
