"""Do a model's embeddings differ between images? A model that is collapsed, untrained or fed wrongly gives all of them nearly one direction.

The measure is the mean cosine of all pairs of images that were embedded: |sum of unit embeddings|^2 tells it without comparing pairs. On images
of many identities a good model is below 0.1; OpenCV's SFace, fed with the wrong range, is at 0.94.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from lvtrain.weights.extract import Forward

COLLAPSED = (
    0.5  # mean cosine of all pairs from which it is said; identities apart have 0, images of one identity 0.5 to 0.8
)
_AT_ONCE = 1 << 16  # rows of a matrix
_LEAST = 16  # images: among fewer, one identity may be most of them
_KEPT, _EACH = 32, 4  # images kept for comparing ranges, and of each call


class Spread:
    """Wraps a forward function, and watches what it gives.

    Args:
        forward: images `[b, 3, H, W]` -> embeddings `[b, d]`.

    Attributes:
        images: how many were embedded, without the repeats that fill up a batch.
        empty: how many embeddings of length 0 or without a direction (NaN, infinity) there were.
        kept: some of the images, from all over the set.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._sum: torch.Tensor | None = None
        self.images = self.empty = 0
        self.kept: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        embeddings = self._forward(images)
        new = torch.ones(len(images), dtype=torch.bool, device=images.device)
        new[1:] = (images[1:] != images[:-1]).flatten(1).any(dim=1)
        self.add(embeddings[new.to(embeddings.device)])
        if len(self.kept) < _KEPT:
            some = images[new]
            self.kept += list(some[:: max(1, len(some) // _EACH)][:_EACH].cpu())
        return embeddings

    def add(self, embeddings: torch.Tensor) -> None:
        """Counts embeddings `[b, d]` that are there already."""
        unit, good = _unit(embeddings)
        total = unit[good].sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self.images += int(good.sum())
        self.empty += int((~good).sum())

    @property
    def mean_cosine(self) -> float | None:
        """Over all pairs of images; None with too few of them."""
        return None if self._sum is None else _mean_cosine(self._sum, self.images)

    def warning(self, others: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None) -> str:
        """What is wrong, in words; empty where nothing is.

        Args:
            others: other ways to feed the same network, by what a user writes for them. Their mean cosines on the kept images are said.
        """
        mean = self.mean_cosine
        words = []
        if self.empty:
            words.append(
                f"{self.empty} of {self.empty + self.images} embeddings have no direction (zero, NaN or infinity)"
            )
        if mean is not None and mean > COLLAPSED:
            words.append(
                f"embeddings hardly differ between images: their mean cosine is {mean:.2f}, a trained model has less than 0.1 on many identities"
            )
        if not words:
            return ""
        tried = {name: _of(forward, self.kept) for name, forward in (others or {}).items()}
        if tried and mean is not None:
            found = ", ".join(f"{value:.2f} with {name!r}" for name, value in tried.items())
            words.append(f"fed otherwise, {len(self.kept)} of the images have {found}")
        advice = "the model is untrained or collapsed, or it takes its images otherwise"
        return "; ".join(words) + f". So {advice}: see the line that begins with input, and give --input"


def warning_of(rows: np.ndarray, *, without: Iterable[int] = ()) -> str:
    """What is wrong with embeddings `[N, d]`, maybe a memory map; empty where nothing is. Rows `without` an image do not count."""
    counts = np.ones(len(rows), dtype=bool)
    counts[list(without)] = False
    spread = Spread(lambda images: images)
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        spread.add(torch.from_numpy(np.asarray(rows[part])[counts[part]]))
    return spread.warning()


def _unit(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1 in float64, and which of them have a direction."""
    rows = embeddings.detach().double()
    length = rows.norm(dim=1, keepdim=True)
    good = torch.isfinite(length) & (length > 0)
    return rows / length.clamp(min=1e-300), good.squeeze(1)


def _mean_cosine(total: torch.Tensor, count: int) -> float | None:
    return float((total.square().sum() - count) / (count * (count - 1))) if count >= _LEAST else None


def _of(forward: Callable[[torch.Tensor], torch.Tensor], images: list[torch.Tensor]) -> float:
    unit, good = _unit(forward(torch.stack(images)))
    count = int(good.sum())
    return float((unit[good].sum(0).square().sum() - count) / max(1, count * (count - 1)))
