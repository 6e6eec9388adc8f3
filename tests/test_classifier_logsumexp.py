"""The primitive and every loss built on it, against `F.cross_entropy` and autograd on materialised logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lvtrain.classifier import Numerics, negative_logsumexp
from lvtrain.classifier.classes import Classes
from lvtrain.classifier.margins import AdaFace, ArcFace, ClusterGuided, Combined, CosFace
from lvtrain.classifier.passes import forward_pass

CLASSES, DIM, BATCH = 211, 24, 37  # ragged against every chunk size below


def data(seed=0, dtype=torch.float64, classes=CLASSES, batch=BATCH, dim=DIM, late=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, dim, generator=generator, dtype=torch.float64) * torch.rand(
        classes, 1, generator=generator, dtype=torch.float64
    )
    labels = torch.randint(0, classes, (batch,), generator=generator)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    if late:  # cosine to the own centre near 0.75
        x = F.normalize(x) * 0.9 + F.normalize(weight)[labels]
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def lean(**settings):
    """Nothing is kept for backward beyond what the gradient's memory holds."""
    return Numerics(**{"keep_mb": 0.0} | settings)


def ours(x, weight, labels, margin, context=None, **settings):
    n, cosine = negative_logsumexp(F.normalize(x), weight, labels, scale=margin.scale, numerics=lean(**settings))
    target = margin.target_logit(cosine, labels, x.detach().norm(dim=1), **(context or {}))
    return torch.logaddexp(torch.zeros_like(n), n - target).mean()


def materialised(x, weight, labels, margin, context=None):
    cosine = F.normalize(x) @ F.normalize(weight).t()
    index = torch.arange(len(labels))
    target = margin.target_logit(cosine[index, labels], labels, x.detach().norm(dim=1), **(context or {}))
    logits = (margin.scale * cosine).index_put((index, labels), target)
    return F.cross_entropy(logits, labels)


MARGINS = {
    "cosface": CosFace(),
    "arcface": ArcFace(),
    "arcface, straight through": ArcFace(straight_through=True),
    "combined": Combined(m1=1.2, m2=0.2, m3=0.1),
    "adaface": AdaFace(),
    "cluster guided": ClusterGuided(),
    "small scale": CosFace(scale=16.0, m=0.2),
    "scale beyond the fixed shift": CosFace(scale=900.0, m=0.1),
}


@pytest.mark.parametrize("chunk", [None, 1, 50, 210])
@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_equals_cross_entropy_on_materialised_logits(name, chunk):
    x, weight, labels = data()
    context = {"classes": torch.arange(CLASSES), "margins": torch.linspace(0.3, 0.6, CLASSES, dtype=torch.float64)}
    expected = materialised(x, weight, labels, MARGINS[name], context)
    loss = ours(x, weight, labels, MARGINS[name], context, chunk=chunk)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-13)
    for got, wanted in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("keep_mb", [0.0, 250 / 2**20])
def test_gradcheck(keep_mb):
    """Two chunks of three in the gradient's memory; the third recomputed, or kept in more memory (5 samples x 3 classes x 8 bytes = 120)."""
    x, weight, labels = data(classes=11, batch=5, dim=4)
    labels[2] = -1
    scale = torch.linspace(2.0, 9.0, 11, dtype=torch.float64)
    for s in (7.0, scale):

        def primitive(x, weight, s=s):
            return negative_logsumexp(
                F.normalize(x), weight, labels, scale=s, numerics=Numerics(chunk=4, keep_mb=keep_mb)
            )

        # gradcheck goes backward twice, and the second time nothing is kept any more: equal to rounding
        assert torch.autograd.gradcheck(primitive, (x, weight), nondet_tol=1e-13)


def test_gradients_of_either_sign_and_of_the_cosine_alone():
    x, weight, labels = data()
    coefficients = torch.linspace(-1.0, 1.0, BATCH, dtype=torch.float64)  # one of them is 0
    assert BATCH % 2 == 1
    n, cosine = negative_logsumexp(F.normalize(x), weight, labels, scale=64.0, numerics=lean(chunk=60))
    full = F.normalize(x) @ F.normalize(weight).t()
    index = torch.arange(BATCH)
    n_ref = torch.logsumexp((64 * full).index_put((index, labels), torch.tensor(-math.inf, dtype=torch.float64)), dim=1)
    for loss, expected in (
        ((n * coefficients).sum(), (n_ref * coefficients).sum()),
        (cosine.sum(), full[index, labels].sum()),
        ((cosine * n).sum(), (full[index, labels] * n_ref).sum()),
    ):
        got, wanted = (torch.autograd.grad(value, (x, weight), retain_graph=True) for value in (loss, expected))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


def test_per_class_scale_filtering_mask_and_subset_together():
    """All options at once against plain autograd; scales up to 300 need the running maximum."""
    x, weight, labels = data(3)
    labels[5] = -1
    scale = torch.linspace(1.0, 300.0, CLASSES, dtype=torch.float64)
    keep = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1)) < 0.6
    indices = keep.nonzero().squeeze(1)
    mask = torch.arange(CLASSES) % 7 != 0
    n, cosine = negative_logsumexp(
        F.normalize(x), weight, labels, scale=scale, indices=indices, threshold=0.3, mask=mask, numerics=lean(chunk=32)
    )
    full = F.normalize(x) @ F.normalize(weight).t()
    own = F.one_hot(labels.clamp(min=0), CLASSES).bool() & (labels >= 0)[:, None]
    out = ~keep[None] | ~mask[None] | (full > 0.3) | (own & keep[None])
    expected = torch.logsumexp((full * scale).masked_fill(out, -math.inf), dim=1)
    here = (labels >= 0) & keep[labels.clamp(min=0)]
    expected_cosine = torch.where(here, full[torch.arange(BATCH), labels.clamp(min=0)], 0.0)
    torch.testing.assert_close(n, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(cosine, expected_cosine, rtol=1e-13, atol=1e-13)
    loss, loss_ref = (
        torch.logaddexp(torch.zeros_like(a), a - 20 * b).sum() for a, b in ((n, cosine), (expected, expected_cosine))
    )
    got, wanted = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(loss_ref, (x, weight))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    assert got[1][~keep].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own,others", [(1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, 1.0)])
def test_cosines_at_plus_and_minus_one(own, others, dtype):
    """The furthest logits a scale of 64 can give, in both directions: no overflow, no lost sum, finite gradients."""
    direction = F.normalize(torch.arange(1.0, 9.0, dtype=dtype), dim=0)
    weight = torch.stack([own * direction] + [others * direction] * 30).requires_grad_()
    x = direction[None].clone().requires_grad_()
    labels = torch.zeros(1, dtype=torch.int64)
    for margin in (CosFace(), ArcFace()):
        loss, expected = (
            ours(x, weight, labels, margin, chunk=8),
            materialised(x.double(), weight.double(), labels, margin),
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-30)
        for gradient in torch.autograd.grad(loss, (x, weight)):
            assert gradient.isfinite().all()


def test_no_negative_at_all():
    x, weight, _ = data(classes=1)
    n, cosine = negative_logsumexp(F.normalize(x), weight, torch.zeros(BATCH, dtype=torch.int64), scale=64.0)
    assert (n == -math.inf).all()
    loss = torch.logaddexp(torch.zeros_like(n), n - 64 * cosine).sum()
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert gradient.abs().max() == 0


def test_ignored_samples_change_nothing():
    x, weight, labels = data()
    n, cosine = negative_logsumexp(F.normalize(x), weight, labels, scale=64.0, numerics=lean(chunk=64))
    wanted = torch.autograd.grad((n - 64 * cosine)[: BATCH - 4].sum(), (x, weight))
    ignored = labels.clone()
    ignored[BATCH - 4 :] = -1
    n, cosine = negative_logsumexp(F.normalize(x), weight, ignored, scale=64.0, numerics=lean(chunk=64))
    got = torch.autograd.grad(((n - 64 * cosine) * (ignored >= 0)).sum(), (x, weight))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def frobenius(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def test_float32_is_no_worse_than_the_materialised_version():
    x, weight, labels = data(dtype=torch.float32, classes=2003, batch=64, dim=128, late=True)
    exact = materialised(x.double(), weight.double(), labels, CosFace())
    truth = torch.autograd.grad(exact, (x, weight))
    loss, plain = ours(x, weight, labels, CosFace(), chunk=300), materialised(x, weight, labels, CosFace())
    assert abs(loss.item() - exact.item()) <= abs(plain.item() - exact.item()) + 2e-6 * exact.item()
    for a, b, c in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(plain, (x, weight)), truth):
        assert frobenius(a, c.double()) <= frobenius(b, c.double()) + 2e-6


@pytest.mark.parametrize("keep_mb", [0.0, 0.02, 100.0])
@pytest.mark.parametrize("scale", [64.0, 300.0])
@pytest.mark.parametrize("batch", [5, DIM, DIM + 1, 2 * DIM + 7, 40 * DIM])
def test_kept_exponentials_change_nothing(batch, scale, keep_mb):
    """All, some or no chunks in the gradient's memory, then some or all in further memory.

    The second time backward computes everything again: the same numbers bit for bit with a fixed shift, to rounding with
    the running maximum (scale 300).
    """
    x, weight, labels = data(dtype=torch.float32, batch=batch)
    labels[2] = -1
    n, cosine = negative_logsumexp(
        F.normalize(x), weight, labels, scale=scale, threshold=0.6, numerics=Numerics(chunk=50, keep_mb=keep_mb)
    )
    loss = (torch.logaddexp(torch.zeros_like(n), n - scale * cosine) * (labels >= 0)).sum()
    kept = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = [gradient.clone() for gradient in kept]
    for got, recomputed in zip(again, torch.autograd.grad(loss, (x, weight))):
        if scale == 64.0:
            assert torch.equal(got, recomputed)
        else:
            torch.testing.assert_close(got, recomputed, rtol=0, atol=2e-6 * recomputed.abs().max().item())
    assert all(map(torch.equal, kept, again))  # the first answer's memory is its own


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of all matrix products (PyTorch's own counter does not know products into given memory)."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "precision,batch,matmuls", [("float32", 32, 3.0), ("float32", 64, 3.5), ("half", 64, 3.0), ("half", 128, 3.5)]
)
def test_exponentials_in_the_gradients_memory_save_a_matmul(precision, batch, matmuls):
    """B up to d (2 d in 16 bits): three matmuls instead of four; twice that: half of it saved."""
    x, weight, labels = data(dtype=torch.float32, classes=1600, batch=batch, dim=32)
    with Multiplications() as counter:
        ours(x, weight, labels, CosFace(), chunk=100, precision=precision).backward()
    assert counter.count == matmuls * batch * 1600 * 32


@pytest.mark.parametrize("precision,itemsize", [("float32", 4), ("half", 2), ("bfloat16", 2)])
def test_kept_exponentials_take_the_memory_they_are_given(precision, itemsize):
    x, weight, labels = data(dtype=torch.float32)
    numerics = Numerics(precision, chunk=50, keep_mb=120 * BATCH * itemsize / 2**20)
    classes = Classes(weight.detach(), 64.0, numerics=numerics)
    running = classes.needs_running_max(CLASSES)
    part = forward_pass(
        classes, F.normalize(x.detach()), classes.positions(labels, 0), running=running, need_weighted=True
    )
    assert [kept.exponentials.nbytes for kept in part.kept] == [50 * BATCH * itemsize] * 2


def test_no_tensor_of_logits_is_ever_allocated():
    """Counted in allocations: nothing in forward and backward comes near [B, C], beyond the rows' gradient itself."""
    batch, classes, dim = 96, 20_000, 16
    x, weight, labels = data(dtype=torch.float32, classes=classes, batch=batch, dim=dim)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x, weight, labels, CosFace(), chunk=1000).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert classes * dim * 4 <= largest < 2 * classes * dim * 4 < batch * classes * 4 / 2


@pytest.mark.parametrize("precision,bound", [("half", 1e-3), ("bfloat16", 3e-3)])
def test_16_bit_gradients_late_in_training(precision, bound):
    """Cosines to the own centre near 0.75, as many classes as a small dataset has, rows of one norm; kept, then recomputed."""
    x, weight, labels = data(dtype=torch.float32, classes=20_000, batch=128, dim=512, late=True)
    weight = F.normalize(weight.detach()).requires_grad_()
    truth = torch.autograd.grad(materialised(x.double(), weight.double(), labels, CosFace()), (x, weight))
    loss = ours(x, weight, labels, CosFace(), precision=precision)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, (x, weight), retain_graph=True), truth):
            assert frobenius(a, b.double()) < bound


@pytest.mark.parametrize("precision,bound", [("half", 1e-3), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("late", [False, True])
def test_error_of_the_16_bit_modes(precision, bound, late):
    """Relative gradient error on a CPU, early and late in training: half below 1e-3, bfloat16 below 3e-3; d = 512.

    Norms are from 1/2 to 2. If one row were a thousand times shorter than the rest, its gradient would dominate, and the error
    would be that of a few exponentials. Once with kept exponentials, once with recomputed ones.
    """
    x, weight, labels = data(dtype=torch.float32, classes=4001, batch=128, dim=512, late=late)
    weight = (F.normalize(weight.detach()) * torch.logspace(-1, 1, len(weight), base=2).unsqueeze(1)).requires_grad_()
    truth = torch.autograd.grad(materialised(x.double(), weight.double(), labels, CosFace()), (x, weight))
    loss = ours(x, weight, labels, CosFace(), precision=precision)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, (x, weight), retain_graph=True), truth):
            assert frobenius(a, b.double()) < bound


def test_deterministic_algorithms_have_all_it_needs():
    x, weight, labels = data(dtype=torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        ours(x, weight, labels, CosFace(), chunk=50).backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_autocast_around_it_changes_nothing():
    x, weight, labels = data(dtype=torch.float32)
    expected = negative_logsumexp(F.normalize(x), weight, labels, scale=64.0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = negative_logsumexp(F.normalize(x), weight, labels, scale=64.0)[0]
    assert torch.equal(got, expected)


# What arcface_torch computes, re-derived from its code: normalise, clamp to [-1, 1], change the target, multiply by s, softmax with the target's
# probability clamped at 1e-30, mean. Its margin functions run without gradient, so the target's derivative is s whatever the margin.


def arcface_torch_loss(x, weight, labels, kind):
    cosine = (F.normalize(x) @ F.normalize(weight).t()).clamp(-1, 1)
    index = torch.arange(len(labels))
    target = cosine[index, labels]
    with torch.no_grad():
        changed = target - 0.4 if kind == "cosface" else torch.cos(torch.arccos(target) + 0.5)
        offset = torch.zeros_like(cosine).index_put((index, labels), changed - target)
    return -torch.softmax((cosine + offset) * 64.0, dim=1)[index, labels].clamp_min(1e-30).log().mean()


@pytest.mark.parametrize(
    "kind,margin", [("cosface", CosFace(m=0.4)), ("arcface", ArcFace(m=0.5, straight_through=True))]
)
def test_values_and_gradients_of_arcface_torch(kind, margin):
    x, weight, labels = data(4, late=True)
    expected, loss = arcface_torch_loss(x, weight, labels, kind), ours(x, weight, labels, margin, chunk=70)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-13)
    for got, wanted in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())
