"""The Triton kernels in Triton's interpreter (no GPU needed) against the plain PyTorch passes; on a GPU where there is one."""

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below

pytest.importorskip("triton")
from lvtrain.classifier import Numerics, negative_logsumexp
from lvtrain.classifier.logsumexp_triton import coefficients, exponentials, row_gradients, unit_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("width", [1, 37, 130])
def test_exponentials(running, width):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, width, generator=generator) * 9).to(DEVICE)
    column = torch.tensor([0, -3, width - 1, width, 10_000], device=DEVICE)
    maximum = (
        torch.tensor([-torch.inf, 3.0, 50.0, -torch.inf, 0.0], device=DEVICE)
        if running
        else torch.zeros(5, device=DEVICE)
    )
    total = torch.arange(5.0, device=DEVICE)
    kept = logits.masked_fill(
        (torch.arange(width, device=DEVICE) == column[:, None]) | (logits > 12), -torch.inf
    ).double()
    highest = torch.maximum(maximum.double(), kept.amax(1)) if running else torch.zeros(5, device=DEVICE).double()
    shift = highest.clamp(min=-3e38)
    factor = torch.exp(maximum.double() - shift)
    wanted = torch.exp(kept - shift[:, None])
    wanted_total = total * factor + wanted.sum(1)
    out = torch.empty_like(logits)
    fade = exponentials(logits, out, column, maximum, total, running=running, ceiling=12.0, gain=4.0)
    torch.testing.assert_close(out.double(), wanted * 4, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(total.double(), wanted_total, rtol=1e-5, atol=1e-30)
    if running:
        torch.testing.assert_close(fade.double(), factor, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(maximum.double(), highest)


def test_coefficients():
    logits = torch.randn(4, 70, device=DEVICE)
    column, shift = (
        torch.tensor([0, 69, 70, -1], device=DEVICE),
        torch.tensor([1.0, torch.inf, -2.0, 0.0], device=DEVICE),
    )
    value = torch.tensor([-5.0, 7.0, 8.0, 9.0], device=DEVICE)
    wanted = torch.where(logits > 1.0, 0.0, torch.exp(logits - shift[:, None]))
    wanted[0, 0], wanted[1, 69] = -5.0, 7.0
    out = torch.empty_like(logits)
    coefficients(logits, out, column, shift, value, ceiling=1.0)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dim", [16, 37])
def test_rows_are_normalised_and_their_gradient_taken_through_it(dim):
    """Against autograd through F.normalize; a row of zeros among them."""
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(6, dim, generator=generator).to(DEVICE) * 0.01
    source[4] = 0.0
    gradient, factor = torch.randn(6, dim, generator=generator).to(DEVICE), torch.tensor(0.25, device=DEVICE)
    leaf = source.double().requires_grad_()
    wanted = F.normalize(leaf)
    (through,) = torch.autograd.grad(wanted, leaf, gradient.double() * 0.25)
    torch.testing.assert_close(
        unit_rows(source, torch.empty_like(source), eps=1e-12).double(), wanted.detach(), rtol=1e-6, atol=1e-7
    )
    rounded = unit_rows(source, torch.empty_like(source, dtype=torch.float16), eps=1e-12)
    torch.testing.assert_close(rounded.double(), wanted.detach(), rtol=1e-3, atol=1e-7)
    for unit in (False, True):
        got = gradient.clone()
        row_gradients(got, source, factor, got, unit=unit, eps=1e-12)
        expected = 0.25 * (gradient - (gradient * source).sum(1, keepdim=True) * source) if unit else through
        torch.testing.assert_close(
            got.double(), expected.double(), rtol=1e-5, atol=1e-5 * expected[:4].abs().max().item()
        )


@pytest.mark.parametrize("precision", ["float32", "half"])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_whole_primitive_with_the_kernels(precision, threshold):
    """Ragged last chunk, ignored labels, fixed shift (float32) and running maximum (half); several float32 roundings apart."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(101, 16, generator=generator).to(DEVICE).requires_grad_()
    x = torch.randn(9, 16, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 101, (9,), generator=generator).to(DEVICE)
    labels[4] = -1
    answers = []
    for kernel in ("torch", "triton"):
        n, cosine = negative_logsumexp(
            F.normalize(x),
            weight,
            labels,
            scale=64.0,
            threshold=threshold,
            numerics=Numerics(precision, kernel, chunk=40),
        )
        loss = (torch.logaddexp(torch.zeros_like(n), n - 64 * cosine + 25) * (labels >= 0)).mean()
        answers.append((n, *torch.autograd.grad(loss, (x, weight))))
    for plain, fused in zip(*answers):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=3e-6 * plain.abs().max().item())
