"""Margins against formulas in float64 arccos, finite differences, and what arcface_torch computes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lvtrain.classifier.margins import (
    MARGINS,
    AdaFace,
    ArcFace,
    ClusterGuided,
    Combined,
    CosFace,
    Margin,
    create_margin,
)
from lvtrain.errors import UserError
from lvtrain.recipe.classifier import Classifier

EVERY = {**MARGINS.entries(), "cluster_guided": ClusterGuided}

LABELS = torch.tensor([3, 1, 8, 8, 0, 2, 4, 4, 7])
COSINES = torch.linspace(-0.99, 0.99, 9, dtype=torch.float64)
NORMS = torch.linspace(5.0, 60.0, 9, dtype=torch.float64)
CONTEXT = {"classes": torch.tensor([0, 1, 2, 3, 4, 7, 8]), "margins": torch.linspace(0.1, 0.8, 7, dtype=torch.float64)}


def value_and_slope(margin: torch.nn.Module, cosine: Tensor) -> tuple[Tensor, Tensor]:
    cosine = cosine.clone().requires_grad_()
    target = margin.target_logit(cosine, LABELS[: len(cosine)], NORMS[: len(cosine)], **CONTEXT)
    return target.detach(), torch.autograd.grad(target.sum(), cosine)[0]


@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_the_derivative(name: str) -> None:
    options = {"m1": 1.35, "m2": 0.3, "m3": 0.1} if name == "combined" else {}
    margin = EVERY[name](scale=48.0, **options)
    cosine = COSINES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: margin.target_logit(c, LABELS, NORMS, **CONTEXT), (cosine,))


def test_cosface_and_arcface_are_their_formulas() -> None:
    """The defaults are the published scale and margins."""
    assert torch.allclose(value_and_slope(CosFace(), COSINES)[0], 64 * (COSINES - 0.4), atol=1e-13)
    theta = torch.arccos(COSINES)
    expected = torch.where(
        theta + 0.5 <= math.pi, torch.cos(theta + 0.5), COSINES - 0.5 * math.sin(0.5)
    )  # insightface's rule beyond pi - m
    assert torch.allclose(value_and_slope(ArcFace(), COSINES)[0], 64 * expected, atol=1e-12)
    combined = value_and_slope(Combined(scale=64, m1=1.0, m2=0.3, m3=0.2), COSINES[2:])[0]
    assert torch.allclose(combined, 64 * (torch.cos(theta[2:] + 0.3) - 0.2), atol=1e-12)


@pytest.mark.parametrize("m1", [1.0, 1.35, 2.0])
@pytest.mark.parametrize("m2", [0.0, 0.5, 1.2])
def test_angular_targets_fall_with_the_angle(m1: float, m2: float) -> None:
    cosine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    target = Combined(m1=m1, m2=m2).target_logit(cosine, torch.zeros(4001, dtype=torch.int64))
    assert (target.diff() > 0).all()
    if m1 != 1.0:
        assert target[:3900].diff().max() < 64 * 0.01  # and without a jump (near theta = 0 the slope is unbounded)


def arcface_torch_combined(logits: Tensor, labels: Tensor, scale: float, m1: float, m2: float, m3: float) -> Tensor:
    """The operations of arcface_torch's CombinedMarginLoss on whole logits, in its order (a restatement of its formula)."""
    rows = torch.arange(len(labels))
    out = logits.clone()
    if m1 == 1.0 and m3 == 0.0:
        with torch.no_grad():
            angles = out.arccos()
            angles[rows, labels] = angles[rows, labels] + m2
            bent = angles.cos()
        out = logits + (bent - logits).detach()
    else:
        out[rows, labels] = out[rows, labels] - m3
    return out * scale


@pytest.mark.parametrize(("m2", "m3"), [(0.5, 0.0), (0.0, 0.4)])
def test_straight_through_is_arcface_torch(m2: float, m3: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(9, 5, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    labels = torch.randint(0, 5, (9,), generator=generator)
    theirs = arcface_torch_combined(logits, labels, 64.0, 1.0, m2, m3)[torch.arange(9), labels]
    (their_slope,) = torch.autograd.grad(theirs.sum(), logits)
    margin = Combined(m2=m2, m3=m3, straight_through=True)
    ours = margin.target_logit(logits[torch.arange(9), labels], labels)
    (our_slope,) = torch.autograd.grad(ours.sum(), logits)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.equal(our_slope, their_slope)
    assert torch.equal(our_slope.sum(1), torch.full((9,), 64.0, dtype=torch.float64))


def test_arcface_torch_ignores_m2_beside_m3() -> None:
    """So the two values differ, as the docstring of `Combined` says."""
    theirs = arcface_torch_combined(COSINES[:, None], torch.zeros(9, dtype=torch.int64), 1.0, 1.0, 0.3, 0.2)[:, 0]
    ours = Combined(scale=1.0, m2=0.3, m3=0.2, straight_through=True).target_logit(COSINES, LABELS)
    assert torch.allclose(theirs, COSINES - 0.2)
    assert 0.25 < float((ours - theirs).abs().max()) < 0.31


def test_straight_through_differs_only_in_slope_below_the_bend() -> None:
    # arcface_torch's slopes are 64 where the true derivative is cos m + cos(theta) sin m / sin(theta)
    value, slope = value_and_slope(ArcFace(m=0.5), COSINES[2:])
    other_value, other_slope = value_and_slope(ArcFace(m=0.5, straight_through=True), COSINES[2:])
    assert torch.allclose(value, other_value, atol=1e-12)
    cosine = COSINES[2:]
    true = math.cos(0.5) + cosine * math.sin(0.5) / torch.sqrt(1 - cosine**2)
    assert torch.allclose(slope, 64 * true, atol=1e-10)
    assert (other_slope == 64).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_and_beyond_one(name: str, dtype: torch.dtype) -> None:
    options = {"m1": 1.2, "m2": 0.5} if name == "combined" else {}
    edge = torch.tensor([-1.0, 1.0, -1.0 - 1e-6, 1.0 + 1e-6, 1.0 - 1e-7, -1.0 + 1e-7], dtype=dtype).requires_grad_()
    margin = EVERY[name](**options)
    norms, context = (
        torch.full((6,), 20.0, dtype=dtype),
        {"classes": torch.tensor([0]), "margins": torch.full((1,), 0.5, dtype=dtype)},
    )
    target = margin.target_logit(edge, torch.zeros(6, dtype=torch.int64), norms, **context)
    target.sum().backward()
    assert torch.isfinite(target).all() and torch.isfinite(edge.grad).all()
    # a target never exceeds what the plain cosine gives, up to AdaFace's bonus for easy low-quality samples
    assert (target <= 64 * (1 + 1e-5)).all()


def test_float32_near_one_keeps_the_angle() -> None:
    theta = torch.tensor([1e-3, 3e-3, 1e-2, 0.1], dtype=torch.float64)
    cosine = torch.cos(theta).to(torch.float32)
    target = ArcFace(scale=1.0, m=0.5).target_logit(cosine, LABELS[:4])
    exact = torch.cos(torch.arccos(cosine.to(torch.float64)) + 0.5)
    assert torch.allclose(target.to(torch.float64), exact, atol=2e-7)


def test_cluster_guided_with_one_margin_is_arcface_bit_for_bit() -> None:
    cosine = torch.linspace(-1, 1, 1001, dtype=torch.float32).requires_grad_()
    labels = torch.zeros(1001, dtype=torch.int64)
    ours = ClusterGuided().target_logit(cosine, labels, classes=torch.tensor([0]), margins=torch.tensor([0.5]))
    arcface = ArcFace(m=0.5).target_logit(cosine, labels)
    assert torch.equal(ours, arcface)
    assert torch.equal(*(torch.autograd.grad(target.sum(), cosine)[0] for target in (ours, arcface)))


def test_cluster_guided_looks_the_margin_up_by_label() -> None:
    target = ClusterGuided(scale=1.0).target_logit(COSINES, LABELS, **CONTEXT)
    table = dict(zip(CONTEXT["classes"].tolist(), CONTEXT["margins"].tolist()))
    for cosine, label, value in zip(COSINES.tolist(), LABELS.tolist(), target.tolist()):
        bent = math.acos(cosine) + table[label]
        expected = math.cos(bent) if bent <= math.pi else cosine - table[label] * math.sin(table[label])
        assert value == pytest.approx(expected, abs=1e-13)
    nothing = torch.zeros(0)
    ignored = ClusterGuided().target_logit(COSINES, -torch.ones_like(LABELS), classes=nothing.long(), margins=nothing)
    assert torch.isfinite(ignored).all()


def adaface_as_published(
    cosine: Tensor, norms: Tensor, mean: float, std: float, m: float, h: float, s: float
) -> Tensor:
    """Algorithm of the AdaFace paper (eqs. 13-16), one sample at a time in plain Python."""
    out = []
    for c, norm in zip(cosine.tolist(), norms.tolist()):
        z = max(-1.0, min(1.0, (min(max(norm, 1e-3), 100.0) - mean) / (std + 1e-3) * h))
        bent = min(max(math.acos(c) - m * z, 1e-3), math.pi - 1e-3)
        out.append(s * (math.cos(bent) - (m + m * z)))
    return torch.tensor(out, dtype=torch.float64)


def test_adaface_follows_the_paper_and_its_statistics() -> None:
    margin = AdaFace(scale=64.0, m=0.4)
    mean, std = 20.0, 100.0
    generator = torch.Generator().manual_seed(1)
    for count in (9, 4, 7):
        norms = torch.rand(count, generator=generator, dtype=torch.float64) * 40
        cosine = torch.rand(count, generator=generator, dtype=torch.float64) * 1.9 - 0.95
        labels = torch.arange(count)
        expected = adaface_as_published(cosine, norms, mean, std, 0.4, 0.333, 64.0)
        assert torch.allclose(margin.target_logit(cosine, labels, norms), expected, atol=1e-10)
        # one ignored sample, with an absurd norm, must not move the statistics
        margin.end_step(torch.cat([norms, torch.tensor([1e6], dtype=torch.float64)]), torch.cat([labels, -labels[1:2]]))
        mean = 0.99 * mean + 0.01 * float(norms.mean())
        std = 0.99 * std + 0.01 * float(norms.std())
        assert float(margin.mean) == pytest.approx(mean, rel=1e-12)
        assert float(margin.std) == pytest.approx(std, rel=1e-12)
    again = AdaFace()
    again.load_state({name: tensor.clone() for name, tensor in margin.state().items()})
    assert torch.equal(again.mean, margin.mean) and torch.equal(again.std, margin.std)


def test_adaface_ignores_an_empty_step_and_the_norms_gradient() -> None:
    margin = AdaFace()
    margin.end_step(torch.tensor([3.0, 4.0]), torch.tensor([-1, 5]))
    assert float(margin.mean) == 20.0 and float(margin.std) == 100.0
    norms = torch.tensor([20.0], requires_grad=True)
    cosine = torch.tensor([0.3], requires_grad=True)
    margin.target_logit(cosine, LABELS[:1], norms).backward()
    assert norms.grad is None


@pytest.mark.parametrize(
    ("whole", "half"),
    [
        (CosFace(m=0.4), CosFace(m=0.2)),
        (ArcFace(m=0.5), ArcFace(m=0.25)),
        (ArcFace(m=0.5, straight_through=True), ArcFace(m=0.25, straight_through=True)),
        (Combined(m1=1.5, m2=0.25, m3=0.5), Combined(m1=1.25, m2=0.125, m3=0.25)),
        (AdaFace(m=0.4), AdaFace(m=0.2)),
        (ClusterGuided(), ClusterGuided()),
    ],
    ids=lambda margin: type(margin).__name__,
)
def test_a_share_of_a_margin_is_a_smaller_margin(whole: Margin, half: Margin) -> None:
    norms = torch.linspace(1.0, 60.0, len(COSINES), dtype=torch.float64)
    smaller = {"classes": CONTEXT["classes"], "margins": CONTEXT["margins"] / 2}
    whole.warmup_factor = 0.5
    assert torch.equal(
        whole.target_logit(COSINES, LABELS, norms, **CONTEXT), half.target_logit(COSINES, LABELS, norms, **smaller)
    )
    whole.warmup_factor = 0.0
    assert torch.allclose(
        whole.target_logit(COSINES, LABELS, norms, **CONTEXT), 64 * COSINES, atol=64e-3
    )  # AdaFace ends at an angle of 1e-3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: CosFace(m2=0.5), "m2"),
        (lambda: CosFace(scale=0), "scale"),
        (lambda: Combined(m1=0.5), "m1"),
        (lambda: ArcFace(m=4.0), "m: "),
        (lambda: AdaFace(momentum=1.0), "momentum"),
        (lambda: CosFace(warmup="3 samples"), "warmup"),
    ],
)
def test_a_wrong_parameter_is_named(wrong: Callable[[], Margin], named: str) -> None:
    with pytest.raises(UserError, match=named):
        wrong()


def test_statistics_of_another_margin_are_refused() -> None:
    with pytest.raises(UserError, match="AdaFace"):
        AdaFace().load_state({})


def test_every_parameter_of_a_margin_is_a_key_of_its_section() -> None:
    section = Classifier.model_validate(
        {"margin": {"name": "adaface", "m": 0.3, "h": 0.2, "momentum": 0.9, "scale": 48, "filter_threshold": 0.7}}
    ).margin
    margin = create_margin(section)
    assert isinstance(margin, AdaFace) and margin.settings == section
    assert (margin.scale, margin.filter_threshold, margin.settings.h, margin.settings.momentum) == (48.0, 0.7, 0.2, 0.9)
    # h decides how far the norm moves the margin: at mean + std / h the quality is 1
    margin.mean.fill_(20.0), margin.std.fill_(10.0)
    at, beyond = (margin.target_logit(COSINES, LABELS, torch.full((9,), norm)) for norm in (70.01, 90.0))
    torch.testing.assert_close(at, beyond)
    assert Classifier.model_validate({"margin": "arcface"}).margin == ArcFace().settings
    assert Classifier().margin == CosFace().settings
