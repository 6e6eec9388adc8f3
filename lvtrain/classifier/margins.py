"""Margins: from the cosine of a sample to its own class centre to the target logit T.

A margin is one small class. The classifier hands it the target cosines of the gathered batch and never asks what type
it is; everything else (the negatives) is the log-sum-exp's business. Unless `straight_through` is asked for, autograd
through `target_logit` gives the true derivative of T; arcface_torch and CVLface give dT/dcos = scale whatever the
margin, which is `straight_through=True` here.

Adding one: subclass `Margin`, write `target_logit`, enter it in `MARGINS`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lvtrain.errors import UserError


def angle(cosine: Tensor) -> Tensor:
    """arccos with finite gradients everywhere: [B] in [-1, 1] (rounding beyond is taken as ±1) -> radians in [0, pi].

    At exactly ±1, where arccos has no derivative, autograd returns 0. Accurate to the last bits near ±1, where 1 -
    cos^2 cancels.
    """
    tiny = torch.finfo(cosine.dtype).tiny
    return torch.atan2(torch.sqrt(((1 - cosine) * (1 + cosine)).clamp_min(tiny)), cosine)


def angular_target(cosine: Tensor, m1: float, m2: Tensor, m3: float = 0.0) -> Tensor:
    """cos(m1 theta + m2) - m3, made monotone in theta (before the scale).

    cos(m1 theta + m2) turns upwards once m1 theta + m2 > pi, so a very wrong sample would be pushed further away. From
    there on the target continues as `cos theta - m2 sin m2` for m1 = 1 (ArcFace's own rule, slightly below the curve it
    leaves) and as the line of slope 1 that joins continuously for m1 != 1.
    """
    theta = angle(cosine)
    if m1 == 1.0:
        beyond = cosine - m2 * torch.sin(m2)
    else:
        beyond = cosine - torch.cos((math.pi - m2) / m1) - 1
    bent = m1 * theta + m2
    return torch.where(bent <= math.pi, torch.cos(bent), beyond) - m3


class Margin(nn.Module):
    """Base of all margins.

    Attributes
    ----------
    scale: s, the factor on every cosine (METHODS: 64).
    filter_threshold: negatives with a cosine above it are dropped (Partial FC's inter-class filtering), None to keep
    all. arcface_torch sets
        such logits to 0, which leaves exp(0) in the sum; here they leave the sum.
    share: how much of the margin is asked for, in [0, 1]: a method that warms the margin up sets it at a step's begin.
    reads_norms: `target_logit` uses `norms`; if False the classifier may pass None.
    """

    reads_norms = False

    def __init__(self, *, scale: float = 64.0, filter_threshold: float | None = None) -> None:
        super().__init__()
        if scale <= 0:
            raise UserError(f"margin scale must be positive, got {scale}")
        self.scale = float(scale)
        self.filter_threshold = filter_threshold
        self.share = 1.0

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        """T, already times scale: cosine [B] float, labels [B] int64 (-1 = ignored), norms [B] of the embeddings ->
        [B].
        """
        raise TypeError(f"{type(self).__name__} does not define target_logit")

    def end_step(self, norms: Tensor, labels: Tensor) -> None:
        """Update whatever the margin remembers, once a step, from all samples of the global batch: norms [G], labels
        [G].

        Every rank must pass the same numbers, so that the state stays the same on all of them; samples labelled -1 do
        not count.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, the same on every rank; empty for most margins."""
        return dict(self.named_buffers())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave; raises UserError when names differ."""
        own = dict(self.named_buffers())
        if own.keys() != state.keys():
            name = type(self).__name__
            raise UserError(f"margin {name} keeps {sorted(own)}, the checkpoint {sorted(state)}; use the same margin")
        for name, buffer in own.items():
            buffer.copy_(state[name])


class CosFace(Margin):
    """T = s (cos theta - m): CosFace, Wang et al. 2018 (arXiv 1801.09414)."""

    def __init__(self, *, scale: float = 64.0, m: float = 0.4, filter_threshold: float | None = None) -> None:
        super().__init__(scale=scale, filter_threshold=filter_threshold)
        self.m = float(m)

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        return self.scale * (cosine - self.share * self.m)


class Combined(Margin):
    """T = s (cos(m1 theta + m2) - m3): SphereFace, ArcFace and CosFace in one (arXiv 1801.07698, eq. 4).

    `straight_through=True` is arcface_torch's `CombinedMarginLoss`: the same value without the monotone continuation,
    and dT/dcos = s.
    """

    def __init__(
        self,
        *,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.0,
        m3: float = 0.0,
        straight_through: bool = False,
        filter_threshold: float | None = None,
    ) -> None:
        super().__init__(scale=scale, filter_threshold=filter_threshold)
        if m1 < 1 or not 0 <= m2 < math.pi:
            raise UserError(f"combined margin needs m1 >= 1 and 0 <= m2 < pi, got m1={m1}, m2={m2}")
        self.m1, self.m2, self.m3, self.straight_through = float(m1), float(m2), float(m3), straight_through

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        m1, m2, m3 = 1 + self.share * (self.m1 - 1), self.share * self.m2, self.share * self.m3
        if self.straight_through:
            with torch.no_grad():
                change = torch.cos(m1 * angle(cosine) + m2) - m3 - cosine
            return self.scale * (cosine + change)
        return self.scale * angular_target(cosine, m1, torch.full_like(cosine, m2), m3)


class ArcFace(Combined):
    """T = s cos(theta + m): ArcFace, Deng et al. 2019 (arXiv 1801.07698); beyond theta = pi - m, T = s (cos theta - m
    sin m).
    """

    def __init__(
        self,
        *,
        scale: float = 64.0,
        m: float = 0.5,
        straight_through: bool = False,
        filter_threshold: float | None = None,
    ) -> None:
        super().__init__(scale=scale, m2=m, straight_through=straight_through, filter_threshold=filter_threshold)


class ClusterGuided(Margin):
    """Cluster-guided ArcFace (arXiv 2312.04029): ArcFace with one margin per class, T_i = s cos(theta_i + m_{y_i}).

    The margins come from the method that knows the clusters, as context: `classes` int64 [P], the sorted distinct labels
    of the step, and `margins` float [P], radians. With all margins m it is ArcFace(m), bit for bit.
    """

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        classes, margins = context["classes"], context["margins"]
        if not len(classes):  # nothing but ignored samples
            return self.scale * cosine
        place = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)  # -1 reads some margin, at weight 0
        return self.scale * angular_target(cosine, 1.0, self.share * margins[place].to(cosine.dtype))


class AdaFace(Margin):
    """AdaFace, Kim et al. 2022 (arXiv 2204.00964): the margin follows the embedding's norm, a proxy of image quality.

    With z = clip(h (|x| - mean) / (std + 1e-3), -1, 1), T = s (cos(theta - m z) - m - m z), theta - m z kept within
    [1e-3, pi - 1e-3]; no gradient goes through the norm. mean and std follow the batch's by an exponential average
    (starting at the authors' 20 and 100). Deviation: the authors update them before use; here they are read as at the
    step's start and updated once at its end from the whole global batch, so that they do not depend on the number of
    ranks or micro-batches.
    """

    reads_norms = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        scale: float = 64.0,
        m: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.99,
        filter_threshold: float | None = None,
    ) -> None:
        super().__init__(scale=scale, filter_threshold=filter_threshold)
        self.m, self.h, self.momentum = float(m), float(h), float(momentum)
        self.register_buffer("mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(100.0, dtype=torch.float64))

    def target_logit(self, cosine: Tensor, labels: Tensor, norms: Tensor | None = None, **context: Tensor) -> Tensor:
        if norms is None:
            raise ValueError("AdaFace needs the norms of the embeddings")
        clipped = norms.detach().clamp(1e-3, 100.0).to(cosine.dtype)
        quality = ((clipped - self.mean.to(cosine.dtype)) / (self.std.to(cosine.dtype) + 1e-3) * self.h).clamp(-1, 1)
        m = self.share * self.m
        bent = (angle(cosine) - m * quality).clamp(1e-3, math.pi - 1e-3)
        return self.scale * (torch.cos(bent) - m - m * quality)

    @torch.no_grad()
    def end_step(self, norms: Tensor, labels: Tensor) -> None:
        # masked sums rather than a boolean index: no host synchronisation; fewer than two valid samples change nothing
        valid = (labels >= 0).to(torch.float64)
        clipped = norms.detach().to(torch.float64).clamp(1e-3, 100.0)
        count = valid.sum()
        mean = (clipped * valid).sum() / count.clamp_min(1)
        variance = ((clipped - mean).square() * valid).sum() / (count - 1).clamp_min(1)
        weight = (count > 1).to(torch.float64) * (1 - self.momentum)
        self.mean.lerp_(mean, weight)
        self.std.lerp_(variance.sqrt(), weight)


MARGINS: dict[str, type[Margin]] = {
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": Combined,
    "adaface": AdaFace,
    "cluster_guided": ClusterGuided,
}

# values that ask for nothing, so that a recipe section may pass all its fields to any margin
_NEUTRAL: dict[str, Any] = {"m1": 1.0, "m2": 0.0, "m3": 0.0, "straight_through": False}


def create_margin(name: str, scale: float = 64.0, **options: Any) -> Margin:
    """The margin called `name`; options that are None or neutral (m1=1, m2=0, m3=0, straight_through=False) are left
    out.

    Raises UserError for an unknown name or an option that the margin does not have.
    """
    if name not in MARGINS:
        near = difflib.get_close_matches(name, MARGINS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(MARGINS)}"
        raise UserError(f"unknown margin {name!r}; {hint}")
    given = {
        key: value
        for key, value in options.items()
        if value is not None and not (key in _NEUTRAL and value == _NEUTRAL[key])
    }
    known = inspect.signature(MARGINS[name].__init__).parameters.keys() - {"self"}
    for key in given.keys() - known:
        raise UserError(f"margin {name!r} has no option {key!r}; it has {', '.join(sorted(known))}")
    return MARGINS[name](scale=scale, **given)
