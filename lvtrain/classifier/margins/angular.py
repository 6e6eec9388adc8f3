"""What the margins on the angle between embedding and class centre share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvtrain.classifier.margins.base import Margin
from lvtrain.recipe.base import setting
from lvtrain.recipe.classifier import MarginSection


class AngularSection(MarginSection):
    """The key that all angular margins share."""

    straight_through: bool = setting(False, "arcface_torch's gradient (dT/dcos = scale) instead of the true derivative")


class AngularMargin(Margin):
    """T = s (cos(m1 theta + m2) - m3), made monotone in theta and with its true derivative (`angular_target`).

    With `straight_through` it is not made monotone, and dT/dcos = s, as in arcface_torch.
    """

    settings: AngularSection

    def margins(self) -> tuple[float, float, float]:
        """(m1, m2, m3) after the warm-up."""
        raise NotImplementedError(f"{type(self).__name__} does not define margins")

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        m1, m2, m3 = self.margins()
        if self.settings.straight_through:
            with torch.no_grad():
                change = torch.cos(m1 * angle(cosine) + m2) - m3 - cosine
            return self.scale * (cosine + change)
        return self.scale * angular_target(cosine, m1, torch.full_like(cosine, m2), m3)


def angle(cosine: Tensor) -> Tensor:
    """The arccosine, with finite gradients everywhere: [B] in [-1, 1] -> radians in [0, pi].

    Values that rounding has put outside [-1, 1] count as ±1.

    At exactly ±1, where arccos has no derivative, autograd returns 0. Accurate to the last bits near ±1, where 1 - cos^2
    cancels.
    """
    tiny = torch.finfo(cosine.dtype).tiny
    return torch.atan2(torch.sqrt(((1 - cosine) * (1 + cosine)).clamp_min(tiny)), cosine)


def angular_target(cosine: Tensor, m1: float, m2: Tensor, m3: float = 0.0) -> Tensor:
    """cos(m1 theta + m2) - m3, made monotone in theta (before the scale): [B].

    cos(m1 theta + m2) rises again where m1 theta + m2 > pi, so a very wrong sample would be pushed further away. Beyond
    that point the target is

    - for m1 = 1: `cos theta - m2 sin m2`, which is ArcFace's rule. It lies slightly below the end of the curve.
    - for m1 != 1: the line of slope 1 in cos theta that joins continuously.
    """
    theta = angle(cosine)
    if m1 == 1.0:
        beyond = cosine - m2 * torch.sin(m2)
    else:
        beyond = cosine - torch.cos((math.pi - m2) / m1) - 1
    bent = m1 * theta + m2
    return torch.where(bent <= math.pi, torch.cos(bent), beyond) - m3
