"""Where the passes round: numbers that are rounded while they are written have the bits of rounding them afterwards."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("factor", [torch.float16, torch.bfloat16])
def test_rounding_while_writing_is_rounding_after_it(factor: torch.dtype, device: str) -> None:
    logits = (torch.randn(300, 700, generator=torch.Generator().manual_seed(0)) * 10 - 20).to(device)
    exponentials = logits.exp()
    lifted = (exponentials * 2.0**14).to(factor)
    assert torch.equal(torch.mul(exponentials, 2.0**14, out=torch.empty_like(lifted)), lifted)
    assert torch.equal(torch.exp(logits, out=torch.empty_like(lifted)), exponentials.to(factor))
