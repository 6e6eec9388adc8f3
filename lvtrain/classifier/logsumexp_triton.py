"""Triton kernels for what stands between the matmuls of a class chunk, one pass over the logits instead of four to six.

`exponentials` (pass 1): leave out the target and filtered negatives, follow the running maximum, exponentiate, sum, round to the operand format.
`coefficients` (pass 2): the gradient's coefficients from the recomputed logits, rounded. `unit_rows` (both): a chunk's rows normalised and rounded.
`row_gradients` (pass 2): the rows' gradient taken through the normalisation. The matmuls themselves stay with the library. Traffic with 16-bit
operands: 4 bytes a logit written by the matmul, 4 (8 with the running maximum, the second read mostly from cache) read and 2 written here, 2
read by the next matmul; of a row's element 6 bytes in each pass, and 12 at the end of the second.

Chosen by `kernel="triton"`; not the default, because it has not been measured on a GPU (`tools/benchmark.py classifier --device cuda --kernels
torch,triton` does). Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests check them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _exponentials_kernel(
    logits, out, column, maximum, total, fade, ceiling, gain, width, logits_stride, out_stride,
    running: tl.constexpr, filtered: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(column + row)
    offsets = tl.arange(0, block)
    shift = 0.0
    if running:
        old = tl.load(maximum + row)
        highest = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, width, block):
            place = start + offsets
            z = tl.load(logits + row * logits_stride + place, mask=place < width, other=float("-inf"))
            keep = place != target
            if filtered:
                keep = keep & (z <= ceiling)
            highest = tl.maximum(highest, tl.where(keep, z, float("-inf")))
        new = tl.maximum(old, tl.max(highest, axis=0))
        shift = tl.maximum(new, -3.0e38)  # no negative so far: -inf minus -inf is not a number
        factor = tl.exp(old - shift)
        tl.store(fade + row, factor)
        tl.store(maximum + row, new)
    sums = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        place = start + offsets
        z = tl.load(logits + row * logits_stride + place, mask=place < width, other=float("-inf"))
        keep = place != target
        if filtered:
            keep = keep & (z <= ceiling)
        e = tl.exp(tl.where(keep, z, float("-inf")) - shift)
        sums += e
        tl.store(out + row * out_stride + place, (e * gain).to(out.dtype.element_ty), mask=place < width)
    before = tl.load(total + row)
    if running:
        before = before * factor
    tl.store(total + row, before + tl.sum(sums, axis=0))


@triton.jit
def _coefficients_kernel(
    logits, out, column, shift, value, ceiling, width, logits_stride, out_stride, filtered: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    z = tl.load(logits + row * logits_stride + place, mask=inside, other=0.0)
    g = tl.exp(z - tl.load(shift + row))
    if filtered:
        g = tl.where(z <= ceiling, g, 0.0)
    g = tl.where(place == tl.load(column + row), tl.load(value + row), g)
    tl.store(out + row * out_stride + place, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unit_rows_kernel(source, out, dim, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < dim
    w = tl.load(source + row * dim + columns, mask=inside, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), eps)
    tl.store(out + row * dim + columns, (w / norm).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_gradients_kernel(gradient, source, factor, out, dim, eps, unit: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < dim
    g = tl.load(gradient + row * dim + columns, mask=inside, other=0.0)
    w = tl.load(source + row * dim + columns, mask=inside, other=0.0)
    radial = tl.sum(g * w, axis=0)
    if unit:
        g = g - radial * w
    else:
        norm = tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), eps)
        g = (g - radial / (norm * norm) * w) / norm
    tl.store(out + row * dim + columns, g * tl.load(factor), mask=inside)


def exponentials(
    logits: torch.Tensor,
    out: torch.Tensor,
    column: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    *,
    running: bool,
    ceiling: float | None,
    gain: float,
) -> torch.Tensor | None:
    """`out` [B, k] = gain * exp(logits - shift) without the target (`column` int64 [B], anything outside [0, k) = none) and logits above `ceiling`.

    `total` [B] and, if `running`, `maximum` [B] are updated in place; returns the factor [B] by which earlier sums faded (None if fixed)."""
    fade = torch.empty_like(total) if running else None
    width = logits.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    _exponentials_kernel[(logits.shape[0],)](
        logits, out, column, maximum, total, fade if fade is not None else total, math.inf if ceiling is None else ceiling, gain, width,
        logits.stride(0), out.stride(0), running=running, filtered=ceiling is not None, block=block,
    )  # fmt: skip
    return fade


def coefficients(
    logits: torch.Tensor,
    out: torch.Tensor,
    column: torch.Tensor,
    shift: torch.Tensor,
    value: torch.Tensor,
    *,
    ceiling: float | None,
) -> None:
    """`out` [B, k] = exp(logits - shift [B]), 0 above `ceiling`, `value` [B] at the target's column."""
    width = logits.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _coefficients_kernel[(logits.shape[0], triton.cdiv(width, block))](
        logits, out, column, shift, value, math.inf if ceiling is None else ceiling, width, logits.stride(0), out.stride(0),
        filtered=ceiling is not None, block=block,
    )  # fmt: skip


def unit_rows(source: torch.Tensor, out: torch.Tensor, *, eps: float) -> torch.Tensor:
    """`out` [k, d] = the rows of `source` [k, d] float32 divided by their norm (at least `eps`), both contiguous; returns it."""
    count, dim = source.shape
    _unit_rows_kernel[(count,)](source, out, dim, eps, block=triton.next_power_of_2(dim))
    return out


def row_gradients(
    gradient: torch.Tensor, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor, *, unit: bool, eps: float
) -> None:
    """`out` [k, d] = `gradient` [k, d] with respect to unit rows, taken to that with respect to `source` [k, d], times `factor` (one number on the
    device); all float32 and contiguous, `out` may be `gradient`. `unit`: the rows have norm 1 already."""
    count, dim = gradient.shape
    _row_gradients_kernel[(count,)](
        gradient, source, factor, out, dim, eps, unit=unit, block=triton.next_power_of_2(dim)
    )
