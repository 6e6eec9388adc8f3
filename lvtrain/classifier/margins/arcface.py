"""ArcFace: the margin is added to the angle."""

from __future__ import annotations

import math

from lvtrain.classifier.margins.angular import AngularMargin, AngularSection
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import MARGINS


class ArcFaceSection(AngularSection):
    """Keys of `margin: arcface`."""

    name: str = setting("arcface", "name of the margin", because="a change would make it another run")
    m: float = setting(0.5, "margin: added to the angle to the sample's own class centre, radians", ge=0, lt=math.pi)


@MARGINS.register("arcface")
class ArcFace(AngularMargin):
    """T = s cos(theta + m): Deng et al. 2019 (arXiv 1801.07698, eq. 3); beyond theta = pi - m, T = s (cos theta - m sin m).

    With `straight_through` it is arcface_torch's `ArcFace`: s cos(theta + m) for every theta, and dT/dcos = s.
    """

    section = ArcFaceSection
    settings: ArcFaceSection

    def margins(self) -> tuple[float, float, float]:
        return 1.0, self.warmup_factor * self.settings.m, 0.0
