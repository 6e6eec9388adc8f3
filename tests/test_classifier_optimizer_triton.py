"""The one-kernel row update in Triton's interpreter (on a GPU where there is one) against the same update in PyTorch."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below

pytest.importorskip("triton")

from lvtrain.classifier.optimizer import CentreOptimizer, OptimizerSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dim", [1, 16, 37])
def test_rows_of_several_steps(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(23, dim, generator=generator).to(DEVICE)
    fused = plain.clone()
    settings = OptimizerSettings(mode="row_sparse", weight_decay=0.1)
    one, other = CentreOptimizer(plain, settings), CentreOptimizer(fused, settings, kernel="triton")
    for step in range(6):
        rows = (torch.rand(23, generator=generator) < (0.0 if step == 2 else 0.4)).nonzero().squeeze(1).to(DEVICE)
        gradient = torch.randn(len(rows), dim, generator=generator).to(DEVICE)
        before = fused.clone()
        for optimizer in (one, other):
            optimizer.step(gradient, rows, lr=1e-2)
        untouched = torch.ones(23, dtype=torch.bool, device=DEVICE)
        untouched[rows] = False
        assert torch.equal(fused[untouched], before[untouched])
        torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-7)
    one.step(torch.ones_like(plain), lr=1e-2)  # all rows, in order
    other.step(torch.ones_like(plain), lr=1e-2)
    for name, tensor in one.state().items():
        torch.testing.assert_close(other.state()[name], tensor, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(),
        OptimizerSettings("sgd", "row_sparse"),
        OptimizerSettings(mode="row_sparse", moments="bfloat16"),
    ],
)
def test_what_the_kernel_does_not_do_stays_with_pytorch(settings: OptimizerSettings) -> None:
    weights = [torch.ones(3, 4, device=DEVICE) for _ in range(2)]
    for weight, kernel in zip(weights, ("torch", "triton")):
        CentreOptimizer(weight, settings, kernel=kernel).step(torch.ones_like(weight), lr=0.1)  # type: ignore[arg-type]
    assert torch.equal(*weights)
