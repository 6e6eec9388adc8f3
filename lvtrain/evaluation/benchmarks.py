"""A model on one verification set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.evaluation import extract, verification
from lvtrain.evaluation.bins import read_bin


def verify_set(
    forward: extract.Forward,
    path: str | Path,
    setting: extract.Setting,
) -> dict[str, Any]:
    """`verification.summary` of one `.bin` set, and `xnorm`: the mean norm of the embeddings before they are normalised."""
    images, issame = read_bin(path)
    # an even batch holds whole pairs, so distances are computed batch by batch and no embedding is kept
    batch = setting.batch + setting.batch % 2
    pairs = extract.run(
        forward,
        images,
        pair_rows,
        world=setting.world,
        batch=batch,
        device=setting.device,
        image_size=setting.image_size,
    )[: len(issame)]
    distances, norms, finite = pairs[:, 0], pairs[:, 1], pairs[:, 2]
    if not finite.all():
        raise verification.diverged(int((finite == 0).sum()), len(issame), "pairs")
    return {**verification.summary(distances, issame), "xnorm": float(norms.mean())}


def pair_rows(views: np.ndarray) -> np.ndarray:
    """float32 [2 views, 2 p, d] of whole pairs -> float64 [p, 3]: squared distance, mean norm of the pair's four embeddings, 1 if all finite.

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
    return np.stack([np.where(finite, distances, 0.0), (norms[0::2] + norms[1::2]) / 2, finite], axis=1)
