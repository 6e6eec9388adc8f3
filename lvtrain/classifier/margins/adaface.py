"""AdaFace: the margin follows the image quality."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lvtrain.classifier.margins.angular import angle
from lvtrain.classifier.margins.base import Margin
from lvtrain.recipe.base import setting
from lvtrain.recipe.classifier import MarginSection
from lvtrain.recipe.registry import MARGINS


class AdaFaceSection(MarginSection):
    """Keys of `margin: adaface`."""

    name: str = setting("adaface", "name of the margin", because="a change would make it another run")
    m: float = setting(0.4, "size of the margin", ge=0, lt=math.pi / 2)
    h: float = setting(0.333, "how strongly the margin depends on the norm (the paper: 0.33)", gt=0)
    momentum: float = setting(0.99, "momentum of the running mean and standard deviation of the norms", ge=0, lt=1)


@MARGINS.register("adaface")
class AdaFace(Margin):
    """Kim et al. 2022 (arXiv 2204.00964): the margin follows the embedding's norm, a proxy of image quality.

    With z = clip(h (|x| - mean) / (std + 1e-3), -1, 1):

        T = s (cos(theta - m z) - m - m z),  theta - m z kept within [1e-3, pi - 1e-3]

    No gradient goes through the norm. mean and std are exponential averages of the batch's. They begin at the authors'
    20 and 100.

    Deviation: the authors update mean and std before they use them. Here a step reads them as they were at its start, and
    updates them once at its end from the whole global batch, so that they do not depend on ranks or micro-batches.
    """

    section = AdaFaceSection
    settings: AdaFaceSection

    reads_norms = True
    mean: Tensor
    std: Tensor

    def __init__(self, settings: MarginSection | None = None, **parameters: Any) -> None:
        super().__init__(settings, **parameters)
        self.register_buffer("mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(100.0, dtype=torch.float64))

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        if norms is None:
            raise ValueError("AdaFace needs the norms of the embeddings")
        clipped = norms.detach().clamp(1e-3, 100.0).to(cosine.dtype)
        quality = (clipped - self.mean.to(cosine.dtype)) / (self.std.to(cosine.dtype) + 1e-3) * self.settings.h
        m, z = self.warmup_factor * self.settings.m, quality.clamp(-1, 1)
        bent = (angle(cosine) - m * z).clamp(1e-3, math.pi - 1e-3)
        return self.scale * (torch.cos(bent) - m - m * z)

    @torch.no_grad()
    def end_step(self, norms: Tensor, labels: Tensor) -> None:
        # Masked sums rather than a boolean index: no host synchronisation. Fewer than two valid samples change nothing.
        valid = (labels >= 0).to(torch.float64)
        clipped = norms.detach().to(torch.float64).clamp(1e-3, 100.0)
        count = valid.sum()
        mean = (clipped * valid).sum() / count.clamp_min(1)
        variance = ((clipped - mean).square() * valid).sum() / (count - 1).clamp_min(1)
        weight = (count > 1).to(torch.float64) * (1 - self.settings.momentum)
        self.mean.lerp_(mean, weight)
        self.std.lerp_(variance.sqrt(), weight)
