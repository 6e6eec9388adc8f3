"""The primitive of every classification loss here: log-sum-exp over a sample's negatives.

The classes are split over ranks, and no logits are stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.classifier.classes import Classes
from lvtrain.classifier.kernel import on_device
from lvtrain.classifier.numerics import EXACT, Numerics
from lvtrain.classifier.passes import Partial, forward_pass, weight_gradient_pass
from lvtrain.distributed.collectives import Group, group_size
from lvtrain.errors import UserError


def class_ids(labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """`labels` as int64 [B].

    Raises:
        UserError: they are not integers of shape [B]. A float tensor cannot index and a uint8 one would be taken for a
            mask, so neither is converted silently.
    """
    if labels.dtype not in (torch.int64, torch.int32) or labels.dim() != 1:
        found = f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
        raise UserError(
            f"{name} must be int64 class ids of shape [batch], got {found}; convert them with labels.long()"
        )
    return labels.long()


def combine(
    parts: list[Partial], sums: list[torch.Tensor], *, running: bool, group: Group
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Adds up the ranks' partial results: `(N [B] of each part, each of sums [B])`.

    `parts[i].weighted` is divided in place by the sum of exponentials over all ranks: afterwards it holds this rank's
    share of `dN/dx`.

    Collectives: one SUM all-reduce of `[B, parts + sums]`; with the running maximum one MAX all-reduce of `[B, parts]`
    before it.
    """
    distributed = group_size(group) > 1
    totals = torch.stack([part.total for part in parts] + sums, dim=1)
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
            if part.weighted is not None:
                part.weighted.mul_(fade[:, i : i + 1])
    if distributed:
        dist.all_reduce(totals, group=group)
    logsumexps = []
    for i, part in enumerate(parts):
        logsumexps.append(torch.log(totals[:, i]) + maxima[:, i])
        if part.weighted is not None:
            part.weighted.div_(totals[:, i : i + 1].clamp(min=torch.finfo(totals.dtype).tiny))
    return logsumexps, [totals[:, len(parts) + i] for i in range(len(sums))]


class _NegativeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        classes: Classes,
        start: int,
        total: int,
        group: Group,
    ) -> Any:
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
            need_weighted=ctx.needs_input_grad[0],
            gradient_memory=ctx.grad_weight,
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
            grad_embeddings = ctx.part.weighted * grad_logsumexp.unsqueeze(1) + ctx.targets * grad_cosine.unsqueeze(1)
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
    is_unit: bool = False,
    numerics: Numerics = EXACT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`N_i = log sum_{j != y_i} exp(s_j cos_ij)` and the target cosine `cos_{i, y_i}`: both `[B]`, the same on every rank.

    CosFace, for example, is `softplus(N - scale * (cosine - m)).mean()`. If no negative takes part anywhere, N is -inf
    and its gradient 0.

    Args:
        embeddings: UNIT vectors [B, d] of the whole (gathered) batch, the same on every rank.
        weight: float [stop - start, d], this rank's class centres, of any norm: they are normalised here, in chunks.
        labels: int64 [B], global class ids. -1 = no class: nothing is left out of N, and the cosine is 0. Give such
            samples weight 0.
        scale: s, or one s_j > 0 per row of `weight`.
        rows: (start, stop), the global class ids of `weight`'s rows; None = (0, len(weight)).
        num_classes: of all ranks; None = stop.
        indices: sorted int64 local classes that take part; None = all. A label whose class does not take part counts as -1.
        threshold: negatives with a larger cosine are left out (inter-class filtering).
        mask: bool per row of `weight`; False = not a negative.
        is_unit: the rows of `weight` have norm 1 already.
        group: of the ranks; None = the default process group, or one process.
        numerics: number formats, kernel and memory. What is kept for backward lies in the memory of `weight.grad`, which
            forward allocates (not with `indices`), and in `keep_mb` more.

    Collectives: in forward one SUM all-reduce of `[B, 2]`. Where exp may leave the number range (one scale per class,
    float16, a scale beyond 60 or so), one MAX all-reduce of `[B, 1]` comes before it. In backward none:

    - `embeddings.grad` is THIS RANK'S share, from its own classes. Whoever gathered the embeddings adds up the shares
      of the ranks, as `collectives.gather_rows` does.
    - `weight.grad` is complete.
    - Nothing is scaled by the number of ranks.

    Raises:
        UserError: labels that are not class ids, or settings of `numerics` that do not exist.
        ValueError: `rows` does not fit `weight`, or the scale is not finite.
    """
    start, stop = rows if rows is not None else (0, len(weight))
    if stop - start != len(weight):
        raise ValueError(f"rows {start}..{stop} are {stop - start} classes but weight has {len(weight)} rows")
    if isinstance(scale, float | int) and not math.isfinite(scale):
        raise ValueError("scale must be finite")
    labels = class_ids(labels)
    numerics = on_device(numerics, weight.device, group)
    if not weight.requires_grad:
        numerics = numerics.without_keeping()
    classes = Classes(weight.detach(), scale, indices, threshold, mask, is_unit, numerics)
    total = max(num_classes or stop, 1)
    return _NegativeLogSumExp.apply(embeddings, weight, labels, classes, start, total, group)
