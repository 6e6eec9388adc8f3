"""The loss of one micro-batch over classes that are split over the ranks, and its gradients.

Forward: gather the embeddings of all ranks, pass 1 over this rank's classes, sums over ranks, the loss's formula over `[B]`
numbers. Backward: start the reduce-scatter of the embeddings' gradient, and compute the centres' gradient (pass 2)
meanwhile. `sharded.py` has the gradient contract. The host never waits for the device.

Collectives: forward one all-gather (embeddings, norms and labels in one buffer) and one all-reduce of `[B, 2 per anchor]`,
one more column for an anchor with `valid` (float16 operands or large scales add a MAX all-reduce); backward one
reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lvtrain.classifier.classes import Anchor, Classes
from lvtrain.classifier.logsumexp import combine
from lvtrain.classifier.mixed import mixed_loss, partner_labels
from lvtrain.classifier.numerics import Numerics
from lvtrain.classifier.optimizer import SideStream
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.distributed.collectives import Group, PendingRows, all_gather_rows, reduce_scatter_rows


@dataclass
class Step:
    """What is remembered between `begin_step` and `end_step`."""

    number: int
    indices: Tensor | None  # int64 [k], the local classes that take part; None = all
    gradient: Tensor | None = None  # [k, d]
    labels: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """The classes of this rank, and how it works with the others.

    Attributes:
        rows: half-open range of global class ids that this rank holds.
        num_classes: over all ranks.
        group: of the ranks.
        ranks: how many they are.
        gradient_scale: of the embeddings' gradient, which the reduce-scatter sums over the ranks.
        numerics: number formats, kernel and memory.
        side_stream: where the centres are updated.
    """

    rows: tuple[int, int]
    num_classes: int
    group: Group
    ranks: int
    gradient_scale: float
    numerics: Numerics
    side_stream: SideStream

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """The format in which embeddings of `dtype` and their gradients are sent."""
        return torch.bfloat16 if self.numerics.gather == "bfloat16" else dtype


class ShardedLoss(torch.autograd.Function):
    """Gather, passes over the classes, sums over ranks, loss; the module says what is communicated and scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        weight: Tensor,
        norms: Tensor,
        labels: Tensor,
        shard: Shard,
        step: Step,
        anchors: list[Anchor],
        context: dict[str, Tensor],
        share: float,
    ) -> Any:
        numerics, margin = shard.numerics, anchors[0].margin
        x, norms, labels = _gather(unit, norms, labels, shard)
        classes = [Classes.of(anchors[0], step.indices, numerics)]
        classes += [Classes.of(anchor, step.indices, numerics.without_keeping()) for anchor in anchors[1:]]
        positions = classes[0].positions(labels, shard.rows[0])  # the same classes take part in every anchor
        targets = [each.unit_rows_at(positions) for each in classes]
        others = None if share == 1 else partner_labels(labels, shard.ranks)
        if others is not None:
            (own,) = classes
            second = own.positions(others, shard.rows[0])
            classes = [replace(own, second=second)]
            targets.append(own.unit_rows_at(second))
        sums = [(x * target).sum(dim=1) for target in targets]
        sums += [each.is_valid_at(positions).to(x.dtype) for each in classes if each.mask is not None]
        passes = [each for each, anchor in zip(classes, anchors) if anchor.own_negatives]
        running = any(each.needs_running_max(shard.num_classes) for each in passes)
        # The gradient gets its memory here already: until backward writes it, pass 1 keeps exponentials in it.
        needs_gradient = ctx.needs_input_grad[1] and step.gradient is None
        memory = weight.new_empty(classes[0].count, x.shape[1]) if needs_gradient else None
        settings: dict[str, Any] = {"running": running, "need_weighted": ctx.needs_input_grad[0]}
        parts = [
            forward_pass(each, x, positions, gradient_memory=memory if i == 0 else None, **settings)
            for i, each in enumerate(passes)
        ]
        logsumexps, sums = combine(parts, sums, running=running, group=shard.group)
        cosines, has_direction = sums[: len(targets)], sums[len(targets) :]
        if others is None:
            loss, grad_n, grad_cosines = _mean_loss(anchors, logsumexps, cosines, has_direction, labels, norms, context)
            grad_cosine = grad_cosines[0]
        else:
            loss, by_n, grad_cosines = mixed_loss(margin, share, logsumexps[0], cosines, [labels, others], norms)
            grad_n, grad_cosine = [by_n], torch.cat(grad_cosines)

        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            for part, g in zip(parts, grad_n):
                assert part.weighted is not None
                grad_x.addcmul_(part.weighted, g.unsqueeze(1))
            for target, g in zip(targets, grad_cosines):
                grad_x.addcmul_(target, g.unsqueeze(1))
        ctx.shard, ctx.step, ctx.classes = shard, step, classes[0]
        ctx.running, ctx.kept, ctx.memory = running, parts[0].kept, memory
        ctx.save_for_backward(x, positions, logsumexps[0], grad_n[0], grad_cosine, grad_x)
        if margin.reads_norms:
            step.norms.append(norms)
            step.labels.append(labels)
        gathered = x.detach()
        ctx.mark_non_differentiable(cosines[0], labels, gathered)
        return loss, cosines[0], labels, gathered

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, positions, logsumexp, grad_n, grad_cosine, grad_x = ctx.saved_tensors
        shard: Shard = ctx.shard
        pending: PendingRows | None = None
        if grad_x is not None:
            sizes = [len(x) // shard.ranks] * shard.ranks
            pending = reduce_scatter_rows(grad_x.to(shard.wire(x.dtype)), sizes, shard.group)
        if ctx.needs_input_grad[1]:
            arguments = (ctx.classes, x, positions, logsumexp, grad_n * grad_loss, grad_cosine * grad_loss)
            run = partial(weight_gradient_pass, *arguments, running=ctx.running, kept=ctx.kept)
            _add_gradient(ctx.step, run, ctx.memory)
            ctx.memory = None
            shard.side_stream.follow()
        gradient = None
        if pending is not None:
            gradient = pending.wait().to(x.dtype) * (grad_loss * shard.gradient_scale)
        return gradient, None, None, None, None, None, None, None, None


def _mean_loss(
    anchors: list[Anchor],
    logsumexps: list[Tensor],
    cosines: list[Tensor],
    has_direction: list[Tensor],
    labels: Tensor,
    norms: Tensor,
    context: dict[str, Tensor],
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """`mean_i log(1 + sum_a exp(N_ai - T_ai))`, and its derivatives by N (of the anchors with own negatives) and cosine.

    All tensors are [B]. `has_direction`, for each anchor with `valid`: above 0 where the sample's class has a direction.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in logsumexps + cosines]
        n, target_cosines = leaves[: len(logsumexps)], leaves[len(logsumexps) :]
        own, known, terms = iter(n), iter(has_direction), []
        for anchor, cosine in zip(anchors, target_cosines):
            negatives = next(own) if anchor.own_negatives else n[0]
            term = negatives - anchor.margin.target_logit(cosine, labels, norms, **context)
            terms.append(term if anchor.valid is None else torch.where(next(known) > 0, term, -torch.inf))
        each = torch.logsumexp(torch.stack([torch.zeros_like(terms[0]), *terms]), dim=0)
        loss = torch.where(labels >= 0, each, 0.0).sum() / max(len(labels), 1)
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), grads[: len(n)], grads[len(n) :]


def _add_gradient(step: Step, run: Any, memory: Tensor | None) -> None:
    """Adds a micro-batch's gradient to the step's. `run`: pass 2 without its destination; `memory`: for its result, if any."""
    if memory is not None:
        run(out=memory)
        step.gradient = memory if step.gradient is None else step.gradient.add_(memory)
        return
    total = step.gradient
    assert total is not None

    def add(start: int, stop: int, gradient: Tensor) -> None:
        total[start:stop] += gradient

    run(add)


def _gather(unit: Tensor, norms: Tensor, labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, d], norms [B] and labels [B] of all ranks, by one all-gather.

    Norms and labels are appended to the embeddings bit for bit.
    """
    dtype, dim = unit.dtype, unit.shape[1]
    wire = shard.wire(dtype)
    if shard.ranks == 1:
        return unit.to(wire).to(dtype), norms, labels
    numbers = [norms.to(torch.float64), labels.to(torch.int64)]
    extra = torch.cat([each.unsqueeze(1).view(torch.uint8) for each in numbers], dim=1)
    packed = torch.cat([unit.to(wire), extra.view(wire)], dim=1)
    packed = all_gather_rows(packed, [len(unit)] * shard.ranks, shard.group)
    extra = packed[:, dim:].contiguous().view(torch.uint8)
    norms = extra[:, :8].contiguous().view(torch.float64).squeeze(1)
    labels = extra[:, 8:].contiguous().view(torch.int64).squeeze(1)
    return packed[:, :dim].to(dtype).contiguous(), norms.to(dtype), labels


class Centres(torch.autograd.Function):
    """Some class centres, whose gradient is added to the step's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, local_classes: Tensor, step: Step, side_stream: SideStream) -> Tensor:
        ctx.step, ctx.side_stream = step, side_stream
        ctx.count = len(weight) if step.indices is None else len(step.indices)
        places = local_classes if step.indices is None else torch.searchsorted(step.indices, local_classes)
        ctx.save_for_backward(places)
        return weight[local_classes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        if ctx.step.gradient is None:
            ctx.step.gradient = gradient.new_zeros(ctx.count, gradient.shape[1])
        ctx.step.gradient[places] += gradient
        ctx.side_stream.follow()
        return None, None, None, None
