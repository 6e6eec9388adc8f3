"""MegaFace: identification among distractors, and verification against them.

Feature files are the devkit's: an OpenCV matrix header (int32 d, 1, 4, 5) and d float32. Identification: for every ordered pair (probe, mate) of one
person, the gallery is the mate and all distractors; rank k counts pairs where fewer than k distractors score at least as high as the mate.
Verification: positives are the same pairs (unordered), negatives every probe with every distractor. Scores are cosines in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.errors import UserError
from lvtrain.evaluation.verification import normalise, resolved
from lvtrain.files.reading import find

RANKS = (1, 10)
TARGETS = (1e-6, 1e-5, 1e-4, 1e-3)
_HEADER = np.dtype("<i4")


def read_feature(path: str | Path) -> np.ndarray:
    """One feature file, float32 [d].

    Raises:
        UserError: not such a file, or cut short.
    """
    data = Path(path).read_bytes()
    header = np.frombuffer(data[:16].ljust(16, b"\0"), dtype=_HEADER)
    if header[1:].tolist() != [1, 4, 5] or header[0] <= 0:
        raise UserError(f"{path} is not a feature file of MegaFace; its header is {header.tolist()}, not (d, 1, 4, 5)")
    if len(data) != 16 + 4 * header[0]:
        raise UserError(f"{path} holds {(len(data) - 16) / 4:g} of {header[0]} values; it was cut short")
    return np.frombuffer(data[16:], dtype="<f4")


def read_features(folder: str | Path, *, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    """All `*.bin` feature files below a folder, sorted by path: float32 [N, d] and labels int64 [N] (-1 each unless `labelled`).

    The label of a file is its folder, as FaceScrub's features are laid out (`<person>/<image>_<algorithm>.bin`).

    Raises:
        UserError: no file, or features of different lengths.
    """
    files = sorted(find(Path(folder), ".bin"))
    if not files:
        raise UserError(f"{folder} holds no MegaFace feature files (*.bin)")
    features = [read_feature(file) for file in files]
    lengths = {len(feature) for feature in features}
    if len(lengths) != 1:
        raise UserError(
            f"{folder} holds features of different lengths {sorted(lengths)}; they come from different models"
        )
    numbers = {folder: number for number, folder in enumerate(sorted({file.parent for file in files}))}
    labels = [numbers[file.parent] if labelled else -1 for file in files]
    return np.stack(features), np.array(labels, dtype=np.int64)


def score(
    probes: np.ndarray,
    labels: np.ndarray,
    distractors: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    tile: int = 8192,
) -> dict[str, Any]:
    """Identification and verification figures, JSON values.

    Args:
        probes: [P, d], any norm.
        labels: int [P], identities of the probes.
        distractors: [D, d], of identities that are not among the probes.
        device: where the cosines are computed.
        tile: distractors scored at once.

    Raises:
        UserError: NaN features, no person with two probes, dimensions that differ, a probe that is among the distractors.
    """
    if probes.shape[1] != distractors.shape[1]:
        raise UserError(
            f"probes have {probes.shape[1]} numbers, distractors {distractors.shape[1]}; they come from different models"
        )
    order = np.argsort(labels, kind="stable")
    labels = np.asarray(labels)[order]
    rows = torch.from_numpy(normalise(probes[order]).astype(np.float32)).to(device)
    first, second = _mates(labels)
    if len(first) == 0:
        raise UserError("identification needs identities with at least two probe images")
    pair_scores = (rows[torch.from_numpy(first).to(device)] * rows[torch.from_numpy(second).to(device)]).sum(1)

    keep = max(RANKS)
    # false accepts are the highest of P x D negatives: keep enough of each probe's best, and of all, to find every target's threshold
    negatives = len(rows) * len(distractors)
    possible = resolved(TARGETS, negatives)
    wanted = int(max(possible, default=0) * negatives) + 1
    best = torch.full((len(rows), keep), -2.0, device=device)
    highest = torch.empty(0, device=device)
    for start in range(0, len(distractors), tile):
        block = torch.from_numpy(normalise(distractors[start : start + tile]).astype(np.float32)).to(device)
        scores = rows @ block.T
        best = torch.cat([best, scores], dim=1).topk(keep, dim=1).values
        floor = highest.min() if len(highest) == wanted else torch.tensor(-2.0, device=device)
        highest = torch.cat([highest, scores[scores > floor]])
        if len(highest) > wanted:
            highest = highest.topk(wanted).values
    if bool((best[:, 0] > 1 - 1e-6).any()):
        raise UserError(
            "a probe is the same as a distractor (cosine 1); remove the overlap, the devkit has lists of such images"
        )

    # ordered pairs: the first of each is the probe, the second its mate in the gallery, and the other way round
    probe = torch.from_numpy(np.concatenate([first, second])).to(device)
    mate = torch.cat([pair_scores, pair_scores])
    better = (best[probe] >= mate[:, None]).sum(1)
    highest = highest.sort(descending=True).values
    return {
        "probes": len(rows),
        "people": len(np.unique(labels)),
        "distractors": len(distractors),
        "pairs": len(first),
        "identification": {f"rank_{rank}": float((better < rank).double().mean()) for rank in RANKS},
        "tar_at_far": {f"{target:.0e}": _tar(pair_scores, highest, target * negatives) for target in possible},
    }


def _tar(positive: torch.Tensor, highest: torch.Tensor, allowed: float) -> float:
    """Share of positives above every negative but the `allowed` highest; a tie with the next negative is rejected."""
    refused = highest[min(int(allowed * (1 + 1e-12)), len(highest) - 1)]
    return float((positive > refused).double().mean())


def _mates(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of both images of every unordered pair of one person; labels are sorted."""
    _, starts, counts = np.unique(labels, return_index=True, return_counts=True)
    pairs = [np.stack(np.triu_indices(count, 1)) + start for start, count in zip(starts, counts) if count > 1]
    both = np.concatenate(pairs, axis=1) if pairs else np.empty((2, 0), dtype=np.int64)
    return both[0], both[1]
