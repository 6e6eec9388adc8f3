"""Which kernel computes between the matmuls, and the self-test that Triton's must pass: each kernel once against torch.

`kernel: auto` takes Triton on CUDA where the self-test passes on every rank, on the device that will train. It runs once
a process and device, in about a second: the inputs are small, and most of the time goes into compiling kernels that
training needs anyway.

The self-test runs both passes over the classes in each number format, and two row-sparse AdamW updates. Together they launch
every kernel of `logsumexp_triton` and `optimizer_triton`. The shapes are such that pass 2 finds some exponentials kept
and computes others again, and that the last chunk is ragged.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lvtrain.classifier.classes import Classes
from lvtrain.classifier.numerics import Kernel, Numerics, Precision
from lvtrain.classifier.optimizer import CentreOptimizer, OptimizerSettings
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.distributed.collectives import Group, group_size, true_everywhere
from lvtrain.errors import UserError

Chosen = Literal["torch", "triton"]

# largest difference, as a share of the tensor's largest number: a few roundings of the operands' format
_ROUNDING: dict[Precision, float] = {"float32": 2e-5, "half": 4e-3, "bfloat16": 3e-2}
_UPDATE_ROUNDING = 1e-5


def choose_kernel(kernel: Kernel, device: torch.device, group: Group = None) -> Chosen:
    """The kernel for `device`: the one place that decides it, alike on every rank of `group`.

    The first call with `auto` on CUDA is a collective of `group`, and the host waits for it. Later ones repeat its answer.

    Raises:
        UserError: `triton` was asked for on a device that it does not run on.
    """
    if kernel == "auto":
        return _tested(device, group, group_size(group)) if device.type == "cuda" else "torch"
    if kernel == "triton" and device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("classifier.numerics.kernel: triton needs a CUDA device; set classifier.numerics.kernel=auto")
    return kernel


def planned_kernel(kernel: Kernel) -> Chosen:
    """The kernel that a plan for a GPU expects: its self-test will pass."""
    return "triton" if kernel == "auto" else kernel


def on_device(numerics: Numerics, device: torch.device, group: Group = None) -> Numerics:
    """The same with the kernel chosen for `device`: `torch` or `triton`. A collective, see `choose_kernel`."""
    return replace(numerics, kernel=choose_kernel(numerics.kernel, device, group))


@functools.cache
def _tested(device: torch.device, group: Group, ranks: int) -> Chosen:
    return "triton" if true_everywhere(failure(device) is None, device, group) else "torch"


@functools.cache
def failure(device: torch.device) -> str | None:
    """What the Triton kernels do wrong on `device`, in one line; None = nothing. Communicates with nobody."""
    try:
        return _failure(device)
    except Exception as error:  # a compiler that is missing, a kernel that this GPU refuses: torch can still train
        line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {line}"[:300]


@torch.no_grad()
def _failure(device: torch.device) -> str | None:
    given = _Inputs.on(device)
    for precision, rounding in _ROUNDING.items():
        plain, fused = given.two_passes(precision, "torch"), given.two_passes(precision, "triton")
        if found := _difference(plain, fused, rounding):
            return f"{precision}: {found}"
    plain, fused = given.updates("torch"), given.updates("triton")
    if found := _difference(plain, fused, _UPDATE_ROUNDING):
        return f"row-sparse AdamW: {found}"
    return None


def _difference(plain: dict[str, Tensor], fused: dict[str, Tensor], rounding: float) -> str | None:
    for name, expected in plain.items():
        size, apart = float(expected.abs().max()), float((fused[name] - expected).abs().max())
        if not 0 < size < math.inf:
            return f"{name}: the torch path gives {size:g}, with which nothing can be compared"
        if not apart <= rounding * size:  # also where it is not a number
            return f"{name}: off by {apart / size:.2g} of the largest value, where rounding explains {rounding:g}"
    return None


@dataclass(frozen=True)
class _Inputs:
    """Random numbers, the same for both kernels.

    Attributes:
        x: unit embeddings [B, d].
        weight: class centres [C, d], of any norm.
        positions: int64 [B], the class of each sample; -1 = not here.
        gradients: [2, B], with respect to the log-sum-exp and the target cosine.
        chunk: classes in one chunk.
    """

    x: Tensor
    weight: Tensor
    positions: Tensor
    gradients: Tensor
    chunk: int

    @classmethod
    def on(cls, device: torch.device) -> _Inputs:
        # on a GPU blocks as long as in training; Triton's interpreter on a CPU takes a millisecond a row
        batch, dim, classes, chunk = (1536, 512, 10_219, 4096) if device.type == "cuda" else (24, 8, 43, 16)
        generator = torch.Generator().manual_seed(0)
        x = F.normalize(torch.randn(batch, dim, generator=generator))
        weight = torch.randn(classes, dim, generator=generator)
        positions = torch.randint(-1, classes, (batch,), generator=generator)
        gradients = torch.rand(2, batch, generator=generator)
        return cls(x.to(device), weight.to(device), positions.to(device), gradients.to(device), chunk)

    def two_passes(self, precision: Precision, kernel: Chosen) -> dict[str, Tensor]:
        """Log-sum-exp [B], its gradient to the embeddings [B, d], and to the class centres [C, d]."""
        # float32 without a filter and without a running maximum, so that both forms of the kernels run
        threshold = None if precision == "float32" else 0.1
        numerics = Numerics(precision, kernel, self.chunk, keep_mb=0.0)
        classes = Classes(self.weight, 30.0, threshold=threshold, numerics=numerics)
        running = classes.needs_running_max(len(self.weight))
        memory = torch.empty_like(self.weight)
        part = forward_pass(
            classes, self.x, self.positions, running=running, need_weighted=True, gradient_memory=memory
        )
        assert part.weighted is not None
        logsumexp = part.total.log() + part.maximum
        into_logsumexp, into_cosine = self.gradients
        arguments = (classes, self.x, self.positions, logsumexp, into_logsumexp, into_cosine)
        weight_gradient_pass(*arguments, out=memory, running=running, kept=part.kept)
        of_embeddings = part.weighted / part.total.unsqueeze(1)
        return {"log-sum-exp": logsumexp, "embeddings' gradient": of_embeddings, "class centres' gradient": memory}

    def updates(self, kernel: Chosen) -> dict[str, Tensor]:
        """Class centres [C, d] and their moments after two updates of a third of the rows each."""
        weight = self.weight.clone()
        optimizer = CentreOptimizer(weight, OptimizerSettings(mode="row_sparse"), kernel=kernel)
        for first in (0, 21):
            rows = torch.arange(first, len(weight), 3, device=weight.device)
            optimizer.step(self.weight[rows].cos(), rows, lr=0.1)
        state = optimizer.state()
        return {"class centres": weight, "first moment": state["exp_avg"], "second moment": state["exp_avg_sq"]}
