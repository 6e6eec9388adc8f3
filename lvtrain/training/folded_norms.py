"""`init_from` an ONNX file: BatchNorms that its export folded away get the statistics of some training images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lvtrain.data import ShardDataset
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation.extract import decode
from lvtrain.weights.norms import folded_norms, restore_statistics

IMAGES = 512  # a deviation from so many embeddings is known to 3%
_BATCH = 64


def restore_norms(backbone: nn.Module, dataset: ShardDataset, *, world: World, image_size: int) -> int:
    """The number of layers that were given statistics. Every rank calls it and goes through the same images; the first rank's figures count."""
    norms = folded_norms(backbone)
    if not norms:
        return 0
    restore_statistics(backbone, _some_images(dataset, image_size, world.device))
    if world.size > 1:
        for norm in norms.values():
            for tensor in norm.state_dict().values():
                dist.broadcast(tensor, 0)
    return len(norms)


def _some_images(dataset: ShardDataset, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images from the whole dataset, evenly spread. One that cannot be decoded is left out."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, IMAGES).astype(np.int64))
    for start in range(0, len(chosen), _BATCH):
        images = []
        for sample in chosen[start : start + _BATCH]:
            try:
                images.append(decode(dataset.read(int(sample))[0], size))
            except UserError:
                continue
        if images:
            pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
            yield pixels.float().sub_(127.5).div_(127.5)
