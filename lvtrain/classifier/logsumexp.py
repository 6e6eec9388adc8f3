"""The primitive that carries every classification loss: log-sum-exp over a sample's negatives, classes split over ranks, no logits stored."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.classifier.classes import Classes
from lvtrain.classifier.passes import Partial, forward_pass, weight_gradient_pass
from lvtrain.distributed.collectives import Group, group_size


def combine(
    parts: list[Partial], cosines: list[torch.Tensor], *, running: bool, group: Group
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums the ranks' partial results: `(N [B] each, cosine [B] each)`, and rescales `parts[i].rows` in place to the weights' common divisor.

    One SUM all-reduce of `[B, 2 * anchors]`; with the running maximum one MAX all-reduce of `[B, anchors]` before it. Afterwards
    `parts[i].rows` holds this rank's share of `dN/dx`.
    """
    distributed = group_size(group) > 1
    totals = torch.stack([part.total for part in parts] + cosines, dim=1)
    maxima = torch.stack([part.maximum for part in parts], dim=1)
    if running:
        local = maxima
        if distributed:
            maxima = maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        maxima = maxima.clamp(min=torch.finfo(maxima.dtype).min)  # no negative anywhere
        fade = torch.exp(local - maxima)
        totals[:, : len(parts)] *= fade
        for i, part in enumerate(parts):
            if part.rows is not None:
                part.rows.mul_(fade[:, i : i + 1])
    if distributed:
        dist.all_reduce(totals, group=group)
    logsumexps, summed = [], []
    for i, part in enumerate(parts):
        logsumexps.append(torch.log(totals[:, i]) + maxima[:, i])
        if part.rows is not None:
            part.rows.div_(totals[:, i : i + 1].clamp(min=torch.finfo(totals.dtype).tiny))
    for i in range(len(cosines)):
        summed.append(totals[:, len(parts) + i])
    return logsumexps, summed


class _NegativeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        start: int,
        total: int,
        group: Group,
        options: dict[str, Any],
    ) -> Any:
        classes = Classes(weight.detach(), **options)
        positions = classes.positions(labels, start)
        targets = classes.unit_rows_at(positions)
        running = classes.needs_running_max(total)
        ctx.grad_weight = (
            torch.empty_like(classes.weight) if ctx.needs_input_grad[1] and classes.indices is None else None
        )
        part = forward_pass(
            classes,
            embeddings.detach(),
            positions,
            running=running,
            need_rows=ctx.needs_input_grad[0],
            shelf=ctx.grad_weight,
        )
        (logsumexp,), (cosine,) = combine(
            [part], [(embeddings.detach() * targets).sum(dim=1)], running=running, group=group
        )
        ctx.classes, ctx.part, ctx.targets, ctx.running = classes, part, targets, running
        ctx.save_for_backward(embeddings, positions, logsumexp)
        return logsumexp, cosine

    @staticmethod
    def backward(ctx: Any, grad_logsumexp: torch.Tensor, grad_cosine: torch.Tensor) -> Any:  # type: ignore[override]
        embeddings, positions, logsumexp = ctx.saved_tensors
        grad_embeddings = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_embeddings = ctx.part.rows * grad_logsumexp.unsqueeze(1) + ctx.targets * grad_cosine.unsqueeze(1)
        if ctx.needs_input_grad[1]:
            classes = ctx.classes
            arguments = (classes, embeddings.detach(), positions, logsumexp, grad_logsumexp, grad_cosine)
            if classes.indices is None:
                grad_weight = torch.empty_like(classes.weight) if ctx.grad_weight is None else ctx.grad_weight
                ctx.grad_weight = None  # a second backward has memory of its own
                weight_gradient_pass(*arguments, out=grad_weight, running=ctx.running, kept=ctx.part.kept)
            else:
                grad_weight = torch.zeros_like(classes.weight)
                chosen = classes.indices

                def emit(start: int, stop: int, gradient: torch.Tensor) -> None:
                    grad_weight[chosen[start:stop]] = gradient

                weight_gradient_pass(*arguments, emit, running=ctx.running, kept=ctx.part.kept)
        return grad_embeddings, grad_weight, None, None, None, None, None


def negative_logsumexp(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    rows: tuple[int, int] | None = None,
    num_classes: int | None = None,
    group: Group = None,
    indices: torch.Tensor | None = None,
    threshold: float | None = None,
    mask: torch.Tensor | None = None,
    unit: bool = False,
    chunk: int | None = None,
    precision: str = "float32",
    kernel: str = "torch",
    keep_mb: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`N_i = log sum_{j != y_i} exp(s_j cos_ij)` and the target cosine `cos_{i, y_i}`, both `[B]` and the same on every rank.

    CosFace is then `softplus(N - scale * (cosine - m)).mean()`, and so on: see METHODS in this folder's README.

    embeddings  [B, d], UNIT vectors of the whole (gathered) batch, the same on every rank
    weight      [stop - start, d], this rank's class rows, of any norm: they are normalised here, chunk by chunk
    labels      int64 [B], global class ids; -1 = no class: nothing is left out of N and the cosine is 0 (give such samples weight 0)
    scale       s, or one s_j > 0 per row of `weight`
    rows        (start, stop): the global ids of `weight`'s rows; None = (0, len(weight)). `num_classes`: of all ranks, default `stop`
    indices     sorted int64 local rows that take part; None = all. A label whose row does not take part counts as -1
    threshold   negatives with a larger cosine are left out (inter-class filtering)
    mask        bool per row of `weight`; False = not a negative
    unit        rows have norm 1 already (banks)
    precision   float32 | tf32 (CUDA) | half: float16 operands, float32 cosines and sums, relative gradient error < 1e-3 | bfloat16: likewise, < 1e-2
                (on a CPU only the gradient's matmuls are bfloat16, < 3e-3)
    kernel      torch | triton (`logsumexp_triton`: needs CUDA)
    keep_mb     MB of exponentials that forward leaves for backward beyond what the memory of `weight.grad` holds (all for B <= d, 2 d in 16 bits; none
                with `indices`); all kept, a quarter of the matmuls is saved. That memory is taken in forward

    Collectives: forward one all-reduce (SUM) of `[B, 2]`; where the number range demands a running maximum (one scale per class, float16, or a scale
    beyond 60 or so) one more (MAX) of `[B, 1]`. Backward none: `embeddings.grad` is then THIS RANK'S share, from its own classes, to be summed
    over ranks by whoever gathered the embeddings (`collectives.gather_rows` does); `weight.grad` is complete. No scaling by the number of ranks.
    If no negative takes part anywhere N is -inf and its gradient 0.
    """
    start, stop = rows if rows is not None else (0, len(weight))
    if stop - start != len(weight):
        raise ValueError(f"rows {start}..{stop} are {stop - start} classes but weight has {len(weight)} rows")
    options = dict(
        scale=scale,
        indices=indices,
        threshold=threshold,
        mask=mask,
        unit=unit,
        chunk=chunk,
        precision=precision,
        kernel=kernel,
        keep_mb=keep_mb,
    )
    total = max(num_classes or stop, 1)
    if isinstance(scale, float | int) and not math.isfinite(scale):
        raise ValueError("scale must be finite")
    return _NegativeLogSumExp.apply(embeddings, weight, labels, start, total, group, options)
