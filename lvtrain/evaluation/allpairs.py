"""TAR at FAR over all pairs of a labelled set, as MFR-Ongoing scores it, without the N x N matrix.

The upper triangle is computed in tiles, of which only a histogram is kept. Scores are float32 cosines. The histogram has BINS
bins over [-1, 1] (width 2 / BINS, about 1e-6), and a threshold is the lower edge of a bin. At that threshold FAR and TAR are
exact counts. The TAR of the best threshold lies between `tar` (largest bin edge with FAR <= target) and `tar_upper` (one bin
further); both are given.

Negatives far below every relevant threshold are counted but not binned. A sample of pairs gives a score that slightly more
than the largest target share of them exceed, and only scores above it are binned. If the sample was misleading, the pass is
repeated without this score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import verification
from lvtrain.evaluation.verification import diverged

BINS = 1 << 21
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_SAMPLE = 1 << 20
# sets with fewer pairs are binned whole: looking for a floor would cost more than it saves
_SMALL = 1 << 24


@dataclass(frozen=True)
class Counts:
    """Positive and negative pairs by bin of their cosine, int64 [BINS]. Pairs below `floor` only count in the totals."""

    positive: np.ndarray
    negative: np.ndarray
    positives: int
    negatives: int
    floor: float

    def above(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges (falling) [K], and how many positive and negative pairs score at least the edge, for every edge above the floor."""
        edges = -1.0 + 2.0 * np.arange(BINS - 1, -1, -1) / BINS
        kept = edges >= self.floor
        return edges[kept], self.positive[::-1].cumsum()[kept], self.negative[::-1].cumsum()[kept]


def all_pairs(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    targets: tuple[float, ...] = TARGETS,
    tile: int = 8192,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> dict[str, Any]:
    """TAR at every FAR target over all N (N - 1) / 2 pairs. The ranks share the tiles; the result is the same on each.

    Args:
        embeddings: [N, d], any norm; every rank holds all of them (1.6 million x 512 float32 are 3.3 GB).
        labels: int [N], of the identities.
        targets: FARs; those that the number of negative pairs cannot resolve are left out.
        tile: rows of a block; memory is about 6 x 4 x tile x tile bytes above the embeddings.
        device: where the cosines are computed.
        world: this process among the ranks; None for one process alone.

    Returns:
        JSON values: images, identities, positive_pairs, negative_pairs, and tar_at_far: target -> {tar, tar_upper, threshold, far}.

    Raises:
        UserError: NaN embeddings, labels that do not fit, no positive or no negative pair.
    """
    rows, groups = _prepared(embeddings, labels)
    total = len(rows) * (len(rows) - 1) // 2
    sizes = np.bincount(groups)
    positives = int((sizes * (sizes - 1) // 2).sum())
    if positives == 0 or positives == total:
        raise UserError("all-pairs verification needs identities with several images, and several identities")
    resolved = verification.resolved(sorted(targets, reverse=True), total - positives)
    share = 1.5 * max(resolved, default=1.0)
    floor = _floor(rows, groups, share) if total > _SMALL and share < 0.5 else -1.0
    counts = count_pairs(rows, groups, floor=floor, tile=tile, device=device, world=world)
    if counts.negative.sum() < max(resolved, default=0) * counts.negatives:
        counts = count_pairs(rows, groups, floor=-1.0, tile=tile, device=device, world=world)
    return {
        "images": len(rows),
        "identities": len(sizes),
        "positive_pairs": counts.positives,
        "negative_pairs": counts.negatives,
        "score_resolution": 2.0 / BINS,
        "tar_at_far": {f"{target:.0e}": figures for target, figures in zip(resolved, _figures(counts, resolved))},
    }


def count_pairs(
    rows: torch.Tensor,
    groups: np.ndarray,
    *,
    floor: float,
    tile: int,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> Counts:
    """Histograms of the cosines of all pairs i < j. `rows` float32 [N, d] normalised, `groups` int64 [N] rising."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    device = torch.device(device)
    histograms = torch.zeros(2, BINS, dtype=torch.int64, device=device)
    totals = torch.zeros(2, dtype=torch.int64)
    person = torch.from_numpy(groups).to(device)
    held = rows.to(device) if device.type != "cpu" else rows
    scores = torch.empty(0, device=device)
    for number, (first, second) in enumerate(_tiles(len(rows), tile)):
        if number % size != rank:
            continue
        height, width = first.stop - first.start, second.stop - second.start
        if scores.shape != (height, width):
            scores = torch.empty(height, width, device=device)
        torch.mm(held[first], held[second].T, out=scores)
        pairs = height * width
        if first == second:
            # each pair once, and no image with itself
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril_(), -2.0)
            pairs = height * (height - 1) // 2
        if groups[first.stop - 1] >= groups[second.start]:
            # identities stand together, so only tiles near the diagonal hold positive pairs
            same = person[first][:, None] == person[second][None, :]
            same &= scores > -1.5
            positive = scores[same]
            _add(histograms[0], positive)
            scores.masked_fill_(same, -2.0)
            totals[0] += len(positive)
            pairs -= len(positive)
        totals[1] += pairs
        _add(histograms[1], _above(scores, floor))
    if size > 1:
        totals = totals.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(totals)
        dist.all_reduce(histograms)
    positive, negative = histograms.cpu().numpy()
    return Counts(positive, negative, int(totals[0]), int(totals[1]), floor)


def _figures(counts: Counts, targets: list[float]) -> Iterator[dict[str, float]]:
    edges, positive, negative = counts.above()
    for target in targets:
        # the lowest edge whose false accepts stay within the target
        position = int(np.searchsorted(negative, target * counts.negatives * (1 + 1e-12), side="right")) - 1
        if position < 0:
            yield {"tar": 0.0, "tar_upper": float(positive[0] / counts.positives), "threshold": 1.0, "far": 0.0}
            continue
        following = min(position + 1, len(edges) - 1)
        yield {
            "tar": float(positive[position] / counts.positives),
            "tar_upper": float(positive[following] / counts.positives),
            "threshold": float(edges[position]),
            "far": float(negative[position] / counts.negatives),
        }


def _prepared(embeddings: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised float32 rows and dense labels, identities together."""
    labels = np.asarray(labels)
    if embeddings.ndim != 2 or labels.shape != (len(embeddings),):
        raise UserError(
            f"{len(labels)} labels for embeddings of shape {embeddings.shape}; each embedding needs a label"
        )
    _, groups = np.unique(labels, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    rows = torch.empty(embeddings.shape, dtype=torch.float32)
    bad = 0
    for start in range(0, len(order), 65536):
        block = torch.from_numpy(np.asarray(embeddings[order[start : start + 65536]], dtype=np.float64))
        bad += int((~torch.isfinite(block).all(1)).sum())
        rows[start : start + 65536] = torch.nn.functional.normalize(block, dim=1)
    if bad:
        raise diverged(bad, len(order), "embeddings")
    return rows, groups[order].astype(np.int64)


def _floor(rows: torch.Tensor, groups: np.ndarray, share: float) -> float:
    """A cosine that about `share` of the negative pairs exceed, from a sample of pairs."""
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, len(rows), (2, _SAMPLE))
    different = groups[first] != groups[second]
    first, second = first[different], second[different]
    step = max(1, (1 << 23) // rows.shape[1])
    blocks = (slice(start, start + step) for start in range(0, len(first), step))
    scores = np.concatenate([(rows[first[block]] * rows[second[block]]).sum(1).numpy() for block in blocks])
    return float(np.quantile(scores, 1 - share)) if len(scores) else -1.0


def _tiles(count: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, count, tile):
        for second in range(first, count, tile):
            yield slice(first, min(first + tile, count)), slice(second, min(second + tile, count))


def _above(scores: torch.Tensor, floor: float) -> torch.Tensor:
    # at -1 everything counts but the pairs excluded with -2; rounding may put a cosine slightly below -1
    limit = floor if floor > -1.0 else -1.5
    if scores.device.type == "cpu":
        array = scores.numpy()
        return torch.from_numpy(array[array >= limit])  # several times faster than torch's on CPU
    return scores[scores >= limit]


def _add(histogram: torch.Tensor, scores: torch.Tensor) -> None:
    if len(scores):
        bins = ((scores.double() + 1.0) * (BINS / 2)).long().clamp_(0, BINS - 1)
        histogram += torch.bincount(bins, minlength=BINS)
