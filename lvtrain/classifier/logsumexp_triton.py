"""Triton kernels for the work between the matmuls of a class chunk: one pass over the logits instead of four to six.

- `unit_rows`, both passes: normalises and rounds a chunk's rows.
- `exponentials`, pass 1: drops the target and filtered negatives, follows the running maximum, exponentiates, sums, and
  rounds to the operands' format.
- `coefficients`, pass 2: the gradient's coefficients from the recomputed logits, rounded.
- `row_gradients`, pass 2: the rows' gradient, through the normalisation.

The library computes the matmuls. With 16-bit operands, memory traffic per logit is: 4 bytes written by the matmul, 4
read here (8 with the running maximum, the second mostly from cache), 2 written here, and 2 read by the next matmul. Per
element of a row it is 6 bytes in each pass, and 12 at the end of the second.

`kernel: auto` takes them on CUDA after their self-test (`kernel.py`). They have not been timed on a GPU yet (measure with
`tools/benchmark.py classifier --device cuda --kernels torch,triton`). Without a GPU the tests run them in Triton's
interpreter (TRITON_INTERPRET=1).
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
    """Writes gain * exp(logits - shift) to `out`, 0 for the target and for logits above `ceiling`.

    Args:
        logits: float32 [B, k].
        out: [B, k], float32 or 16 bits.
        column: int64 [B], the target's column; anything outside [0, k) = it is not here.
        maximum: float32 [B], the largest logit so far; updated in place if `running`.
        total: float32 [B], sum of the exponentials so far; updated in place.
        running: subtract the running maximum.
        ceiling: larger logits are dropped; None = none are.
        gain: factor on what is written, not on the sums.

    Returns:
        The factor [B] by which earlier sums shrink; None with a fixed shift.
    """
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
    """Writes exp(logits - shift) to `out` [B, k]: 0 above `ceiling`, `value` [B] at the target's column."""
    width = logits.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _coefficients_kernel[(logits.shape[0], triton.cdiv(width, block))](
        logits, out, column, shift, value, math.inf if ceiling is None else ceiling, width, logits.stride(0), out.stride(0),
        filtered=ceiling is not None, block=block,
    )  # fmt: skip


def unit_rows(source: torch.Tensor, out: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Writes the rows of `source` float32 [k, d], divided by their norm (at least `eps`), to `out` [k, d] and returns it.

    Both are contiguous.
    """
    count, dim = source.shape
    _unit_rows_kernel[(count,)](source, out, dim, eps, block=triton.next_power_of_2(dim))
    return out


def row_gradients(
    gradient: torch.Tensor, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor, *, unit: bool, eps: float
) -> None:
    """Writes the gradient with respect to `source`, from the one with respect to its unit rows, times `factor`.

    Everything is float32 and contiguous.

    Args:
        gradient: [k, d], with respect to the unit rows.
        source: [k, d], the rows.
        factor: one number, on the device.
        out: [k, d]; may be `gradient`.
        unit: the rows have norm 1 already.
        eps: least norm.
    """
    count, dim = gradient.shape
    _row_gradients_kernel[(count,)](
        gradient, source, factor, out, dim, eps, unit=unit, block=triton.next_power_of_2(dim)
    )
