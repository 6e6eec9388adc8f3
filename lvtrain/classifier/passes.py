"""The two passes over class chunks: readable PyTorch, any device, no `[B, C]` tensor.

Pass 1 (`forward_pass`) gives each sample's sum of exponentials over its negatives and, in the same sweep, the sum of the rows weighted by them
(the embedding gradient up to factors of `[B]`). Pass 2 (`weight_gradient_pass`) recomputes each chunk and hands out the gradient of its rows.
Four matmuls in all, three for the chunks whose exponentials pass 1 could keep (`Classes.keep_mb`); the embedding gradient is complete before pass 2
begins. The target's own terms are never multiplied in 16 bits: late in training they are most of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lvtrain.classifier.classes import NORM_EPS, Classes, Formats, Workspace, matmul_precision, within

_HALF_GAIN = 2.0**14  # keeps small exponentials out of float16's subnormals; a power of two, so it costs no accuracy


@dataclass
class Kept:
    """Exponentials of one chunk: `exponentials` [B, k] = gain * exp(z - shift), without the target, in the format `formats.factor`; `shift` [B]
    (0 with a fixed shift)."""

    exponentials: torch.Tensor
    shift: torch.Tensor


@dataclass
class Partial:
    """What one rank's classes contribute: `maximum` [B] (0 with a fixed shift), `total` [B] = sum of exp(z - maximum) over its negatives,
    `rows` [B, d] = sum of exp(z - maximum) * s_j * unit row j (None if not asked for), and what the first chunks leave for pass 2."""

    maximum: torch.Tensor
    total: torch.Tensor
    rows: torch.Tensor | None
    kept: list[Kept] = field(default_factory=list)


def forward_pass(classes: Classes, embeddings: torch.Tensor, positions: torch.Tensor, *, running: bool, need_rows: bool) -> Partial:
    """Pass 1 over this rank's classes. `embeddings` [B, d] unit; `positions` [B] from `Classes.positions`."""
    batch, dim = embeddings.shape
    total = embeddings.new_zeros(batch)
    maximum = embeddings.new_full((batch,), -math.inf) if running else embeddings.new_zeros(batch)
    weighted = embeddings.new_zeros(batch, dim) if need_rows else None
    partial = Partial(maximum, total, weighted)
    if batch == 0 or classes.count == 0:
        return partial
    formats = classes.formats
    gain = _half_gain(formats.factor)
    room = classes.keep_mb * 2**20
    with matmul_precision(classes.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        for start, stop in work.spans():
            room -= batch * (stop - start) * formats.factor.itemsize
            source = work.source(start, stop)
            rows = work.unit_rows(source, work.inverse_norms(source), start, stop)
            logits = work.logits_of(rows, fresh=room >= 0 and formats.factor == total.dtype)
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import exponentials

                e = _operand(logits, formats.factor)
                fade = exponentials(logits, e, positions - start, maximum, total, running=running, ceiling=classes.ceiling, gain=gain)
            else:
                work.drop(logits, positions, start, stop)
                fade = _follow_maximum(logits, maximum) if running else None
                logits.exp_()
                if fade is not None:
                    total.mul_(fade)
                total.add_(logits.sum(dim=1, dtype=total.dtype))
                e = logits if gain == 1.0 else logits.mul_(gain)
            e, rounded = _rounded(e, formats)
            if weighted is not None:
                if fade is not None:
                    weighted.mul_(fade.unsqueeze(1))
                right = formats.as_factor(rows)
                if e.dtype == weighted.dtype:
                    weighted.addmm_(e, right, alpha=1.0 / gain)
                elif e.is_cuda:
                    weighted.add_(torch.mm(e, right, out_dtype=weighted.dtype), alpha=1.0 / gain)
                else:
                    weighted.add_(torch.mm(e, right), alpha=1.0 / gain)
            if room >= 0:
                partial.kept.append(Kept(rounded, maximum.clone()))
        if weighted is not None and not isinstance(classes.scale, torch.Tensor):
            weighted.mul_(classes.scale)
    return partial


def weight_gradient_pass(
    classes: Classes,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logsumexp: torch.Tensor,
    grad_cosine: torch.Tensor,
    emit: Callable[[int, int, torch.Tensor], None] | None = None,
    out: torch.Tensor | None = None,
    *,
    running: bool,
    kept: list[Kept] | None = None,
) -> None:
    """Pass 2: the gradient of the rows that take part, written to `out` [k, d], or handed chunk by chunk to `emit(start, stop, gradient)`, which
    must be done with the tensor when it returns.

    `logsumexp` [B] over all ranks; `grad_logsumexp`, `grad_cosine` [B] the loss's derivatives; `running` as in pass 1; `kept` what pass 1 left,
    emptied here. The gradient includes the derivative of the row normalisation."""
    kept = [] if kept is None else kept
    if classes.count == 0 or len(embeddings) == 0:
        if out is not None:
            out.zero_()
        return
    formats = classes.formats
    gain = _half_gain(formats.factor)
    nothing = logsumexp == -math.inf  # no negative anywhere: the gradient of N is 0
    shift = logsumexp.masked_fill(nothing, 0.0) if running else torch.zeros_like(logsumexp)
    size = grad_logsumexp if isinstance(classes.scale, torch.Tensor) else grad_logsumexp * classes.scale
    # float16 holds the samples' factors best just below the end of its range
    lift = torch.exp2(torch.floor(math.log2(_HALF_GAIN) - torch.log2(size.abs().amax().clamp(min=1e-30)))) if formats.factor == torch.float16 else None

    def right_factor(shift: torch.Tensor) -> torch.Tensor:
        """dL/dz = exp(z - shift) * [exp(shift - N) dL/dN]: the bracket and s cost no pass over the logits, they go to the embeddings."""
        coefficient = (size * torch.exp(shift - logsumexp)).masked_fill(nothing, 0.0)
        return formats.as_factor(embeddings * (coefficient if lift is None else coefficient * lift).unsqueeze(1))

    undo = embeddings.new_ones(()) if lift is None else 1.0 / (lift * gain)
    targets = _target_gradients(classes, embeddings, positions, grad_cosine)
    with matmul_precision(classes.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        recomputed = right_factor(shift)
        buffer = embeddings.new_empty(work.chunk, embeddings.shape[1]) if out is None else None
        for start, stop in work.spans():
            source = work.source(start, stop)
            inverse = work.inverse_norms(source)
            if kept:
                held = kept.pop(0)
                e, right = formats.operand(held.exponentials), right_factor(held.shift) if running else recomputed
            else:
                right = recomputed
                logits = work.logits_of(work.unit_rows(source, inverse, start, stop), fresh=False)
                if classes.fused:
                    from lvtrain.classifier.logsumexp_triton import coefficients

                    e = _operand(logits, formats.factor)
                    coefficients(logits, e, positions - start, shift - math.log(gain), torch.zeros_like(shift), ceiling=classes.ceiling)
                else:
                    work.drop(logits, positions, start, stop)
                    if running:
                        logits.sub_((shift - math.log(gain)).unsqueeze(1))
                    e = logits.exp_()
                e, _ = _rounded(e, formats)
            gradient = out[start:stop] if out is not None else buffer[: stop - start]  # type: ignore[index]
            if e.dtype == gradient.dtype:
                torch.mm(e.t(), right, out=gradient)
            elif e.is_cuda:
                torch.mm(e.t(), right, out_dtype=gradient.dtype, out=gradient)
            else:  # bfloat16, summed in float32
                gradient.copy_(torch.mm(e.t(), right))
            del e
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import row_gradients

                row_gradients(gradient, source, undo, unit=classes.unit, eps=NORM_EPS)
            else:
                # with w = |w| u: s (g - (g.u) u) / |w| = a g - (a / |w|^2) (g.w) w; `work.rows` is free to hold the product
                a = torch.ones_like(source[:, :1]) if inverse is None else inverse.unsqueeze(1)
                shrink = a.square()
                if isinstance(classes.scale, torch.Tensor):
                    a = a * work.of_chunk(classes.scale, start, stop).unsqueeze(1)
                a = a * undo
                radial = torch.mul(gradient, source, out=work.rows[: stop - start]).sum(dim=1, keepdim=True).mul_(a).mul_(shrink)
                gradient.mul_(a).addcmul_(source, radial, value=-1.0)
            if emit is not None:
                _add_targets(gradient, positions, start, stop, targets)
                emit(start, stop, gradient)
        if out is not None:
            _add_targets(out, positions, 0, classes.count, targets)


def _half_gain(factor: torch.dtype) -> float:
    return _HALF_GAIN if factor == torch.float16 else 1.0


def _rounded(e: torch.Tensor, formats: Formats) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentials as the matmul takes them (in place where a format is emulated), and in the format in which they may be kept."""
    rounded = e.to(formats.factor)
    return (e.copy_(rounded) if formats.emulated else rounded), rounded


def _follow_maximum(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Subtracts from `logits` [B, k] the largest so far, kept in `maximum` [B]; returns the factor [B] by which earlier sums fade."""
    highest = torch.maximum(maximum, logits.amax(dim=1))
    shift = highest.clamp(min=torch.finfo(highest.dtype).min)  # no negative so far: -inf minus -inf is not a number
    logits.sub_(shift.unsqueeze(1))
    fade = torch.exp(maximum - shift)
    maximum.copy_(highest)
    return fade


def _operand(logits: torch.Tensor, factor: torch.dtype) -> torch.Tensor:
    """Where a kernel leaves the exponentials of `logits`: rounded on a GPU, in place elsewhere."""
    return torch.empty_like(logits, dtype=factor) if logits.is_cuda and factor != logits.dtype else logits


def _target_gradients(classes: Classes, embeddings: torch.Tensor, positions: torch.Tensor, grad_cosine: torch.Tensor) -> torch.Tensor:
    """What each sample adds to its own class's row through the target cosine: [B, d], zeros where the row is not here."""
    source = classes.weight[classes.rows_at(positions)]
    inverse = classes.inverse_norms(source)
    unit = source if inverse is None else source * inverse.unsqueeze(1)
    size = grad_cosine if inverse is None else grad_cosine * inverse
    across = embeddings - (embeddings * unit).sum(dim=1, keepdim=True) * unit
    return across * torch.where(positions >= 0, size, 0.0).unsqueeze(1)


def _add_targets(gradient: torch.Tensor, positions: torch.Tensor, start: int, stop: int, targets: torch.Tensor) -> None:
    place, here = within(positions, start, stop)
    # samples of other ranks and chunks add 0 somewhere: each at a place of its own, or a GPU would add them up one after the other
    elsewhere = torch.arange(len(positions), device=positions.device) % (stop - start)
    gradient.index_add_(0, torch.where(here, place, elsewhere), targets * here.unsqueeze(1))
