"""CosFace: the margin is subtracted from the cosine."""

from __future__ import annotations

from torch import Tensor

from lvtrain.classifier.margins.base import Margin
from lvtrain.recipe.base import setting
from lvtrain.recipe.classifier import MarginSection
from lvtrain.recipe.registry import MARGINS


class CosFaceSection(MarginSection):
    """Keys of `margin: cosface`."""

    name: str = setting("cosface", "name of the margin", because="a change would make it another run")
    m: float = setting(0.4, "margin: subtracted from the cosine to the sample's own class centre", ge=0, le=1)


@MARGINS.register("cosface")
class CosFace(Margin):
    """T = s (cos theta - m): Wang et al. 2018 (arXiv 1801.09414, eq. 4)."""

    section = CosFaceSection
    settings: CosFaceSection

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        return self.scale * (cosine - self.warmup_factor * self.settings.m)
