"""Layers that differ from torch's: BatchNorm whose statistics stay float32, and ReLU6 that keeps less for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Float32Buffers(nn.modules.batchnorm._BatchNorm):
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # .bfloat16() and .half() come through here: the buffers follow the device, and stay float32
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(device=new.device)
        return self


class Float32BatchNorm1d(_Float32Buffers, nn.BatchNorm1d):
    """BatchNorm1d over `[B, dim]` of any float dtype.

    It computes in float32 (float64 for float64), and returns the dtype of its weight.

    torch's BatchNorm1d crashes on a CPU with bfloat16 weights and float32 statistics. `module.bfloat16()` would round
    its running statistics to 8 bits, too few for a running mean of momentum 0.1.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 0.1 if self.momentum is None else self.momentum
        x = x.to(dtype)
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, bias, self.training, momentum, self.eps)
        return y.to(self.weight.dtype)


class Float32BatchNorm2d(_Float32Buffers, nn.BatchNorm2d):
    """BatchNorm2d with float32 statistics; its output has the dtype of its input, as torch's kernels give it."""


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
