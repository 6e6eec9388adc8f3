"""What an evaluation passes to `lvtrain.weights.extract`, which embeds images: one setting for all its protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lvtrain.distributed.world import World
from lvtrain.weights.extract import Forward, Images, Progress, Reduce, decode, embed, run

__all__ = ["Forward", "Images", "Progress", "Reduce", "Setting", "decode", "embed", "raw_pixels", "run"]


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """The baseline every model must beat: the pixels themselves are the embedding, [b, 3, H, W] -> [b, 3 H W]."""
    return images.flatten(1)


@dataclass(frozen=True)
class Setting:
    """How images are embedded, the same for every protocol of one evaluation.

    Attributes:
        batch: images per forward call.
        image_size: pixels of a side that the model takes.
        progress: called after each batch with the images embedded so far and their number.
        kept: the last set's embeddings, for the next protocol on the same set; None to keep none. Only for one forward function.
    """

    world: World
    device: torch.device | str
    batch: int = 128
    image_size: int = 112
    progress: Progress | None = None
    kept: dict[tuple[Path, bool], np.ndarray] | None = field(default=None, compare=False)

    def embed(self, forward: Forward, images: Images, *, mirror: bool = True) -> np.ndarray:
        """Embeddings float32 [N, d]; with `mirror` the embedding of the mirrored image is added. A collective."""
        return embed(
            forward,
            images,
            world=self.world,
            batch=self.batch,
            device=self.device,
            image_size=self.image_size,
            mirror=mirror,
            progress=self.progress,
        )
