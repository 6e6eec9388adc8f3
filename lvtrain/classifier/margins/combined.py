"""The combined margin: SphereFace, ArcFace and CosFace in one formula."""

from __future__ import annotations

import math

from lvtrain.classifier.margins.angular import AngularMargin, AngularSection
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import MARGINS


class CombinedSection(AngularSection):
    """Keys of `margin: combined`."""

    name: str = setting("combined", "name of the margin", because="a change would make it another run")
    m1: float = setting(1.0, "factor on the angle (SphereFace)", ge=1)
    m2: float = setting(0.0, "added to the angle, radians (ArcFace)", ge=0, lt=math.pi)
    m3: float = setting(0.0, "subtracted from the cosine (CosFace)", ge=0, le=1)


@MARGINS.register("combined")
class Combined(AngularMargin):
    """T = s (cos(m1 theta + m2) - m3): Deng et al. 2019 (arXiv 1801.07698, eq. 4).

    arcface_torch's `CombinedMarginLoss` has the same value, with `straight_through`, only for (m1, m2, m3) = (1, m2, 0) and
    (1, 0, m3). With m3 > 0 theirs is s (cos theta - m3) and ignores m1 and m2; with m1 != 1 and m3 = 0 theirs raises an
    error.
    """

    section = CombinedSection
    settings: CombinedSection

    def margins(self) -> tuple[float, float, float]:
        f = self.warmup_factor
        return 1 + f * (self.settings.m1 - 1), f * self.settings.m2, f * self.settings.m3
