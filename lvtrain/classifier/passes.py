"""The two passes over class chunks: readable PyTorch, any device, no `[B, C]` tensor.

Pass 1 (`forward_pass`) gives each sample's sum of exponentials over its negatives and, in the same sweep, the sum of the rows weighted by them
(the embedding gradient up to factors of `[B]`). Pass 2 (`weight_gradient_pass`) hands out the gradient of each chunk's rows, from the exponentials
pass 1 kept or computes again: three matmuls or four; the embedding gradient is complete before pass 2 begins. The target's own terms are never
multiplied in 16 bits: late in training they are most of the gradient.

Where exponentials wait for pass 2: in the memory of the rows' gradient (`Shelf`), which nobody needs before pass 2 writes it. A class has B of them
and its row's gradient d numbers, so for B up to d (2 d in 16 bits) all find room there.
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
    (0 with a fixed shift). `shelved`: in the memory of the rows' gradient."""

    exponentials: torch.Tensor
    shift: torch.Tensor
    shelved: bool


class Shelf:
    """Places for the exponentials of chunks, in the order of the chunks: on `gradient` [k, d], the memory pass 2 will write the rows' gradient to
    (None = there is none), then in memory of their own up to `keep_mb`, then none.

    A chunk's place begins at or after its rows, so pass 2, which reads a chunk's exponentials before it writes the chunk's rows, never writes over
    what it has yet to read.
    """

    def __init__(self, gradient: torch.Tensor | None, batch: int, factor: torch.dtype, keep_mb: float) -> None:
        self._bytes = None if gradient is None else gradient.view(-1).view(torch.uint8)
        row = 0 if gradient is None else gradient.shape[1] * gradient.itemsize
        self._batch, self._factor = batch, factor
        self._stride = (
            -(-max(row, batch * factor.itemsize) // 16) * 16
        )  # bytes a class; begins where any format may begin
        self._room = keep_mb * 2**20
        self._full = False

    def place(self, start: int, stop: int, like: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """Memory for [B, stop - start] exponentials of the factor's format, None when there is no more; and whether it is the gradient's."""
        if self._full:
            return None, False
        size = self._batch * (stop - start) * self._factor.itemsize
        first = start * self._stride
        if self._bytes is not None and first + size <= len(self._bytes):
            return self._bytes[first : first + size].view(self._factor).view(self._batch, stop - start), True
        self._bytes = None
        self._room -= size
        self._full = self._room < 0
        return (None if self._full else like.new_empty(self._batch, stop - start, dtype=self._factor)), False


@dataclass
class Partial:
    """What one rank's classes contribute: `maximum` [B] (0 with a fixed shift), `total` [B] = sum of exp(z - maximum) over its negatives,
    `rows` [B, d] = sum of exp(z - maximum) * s_j * unit row j (None if not asked for), and what the first chunks leave for pass 2."""

    maximum: torch.Tensor
    total: torch.Tensor
    rows: torch.Tensor | None
    kept: list[Kept] = field(default_factory=list)


def forward_pass(
    classes: Classes,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    *,
    running: bool,
    need_rows: bool,
    shelf: torch.Tensor | None = None,
) -> Partial:
    """Pass 1 over this rank's classes. `embeddings` [B, d] unit; `positions` [B] from `Classes.positions`. `shelf` [k, d]: memory that pass 2 will be
    given as `out`; until then it belongs to what this pass keeps."""
    batch, dim = embeddings.shape
    total = embeddings.new_zeros(batch)
    maximum = embeddings.new_full((batch,), -math.inf) if running else embeddings.new_zeros(batch)
    weighted = embeddings.new_zeros(batch, dim) if need_rows else None
    partial = Partial(maximum, total, weighted)
    if batch == 0 or classes.count == 0:
        return partial
    formats = classes.formats
    gain = _half_gain(formats.factor)
    places = Shelf(shelf, batch, formats.factor, classes.keep_mb)
    with matmul_precision(classes.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        for start, stop in work.spans():
            place, shelved = places.place(start, stop, embeddings)
            source = work.source(start, stop)
            rows = work.unit_rows(source, work.inverse_norms(source), start, stop)
            logits = work.logits_of(rows, out=place if formats.factor == total.dtype else None)
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import exponentials

                e = _operand(logits, formats.factor, place)
                fade = exponentials(
                    logits, e, positions - start, maximum, total, running=running, ceiling=classes.ceiling, gain=gain
                )
            else:
                work.drop(logits, positions, start, stop)
                fade = _follow_maximum(logits, maximum) if running else None
                logits.exp_()
                if fade is not None:
                    total.mul_(fade)
                total.add_(logits.sum(dim=1, dtype=total.dtype))
                e = logits if gain == 1.0 else logits.mul_(gain)
            e = _rounded(e, formats, place)
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
            if place is not None:
                partial.kept.append(Kept(place, maximum.clone(), shelved))
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
    lift = (
        torch.exp2(torch.floor(math.log2(_HALF_GAIN) - torch.log2(size.abs().amax().clamp(min=1e-30))))
        if formats.factor == torch.float16
        else None
    )

    def right_factor(shift: torch.Tensor) -> torch.Tensor:
        """dL/dz = exp(z - shift) * [exp(shift - N) dL/dN]: the bracket and s cost no pass over the logits, they go to the embeddings."""
        coefficient = (size * torch.exp(shift - logsumexp)).masked_fill(nothing, 0.0)
        return formats.as_factor(embeddings * (coefficient if lift is None else coefficient * lift).unsqueeze(1))

    undo = embeddings.new_ones(()) if lift is None else 1.0 / (lift * gain)
    targets = _target_gradients(classes, embeddings, positions, grad_cosine)
    with matmul_precision(classes.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        recomputed = right_factor(shift)
        needs_buffer = out is None or any(held.shelved for held in kept)
        buffer = embeddings.new_empty(work.chunk, embeddings.shape[1]) if needs_buffer else None
        for start, stop in work.spans():
            source = work.source(start, stop)
            inverse = work.inverse_norms(source)
            held = kept.pop(0) if kept else None
            if held is not None:
                e, right = formats.operand(held.exponentials), right_factor(held.shift) if running else recomputed
            else:
                right = recomputed
                logits = work.logits_of(work.unit_rows(source, inverse, start, stop))
                if classes.fused:
                    from lvtrain.classifier.logsumexp_triton import coefficients

                    e = _operand(logits, formats.factor)
                    coefficients(
                        logits,
                        e,
                        positions - start,
                        shift - math.log(gain),
                        torch.zeros_like(shift),
                        ceiling=classes.ceiling,
                    )
                else:
                    work.drop(logits, positions, start, stop)
                    if running:
                        logits.sub_((shift - math.log(gain)).unsqueeze(1))
                    e = logits.exp_()
                e = _rounded(e, formats, None)
            # what stands on the shelf is read to its end before rows are written there
            beside = out is None or (held is not None and held.shelved)
            product = buffer[: stop - start] if beside else out[start:stop]  # type: ignore[index]
            gradient = product if out is None else out[start:stop]
            if e.dtype == product.dtype:
                torch.mm(e.t(), right, out=product)
            elif e.is_cuda:
                torch.mm(e.t(), right, out_dtype=product.dtype, out=product)
            else:  # bfloat16, summed in float32
                product.copy_(torch.mm(e.t(), right))
            del e
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import row_gradients

                row_gradients(product, source, undo, gradient, unit=classes.unit, eps=NORM_EPS)
            else:
                # with w = |w| u: s (g - (g.u) u) / |w| = a g - (a / |w|^2) (g.w) w; `work.rows` is free to hold the product
                a = torch.ones_like(source[:, :1]) if inverse is None else inverse.unsqueeze(1)
                shrink = a.square()
                if isinstance(classes.scale, torch.Tensor):
                    a = a * work.of_chunk(classes.scale, start, stop).unsqueeze(1)
                a = a * undo
                radial = (
                    torch.mul(product, source, out=work.rows[: stop - start])
                    .sum(dim=1, keepdim=True)
                    .mul_(a)
                    .mul_(shrink)
                )
                torch.addcmul(product.mul_(a), source, radial, value=-1.0, out=gradient)
            if emit is not None:
                _add_targets(gradient, positions, start, stop, targets)
                emit(start, stop, gradient)
        if out is not None:
            _add_targets(out, positions, 0, classes.count, targets)


def _half_gain(factor: torch.dtype) -> float:
    return _HALF_GAIN if factor == torch.float16 else 1.0


def _rounded(e: torch.Tensor, formats: Formats, place: torch.Tensor | None) -> torch.Tensor:
    """Exponentials as the matmul takes them (in place where a format is emulated), left in `place` as well if there is one."""
    if e.dtype == formats.factor:
        return e
    rounded = e.to(formats.factor) if place is None else place.copy_(e)
    return e.copy_(rounded) if formats.emulated else rounded


def _follow_maximum(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Subtracts from `logits` [B, k] the largest so far, kept in `maximum` [B]; returns the factor [B] by which earlier sums fade."""
    highest = torch.maximum(maximum, logits.amax(dim=1))
    shift = highest.clamp(min=torch.finfo(highest.dtype).min)  # no negative so far: -inf minus -inf is not a number
    logits.sub_(shift.unsqueeze(1))
    fade = torch.exp(maximum - shift)
    maximum.copy_(highest)
    return fade


def _operand(logits: torch.Tensor, factor: torch.dtype, place: torch.Tensor | None = None) -> torch.Tensor:
    """Where a kernel leaves the exponentials of `logits`: rounded on a GPU (in `place` if there is one), in place elsewhere."""
    if not logits.is_cuda or factor == logits.dtype:
        return logits
    return torch.empty_like(logits, dtype=factor) if place is None else place


def _target_gradients(
    classes: Classes, embeddings: torch.Tensor, positions: torch.Tensor, grad_cosine: torch.Tensor
) -> torch.Tensor:
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
