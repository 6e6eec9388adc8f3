"""The two passes over class chunks: readable PyTorch, any device, no `[B, C]` tensor.

Pass 1 (`forward_pass`) sums each sample's exponentials over its negatives. In the same sweep it sums the class directions
weighted by them, which is the embeddings' gradient up to factors of `[B]`.

Pass 2 (`weight_gradient_pass`) computes the gradient of each chunk's classes. It needs the chunk's exponentials again:
either pass 1 kept them (three matmuls in all), or pass 2 computes them again (four).

Pass 1 keeps them in the memory of the gradient (`ExponentialCache`), which is unused until pass 2 writes it. A class has
B exponentials and d numbers of gradient, so all of them fit for B up to d (2 d in 16 bits).

The target's own terms are never multiplied in 16 bits: late in training they are most of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lvtrain.classifier.classes import NORM_EPS, Classes, Workspace, within
from lvtrain.classifier.numerics import Formats, matmul_precision

_HALF_GAIN = 2.0**14  # keeps small exponentials out of float16's subnormals; a power of two, so it costs no accuracy


@dataclass
class KeptExponentials:
    """Exponentials of one chunk that pass 1 kept for pass 2.

    Attributes:
        exponentials: [B, k] in format `formats.factor`: gain * exp(z - shift), 0 at the target.
        shift: [B]; 0 with a fixed shift.
        in_gradient: they lie in the memory of the gradient.
    """

    exponentials: torch.Tensor
    shift: torch.Tensor
    in_gradient: bool


class ExponentialCache:
    """Memory for the exponentials of chunks, in the order of the chunks.

    It is taken from the memory of the gradient [k, d] that pass 2 will write (`gradient`, if there is one), and then from
    `keep_mb` MB that are allocated for it. A chunk's exponentials begin at or after its gradient's rows. Pass 2 reads them
    before it writes that gradient, so it never overwrites what it has yet to read.
    """

    def __init__(self, gradient: torch.Tensor | None, batch: int, factor: torch.dtype, keep_mb: float) -> None:
        self._bytes = None if gradient is None else gradient.view(-1).view(torch.uint8)
        row = 0 if gradient is None else gradient.shape[1] * gradient.itemsize
        self._batch, self._factor = batch, factor
        # bytes per class, rounded up so that a chunk begins where any format may begin
        self._stride = -(-max(row, batch * factor.itemsize) // 16) * 16
        self._room = keep_mb * 2**20
        self._full = False

    def place(self, start: int, stop: int, like: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """Memory for [B, stop - start] exponentials (None: there is no more), and whether it is the gradient's."""
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
    """What one rank's classes contribute to each sample's sum.

    Attributes:
        maximum: [B], the largest logit so far; 0 with a fixed shift.
        total: [B], sum of exp(z - maximum) over the negatives.
        weighted: [B, d], sum of exp(z - maximum) * s_j * unit direction j; None if it was not asked for.
        kept: exponentials of the first chunks, for pass 2.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor | None
    kept: list[KeptExponentials] = field(default_factory=list)


def forward_pass(
    classes: Classes,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    *,
    running: bool,
    need_weighted: bool,
    gradient_memory: torch.Tensor | None = None,
) -> Partial:
    """Pass 1 over this rank's classes.

    Args:
        classes: that this rank goes over.
        embeddings: unit vectors [B, d].
        positions: int64 [B] from `Classes.positions`.
        running: subtract the running maximum (`Classes.needs_running_max`).
        need_weighted: whether the embeddings need a gradient.
        gradient_memory: [k, d], the `out` of pass 2. Until then it holds what this pass keeps.
    """
    batch, dim = embeddings.shape
    total = embeddings.new_zeros(batch)
    maximum = embeddings.new_full((batch,), -math.inf) if running else embeddings.new_zeros(batch)
    weighted = embeddings.new_zeros(batch, dim) if need_weighted else None
    partial = Partial(maximum, total, weighted)
    if batch == 0 or classes.count == 0:
        return partial
    formats = classes.formats
    gain = _half_gain(formats.factor)
    places = ExponentialCache(gradient_memory, batch, formats.factor, classes.numerics.keep_mb)
    with matmul_precision(classes.numerics.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        for start, stop in work.spans():
            place, in_gradient = places.place(start, stop, embeddings)
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
                e = logits
                if gain != 1.0:  # a GPU rounds the products while it writes them
                    narrow = _operand(logits, formats.factor, place)
                    e = torch.mul(logits, gain, out=narrow)
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
            del e  # before the next chunk's are allocated
            if place is not None:
                partial.kept.append(KeptExponentials(place, maximum.clone(), in_gradient))
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
    kept: list[KeptExponentials] | None = None,
) -> None:
    """Pass 2: the gradient of the classes that take part, through the normalisation of their directions.

    Args:
        classes: as in pass 1.
        embeddings: as in pass 1.
        positions: as in pass 1.
        logsumexp: N [B] over all ranks.
        grad_logsumexp: dL/dN [B].
        grad_cosine: dL/dcos [B], of the target cosine; [2 B] with `classes.second`, whose cosines follow.
        emit: called with (start, stop, gradient of those classes) for each chunk; must be done with the tensor when it
            returns.
        out: [k, d], where the gradient is written if there is no `emit`.
        running: as in pass 1.
        kept: what pass 1 kept; emptied here.
    """
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
        torch.pow(2.0, torch.floor(math.log2(_HALF_GAIN) - torch.log2(size.abs().amax().clamp(min=1e-30))))
        if formats.factor == torch.float16
        else None
    )

    def right_factor(shift: torch.Tensor) -> torch.Tensor:
        """The embeddings times exp(shift - N) dL/dN.

        Because dL/dz = exp(z - shift) * [exp(shift - N) dL/dN], neither the bracket nor s costs a pass over the logits.
        """
        coefficient = (size * torch.exp(shift - logsumexp)).masked_fill(nothing, 0.0)
        return formats.as_factor(embeddings * (coefficient if lift is None else coefficient * lift).unsqueeze(1))

    undo = embeddings.new_ones(()) if lift is None else 1.0 / (lift * gain)
    places, owners = positions, embeddings
    if classes.second is not None:
        places, owners = torch.cat([positions, classes.second]), torch.cat([embeddings, embeddings])
    targets = _target_gradients(classes, owners, places, grad_cosine)
    with matmul_precision(classes.numerics.precision, embeddings.device):
        work = Workspace(classes, embeddings)
        recomputed = right_factor(shift)
        needs_buffer = out is None or any(held.in_gradient for held in kept)
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
                    e = torch.exp(logits, out=_operand(logits, formats.factor))
                e = _rounded(e, formats, None)
            # exponentials in the gradient's memory are read to the end before the gradient is written there
            beside = out is None or (held is not None and held.in_gradient)
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

                row_gradients(product, source, undo, gradient, unit=classes.is_unit, eps=NORM_EPS)
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
                _add_targets(gradient, places, start, stop, targets)
                emit(start, stop, gradient)
        if out is not None:
            _add_targets(out, places, 0, classes.count, targets)


def _half_gain(factor: torch.dtype) -> float:
    return _HALF_GAIN if factor == torch.float16 else 1.0


def _rounded(e: torch.Tensor, formats: Formats, place: torch.Tensor | None) -> torch.Tensor:
    """Exponentials as the matmul takes them (in place where a format is emulated); also left in `place` if given."""
    if e.dtype == formats.factor:
        return e
    rounded = e.to(formats.factor) if place is None else place.copy_(e)
    return e.copy_(rounded) if formats.emulated else rounded


def _follow_maximum(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Subtracts the largest logit so far, `maximum` [B], from `logits` [B, k], both updated in place.

    Returns the factor [B] by which earlier sums shrink.
    """
    highest = torch.maximum(maximum, logits.amax(dim=1))
    shift = highest.clamp(min=torch.finfo(highest.dtype).min)  # no negative so far: -inf minus -inf is not a number
    logits.sub_(shift.unsqueeze(1))
    fade = torch.exp(maximum - shift)
    maximum.copy_(highest)
    return fade


def _operand(logits: torch.Tensor, factor: torch.dtype, place: torch.Tensor | None = None) -> torch.Tensor:
    """Where the exponentials of `logits` are written: rounded on a GPU (into `place` if given), in place elsewhere."""
    if not logits.is_cuda or factor == logits.dtype:
        return logits
    return torch.empty_like(logits, dtype=factor) if place is None else place


def _target_gradients(
    classes: Classes, embeddings: torch.Tensor, positions: torch.Tensor, grad_cosine: torch.Tensor
) -> torch.Tensor:
    """What each sample adds to its own class's gradient through the target cosine: [B, d]; zeros for other ranks' classes."""
    source = classes.weight[classes.rows_at(positions)]
    inverse = classes.inverse_norms(source)
    unit = source if inverse is None else source * inverse.unsqueeze(1)
    size = grad_cosine if inverse is None else grad_cosine * inverse
    across = embeddings - (embeddings * unit).sum(dim=1, keepdim=True) * unit
    return across * torch.where(positions >= 0, size, 0.0).unsqueeze(1)


def _add_targets(gradient: torch.Tensor, positions: torch.Tensor, start: int, stop: int, targets: torch.Tensor) -> None:
    place, here = within(positions, start, stop)
    # Samples of other ranks and chunks add 0, each at another place: a GPU adds to one place one after the other.
    elsewhere = torch.arange(len(positions), device=positions.device) % (stop - start)
    gradient.index_add_(0, torch.where(here, place, elsewhere), targets * here.unsqueeze(1))
