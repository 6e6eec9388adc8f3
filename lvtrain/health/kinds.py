"""Signs of labels that hold several identities, and of identities with several labels.

They come from the newest embeddings of some watched classes. A class must have been seen a number of times, so large
datasets show them after an epoch or more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lvtrain.distributed import world as worlds

KEPT = 24  # newest embeddings of each watched class
WATCHED = 64  # classes
_ENOUGH = 8  # images that a watched class has
_VARIED = 16  # images of a class whose embeddings may be called two groups; fewer come again and again
_APART = 0.28  # gap between two groups of a class's embeddings; one identity's have 0.1 to 0.2 (`_gap`)


class Kinds:
    """The newest embeddings of watched classes, on the device.

    Args:
        counts: images of each class, int64 [C]; the watched ones are spread evenly over those with enough.
        dim: of an embedding.
        device: of the embeddings.
    """

    def __init__(self, counts: np.ndarray, dim: int, device: torch.device) -> None:
        able = np.flatnonzero(counts >= _ENOUGH)
        if not len(able):
            able = np.arange(1)
        count = min(len(able), WATCHED)
        chosen = able[np.arange(count) * len(able) // count]
        self.varied = counts[chosen] >= _VARIED
        self.classes = torch.from_numpy(chosen).to(device)
        self.kept = torch.zeros(count + 1, KEPT, dim, device=device)  # the last row takes what is not watched
        self.seen = torch.zeros(count + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a micro-batch: [m, d], int64 [m]."""
        count = len(self.classes)
        place = torch.searchsorted(self.classes, labels).clamp_max(count - 1)
        place = torch.where(self.classes[place] == labels, place, count)
        earlier = (place[:, None] == place[None, :]).tril(-1).sum(dim=1)
        self.kept[place, (self.seen[place] + earlier) % KEPT] = functional.normalize(embeddings.detach().float())
        self.seen.index_add_(0, place, torch.ones_like(place))

    @torch.no_grad()
    def read(self, classifier: Any) -> dict[str, Any]:
        """The signs of this rank; a collective.

        Returns:
            `apart`: share of the varied classes with `KEPT` embeddings whose embeddings are two groups; `within`: median over
            them of the mean cosine in a class; `own`, `other`: for each watched class, the cosine of its mean embedding
            to its class centre and to the nearest other one of this rank; -1 where this rank has none, or too few were
            seen.
        """
        count = len(self.classes)
        total = worlds.mean_over_ranks(torch.cat([self.kept.sum(dim=1), self.seen[:, None].float()], dim=1))[:count]
        size = total[:, -1] * classifier.ranks
        start, stop = classifier.rows
        weight = functional.normalize(classifier.weight.detach().float())
        cosine = functional.normalize(total[:, :-1]) @ weight.T
        here = (self.classes >= start) & (self.classes < stop)
        place = torch.where(here, self.classes - start, 0)[:, None]
        nothing = torch.full_like(size, -1.0)
        own = torch.where(here, cosine.gather(1, place).squeeze(1), nothing)
        cosine.scatter_(1, place, torch.where(here[:, None], -1.0, cosine.gather(1, place)))
        enough = size >= KEPT
        own, other = torch.where(enough, own, nothing), torch.where(enough, cosine.amax(dim=1), nothing)
        grams = self.kept[:count] @ self.kept[:count].transpose(1, 2)
        values = torch.cat([grams.flatten(1), self.seen[:count, None].float(), own[:, None], other[:, None]], dim=1)
        host = values.nan_to_num().cpu().numpy()  # a step that was not finite leaves its embeddings here
        full = (host[:, KEPT * KEPT] >= KEPT) & self.varied
        found = {"own": host[:, -2].round(4).tolist(), "other": host[:, -1].round(4).tolist()}
        if full.sum() < 8:
            return found
        each = host[full, : KEPT * KEPT].reshape(-1, KEPT, KEPT).clip(-1, 1)
        gaps = np.array([_gap(gram) for gram in each])
        within = (each.sum(axis=(1, 2)) - KEPT) / (KEPT * (KEPT - 1))
        found |= {"apart": float((gaps > _APART).mean()), "within": float(np.median(within))}
        return found | {"gap": float(np.median(gaps)), "gap_90": float(np.quantile(gaps, 0.9))}


def _gap(gram: np.ndarray) -> float:
    """How far two groups of unit vectors lie apart, from their cosines [k, k].

    The groups are the two sides of the first principal component. The gap is the mean cosine in the looser group less
    that between the groups, as a share of 1 less the latter.
    """
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    side = np.linalg.eigh(centred)[1][:, -1] > 0
    if not 2 <= side.sum() <= len(side) - 2:
        return 0.0
    inside = []
    for group in (side, ~side):
        size = int(group.sum())
        inside.append((gram[np.ix_(group, group)].sum() - size) / (size * (size - 1)))
    between = float(gram[np.ix_(side, ~side)].mean())
    return (min(inside) - between) / max(1 - between, 1e-6)
