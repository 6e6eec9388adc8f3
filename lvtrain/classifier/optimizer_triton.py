"""AdamW of the class centres that a step touched, as one Triton kernel.

Each row is read once and written once: gather, update and scatter in one. In eager PyTorch the same step copies rows and
moments out, passes over them some ten times, and copies them back.

The tests compare it with the PyTorch path of `CentreOptimizer`, by Triton's interpreter. `kernel: auto` takes it on CUDA
after its self-test (`kernel.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _adamw_rows(
    weight, exp_avg, exp_avg_sq, gradient, rows, step_sizes, corrections, dim, shrink, add1, keep2, add2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    row = tl.load(rows + program).to(tl.int64)
    step_size = tl.load(step_sizes + program)
    correction = tl.load(corrections + program)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    there = row * dim + columns
    g = tl.load(gradient + program.to(tl.int64) * dim + columns, mask=inside, other=0.0)
    m = tl.load(exp_avg + there, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + there, mask=inside, other=0.0)
    w = tl.load(weight + there, mask=inside, other=0.0)
    m = m + add1 * (g - m)
    v = v * keep2 + add2 * g * g
    w = w * shrink - m * step_size / (tl.sqrt(v) / correction + eps)
    tl.store(exp_avg + there, m, mask=inside)
    tl.store(exp_avg_sq + there, v, mask=inside)
    tl.store(weight + there, w, mask=inside)


def adamw_rows(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    rows: torch.Tensor,
    step_sizes: torch.Tensor,
    corrections: torch.Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Updates `weight`, `exp_avg` and `exp_avg_sq` in place at the given rows.

    The caller computes the bias corrections in float64, because 1 - 0.999^t cancels in float32. The same holds for
    1 - 0.999: a kernel's arguments are float32.

    Args:
        weight: float32 [n, d], contiguous.
        exp_avg: like `weight`.
        exp_avg_sq: like `weight`.
        gradient: float32 [k, d].
        rows: int64 [k], distinct.
        step_sizes: float32 [k], lr / (1 - beta1^t), where t is the row's own step count.
        corrections: float32 [k], sqrt(1 - beta2^t).
        lr: learning rate.
        weight_decay: decoupled.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """
    dim = weight.shape[1]
    if len(rows):
        _adamw_rows[(len(rows),)](
            weight, exp_avg, exp_avg_sq, gradient.contiguous(), rows, step_sizes, corrections, dim,
            1.0 - lr * weight_decay, 1.0 - betas[0], betas[1], 1.0 - betas[1], eps, BLOCK=triton.next_power_of_2(dim),
        )  # fmt: skip
