"""`init_from.classifier: means`: a class row starts as the mean of the pretrained backbone's embeddings of the class's own images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lvtrain.classifier import ShardedClassifier
from lvtrain.data import ShardDataset
from lvtrain.distributed.world import World
from lvtrain.evaluation.extract import embed

IMAGES = 16  # of a class, at most: the mean of more moves little
_TOGETHER = 65_536  # embeddings a rank holds at once


class _Encoded:
    """Some samples of a dataset as `evaluation.extract.Images`."""

    def __init__(self, dataset: ShardDataset, ids: np.ndarray) -> None:
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int, /) -> bytes:
        return self.dataset.read(int(self.ids[position]))[0]


def first_of_each(labels: np.ndarray, most: int) -> np.ndarray:
    """Positions of the first `most` samples of every label, int64, ascending. `labels` int64 [N]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    before = np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[np.arange(len(order)) - before < most])


@torch.no_grad()
def start_from_means(
    classifier: ShardedClassifier,
    backbone: nn.Module,
    dataset: ShardDataset,
    *,
    world: World,
    batch: int = 128,
    image_size: int,
    bfloat16: bool,
) -> int:
    """Turns this rank's class rows into the directions of their classes' mean unit embeddings, at the length they have; the number of images that
    were embedded. A class without an image keeps its row. Every rank calls it; the same rows on any number of ranks.

    Raises:
        UserError: an image that cannot be read or decoded.
    """
    labels = dataset.labels(np.arange(len(dataset)))
    chosen = first_of_each(labels, IMAGES)
    start, stop = classifier.rows
    sums = torch.zeros(
        stop - start, classifier.embedding_dim
    )  # on the host, where the order of additions is always the same

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
            embeddings: torch.Tensor = backbone(images)
        return embeddings.float()

    was_training = backbone.training
    backbone.eval()
    for first in range(0, len(chosen), _TOGETHER):
        ids = chosen[first : first + _TOGETHER]
        rows = embed(
            forward,
            _Encoded(dataset, ids),
            world=world,
            batch=batch,
            device=world.device,
            image_size=image_size,
            mirror=False,
        )
        here = (labels[ids] >= start) & (labels[ids] < stop)
        sums.index_add_(
            0, torch.from_numpy(labels[ids][here] - start), nn.functional.normalize(torch.from_numpy(rows[here]))
        )
    backbone.train(was_training)
    means = sums.to(classifier.weight.device, classifier.weight.dtype)
    length = torch.linalg.vector_norm(classifier.weight, dim=1, keepdim=True)
    known = torch.linalg.vector_norm(means, dim=1, keepdim=True) > 0
    classifier.weight.copy_(torch.where(known, nn.functional.normalize(means) * length, classifier.weight))
    return len(chosen)
