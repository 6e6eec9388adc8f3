"""What the first loss of a margin softmax must be, and what another value means.

At the first step the class centres are random, so every cosine c has the distribution of a random direction's in d
dimensions: mean 0, variance 1/d. This holds whatever the embeddings are. With n classes in the step:

    N = E log sum_{j < n} exp(s c_j)      log n + s^2 / (2 d) - s^4 / (4 d^3) for many classes
    T = E target_logit(c)                 -s m for CosFace, -s sin m for ArcFace, nearly -s m for AdaFace
    L = E log(1 + sum over the anchors a of exp(N - T_a))     N - T for one anchor, and log 2 more for two equal ones

For few classes N is lower, because rare large cosines carry its sum: by 0.24 for 500 classes and 1.5 for 10, with s = 64
and d = 512. So N is computed exactly, from the distribution of the sum (`negatives`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from lvtrain.classifier.margins import Margin, create_margin
from lvtrain.recipe.classifier import MarginSection

_NODES = 481  # cosines of the quadrature
_WIDEST = 12.0  # standard deviations of a cosine that it covers
_CHANCE = 4.0  # standard deviations that chance explains
_ROUNDING = 0.003  # share of the loss: seven public logs are within 0.001 of the formula


@dataclass(frozen=True)
class FirstLoss:
    """What the loss of a run's first step must be.

    Attributes:
        expected: the loss.
        bound: a deviation up to this is chance.
        what: the settings that it follows from.
        softmax: the margin softmax that it is of; None for another loss.
        share: of the softmax in the loss; the rest is another term.
    """

    expected: float
    bound: float
    what: str
    softmax: Softmax | None = None
    share: float = 1.0

    def mixed(self, share: float, other: float, other_bound: float, what: str) -> FirstLoss:
        """`share` of this loss and the rest of another one, whose expectation and bound are given."""
        expected = share * self.expected + (1 - share) * other
        bound = share * self.bound + (1 - share) * other_bound
        return FirstLoss(expected, bound, f"{self.what}, {what}", self.softmax, share * self.share)


@dataclass(frozen=True)
class Softmax:
    """A margin softmax with random class centres.

    Attributes:
        margin: settings of the margin.
        identities: C.
        classes: n, the classes that take part in a step.
        dim: d, length of the embedding.
        distinct: identities in the global batch.
        factor: share of the margin that applies, below 1 while it warms up.
        anchors: settings of the margins of further anchors that begin at the class centres.
    """

    margin: MarginSection
    identities: int
    classes: int
    dim: int
    distinct: int
    factor: float = 1.0
    anchors: tuple[MarginSection, ...] = ()

    def loss(self) -> float:
        """The expected loss."""
        return expected_loss(
            [self._margin(each) for each in (self.margin, *self.anchors)], classes=self.classes, dim=self.dim
        )

    def _margin(self, section: MarginSection) -> Margin:
        margin = create_margin(section)
        margin.warmup_factor = self.factor
        return margin

    def first_loss(self) -> FirstLoss:
        """The expected loss with its bound: chance of the class centres' draw, and rounding."""
        scale = self.margin.scale
        _, variance = negatives(scale, self.classes - 1, self.dim)
        chance = math.sqrt(variance + scale**2 / self.dim / max(1, self.distinct))
        expected = self.loss()
        return FirstLoss(expected, _CHANCE * chance + _ROUNDING * abs(expected), self._what(), self)

    def changed(self, **changes: Any) -> Softmax:
        """The same with other values."""
        return replace(self, **changes)

    def scaled(self, scale: float) -> Softmax:
        """The same with another scale."""
        sections = [each.model_copy(update={"scale": scale}) for each in (self.margin, *self.anchors)]
        return replace(self, margin=sections[0], anchors=tuple(sections[1:]))

    def target_at_zero(self) -> float:
        """The target logit of a cosine of 0."""
        zero = torch.zeros(1, dtype=torch.float64)
        labels = torch.zeros(1, dtype=torch.int64)
        target = self._margin(self.margin).target_logit(zero, labels, torch.full_like(zero, math.sqrt(self.dim)))
        return float(target.detach())

    def _what(self) -> str:
        section = self.margin
        sizes = [
            f"{name} {value:g}"
            for name in ("m", "m1", "m2", "m3")
            if isinstance(value := getattr(section, name, None), float)
        ]
        warm = f" at {self.factor:.0%} (warm-up)" if self.factor < 1 else ""
        of = "" if self.classes == self.identities else f" of {self.identities:,}"
        anchors = f", {1 + len(self.anchors)} anchors" if self.anchors else ""
        return f"{section.name} {' '.join(sizes)}{warm}, scale {section.scale:g}, {self.classes:,}{of} classes{anchors}"


def classes_in_step(identities: int, sample_rate: float, global_batch: int) -> tuple[int, int]:
    """The classes that take part in a step, and those in its batch where all classes are equally frequent.

    They are r C of all C, or those of the batch if these are more (Partial FC's rule).
    """
    distinct = round(-identities * math.expm1(global_batch * math.log1p(-1 / identities))) if identities > 1 else 1
    sampled = identities if sample_rate >= 1 else max(int(sample_rate * identities), distinct)
    return sampled, distinct


def cosines(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of random directions and their weights, float64 [K]: the density is (1 - c^2)^((d - 3) / 2)."""
    widest = min(1.0 - 1e-9, _WIDEST / math.sqrt(dim))
    nodes = np.linspace(-widest, widest, _NODES)
    weights = np.exp((dim - 3) / 2 * np.log1p(-(nodes**2)))
    return nodes, weights / weights.sum()


@cache
def negatives(scale: float, count: int, dim: int) -> tuple[float, float]:
    """Mean and variance of log sum_{j < count} exp(scale c_j) for cosines of random directions; -inf for none.

    With E an exponential variable, P(log E - log S > u) = E exp(-e^u S) = (E exp(-e^(u + scale c)))^count. The mean and
    the variance of log E are -0.5772 and pi^2 / 6.
    """
    if count < 1:
        return -math.inf, 0.0
    nodes, weights = cosines(dim)
    u = np.linspace(-scale - math.log(count) - 4, scale * float(nodes[-1]) + 46, 1201)
    # 1 - E exp(-e^(u + s c)), without the loss of digits of a difference
    missing = -np.expm1(-np.exp(np.minimum(u[:, None] + scale * nodes, 50.0))) @ weights
    survival = np.exp(count * np.log1p(-np.minimum(missing, 1 - 1e-16)))
    middle, mass = (u[1:] + u[:-1]) / 2, survival[:-1] - survival[1:]
    mean = float((middle * mass).sum())
    variance = float(((middle - mean) ** 2 * mass).sum())
    return -np.euler_gamma - mean, max(0.0, variance - math.pi**2 / 6)


def expected_loss(anchors: list[Margin], *, classes: int, dim: int) -> float:
    """E log(1 + sum over the anchors of exp(N - T)), with the sample's own cosine random, too."""
    nodes, weights = cosines(dim)
    cosine = torch.from_numpy(nodes)
    labels, norms = torch.zeros(len(nodes), dtype=torch.int64), torch.full_like(cosine, math.sqrt(dim))
    n, _ = negatives(anchors[0].scale, classes - 1, dim)
    terms = [n - margin.target_logit(cosine, labels, norms) for margin in anchors]
    each = torch.logsumexp(torch.stack([torch.zeros_like(cosine), *terms]), dim=0)
    return float((each.detach().numpy() * weights).sum())


@dataclass(frozen=True)
class Cause:
    """What would give the loss that was found: its kind, the value that gives it (None where there is none), and words."""

    kind: str
    value: float | None
    text: str


@dataclass(frozen=True)
class Comparison:
    """A first loss beside what it must be.

    Attributes:
        found: the loss of step 1.
        wanted: what it must be.
        causes: each one alone would give the loss that was found; empty where the loss is as expected.
    """

    found: float
    wanted: FirstLoss
    causes: tuple[Cause, ...] = ()

    @property
    def agrees(self) -> bool:
        return abs(self.found - self.wanted.expected) <= self.wanted.bound

    @property
    def text(self) -> str:
        """One line."""
        wanted = self.wanted
        said = f"first loss {self.found:.2f}, expected {wanted.expected:.2f} ± {wanted.bound:.2f} ({wanted.what})"
        if self.agrees:
            return said
        side = "higher" if self.found > wanted.expected else "lower"
        return f"{said}: {side} than chance explains. It would come from: {'; or '.join(c.text for c in self.causes)}"

    def fields(self) -> dict[str, Any]:
        """For an event."""
        found: dict[str, Any] = {"loss": round(self.found, 4), "expected": round(self.wanted.expected, 4)}
        found |= {"bound": round(self.wanted.bound, 4), "agrees": self.agrees}
        return found if self.agrees else found | {"causes": {cause.kind: cause.value for cause in self.causes}}


def compare(wanted: FirstLoss, found: float) -> Comparison:
    """Compares the loss of step 1 with what it must be."""
    plain = Comparison(found, wanted)
    return plain if plain.agrees else Comparison(found, wanted, tuple(_causes(wanted, found)))


def _causes(wanted: FirstLoss, found: float) -> list[Cause]:
    softmax = wanted.softmax
    if softmax is None:
        return [Cause("settings", None, "another number of prototypes, or other temperatures")]
    # the softmax's part, if the other term is as expected
    own = wanted.expected + (found - wanted.expected) / wanted.share
    section, expected, bound = softmax.margin, softmax.loss(), min(wanted.bound / wanted.share, 1.0)
    if own < 0.5 and expected > 1.5:
        known = "a batch whose images have no label, or a classifier that already knows these identities"
        return [Cause("no_labels", None, known)]
    if own > expected + section.scale:
        return [Cause("not_unit", None, "embeddings or class centres that are not of unit length")]
    causes = []
    without = softmax.changed(factor=0.0).loss()
    if abs(own - without) <= bound and softmax.factor > 0:
        causes.append(Cause("no_margin", without, "no margin at all"))
    m = getattr(section, "m", None)
    if m and section.name in ("cosface", "arcface"):
        size, other, name = (m, math.sin(m), "ArcFace") if section.name == "cosface" else (math.sin(m), m, "CosFace")
        value = expected + section.scale * (other - size) * softmax.factor
        if abs(own - value) <= bound:
            causes.append(Cause("kind_of_margin", value, f"{name} with m {m:g} ({value:.2f})"))
    zero = math.log(max(1, softmax.classes - 1)) - softmax.target_at_zero()
    if abs(own - zero) <= min(bound, 0.5) < abs(zero - expected):
        causes.append(Cause("all_zero", zero, f"embeddings of zeros, so that all cosines are 0 ({zero:.2f})"))
    return causes + _solved(softmax, own, expected)


def _solved(softmax: Softmax, found: float, expected: float) -> list[Cause]:
    """The scale, the size of the margin and the number of classes that would each give the loss alone."""
    section, causes = softmax.margin, []
    low, high = 0.5, 3 * section.scale
    if softmax.scaled(low).loss() < found < softmax.scaled(high).loss():
        for _ in range(11):
            middle = (low + high) / 2
            low, high = (middle, high) if softmax.scaled(middle).loss() < found else (low, middle)
        causes.append(Cause("scale", low, f"a scale of {low:.3g} (the recipe: {section.scale:g})"))
    m = getattr(section, "m", None)
    if m and softmax.factor > 0:
        steep = math.cos(m) if section.name == "arcface" else 1.0
        value = m + (found - expected) / (section.scale * softmax.factor * steep)
        if 0 <= value <= 1:
            causes.append(Cause("margin", value, f"a margin of about {value:.2f} (the recipe: {m:g})"))
    classes = softmax.classes * math.exp(max(-60.0, min(60.0, found - expected)))
    if 2 <= classes <= 1e9:
        said = (
            f"about {classes:,.0f} classes in the step (expected: {softmax.classes:,}; identities, sample rate, ranks)"
        )
        causes.append(Cause("classes", classes, said))
    return causes or [
        Cause("unknown", None, "more than one wrong setting; check the scale, the margin and the number of classes")
    ]
