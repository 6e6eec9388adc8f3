"""BatchNorm whose statistics and arithmetic stay float32, whatever precision the rest of the network runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Float32Buffers(nn.modules.batchnorm._BatchNorm):
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # .bfloat16() and .half() reach the buffers through here: follow the device, keep the bits
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(device=new.device)
        return self


class Float32BatchNorm1d(_Float32Buffers, nn.BatchNorm1d):
    """BatchNorm1d over `[B, dim]` of any float dtype that computes in float32 and returns its weight's dtype.

    Plain BatchNorm1d crashes on CPU with bfloat16 weights beside float32 statistics, and `module.bfloat16()` would
    round running statistics to 8 bits, too few to hold a running mean with momentum 0.1. float64 is computed in float64.
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
    """BatchNorm2d that keeps float32 statistics; its output has the input's dtype, as the library's kernels give it."""
