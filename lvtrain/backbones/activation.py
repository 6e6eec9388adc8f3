"""ReLU6 that keeps its output for the backward pass, not its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _ReLU6ByOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], y, 0.0, 6.0)


class ReLU6(nn.Module):
    """ReLU6 of any shape, with torch's gradient bit for bit, and less memory.

    The linear layer that follows keeps the output anyway. So the input need not be kept: 8 of 36 bytes x dim for each
    token and block in bfloat16. torch's `ReLU6(inplace=True)` saves nothing, because it keeps a clone of its input.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ReLU6ByOutput.apply(x) if torch.is_grad_enabled() and x.requires_grad else F.relu6(x)
