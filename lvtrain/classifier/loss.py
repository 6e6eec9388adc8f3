"""The sharded loss as one autograd function, and what a step remembers between its begin and its end.

Forward: gather, pass 1 over the classes, sums over ranks, the loss's formula over `[B]` numbers. Backward: the reduce-scatter of the embedding gradient
starts, pass 2 makes the rows' gradient meanwhile. Who sums and who scales is in `sharded`'s docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lvtrain.classifier.logsumexp import combine
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.distributed.collectives import PendingRows, all_gather_rows, gather_sizes, reduce_scatter_rows
from lvtrain.errors import UserError

if TYPE_CHECKING:
    from lvtrain.classifier.sharded import ShardedClassifier


class Step:
    """What is remembered between `begin_step` and `end_step`."""

    def __init__(
        self, step: int, indices: torch.Tensor | None, *, lr: float | None, weight_decay: float | None
    ) -> None:
        self.step, self.indices, self.lr, self.weight_decay = step, indices, lr, weight_decay
        self.gradient: torch.Tensor | None = None  # [k, d], of the rows that take part
        self.backwards = 0
        self.embeddings: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []


def _pack(unit: torch.Tensor, norms: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[b, d + a few]: embeddings, with the norms and labels appended bit for bit, so that one collective carries all three."""
    extra = torch.cat(
        [norms.to(torch.float64).unsqueeze(1).view(torch.uint8), labels.to(torch.int64).unsqueeze(1).view(torch.uint8)],
        dim=1,
    )
    return torch.cat([unit, extra.view(unit.dtype)], dim=1)


def _unpack(packed: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    extra = packed[:, dim:].contiguous().view(torch.uint8)
    norms = extra[:, :8].contiguous().view(torch.float64).squeeze(1)
    labels = extra[:, 8:].contiguous().view(torch.int64).squeeze(1)
    return packed[:, :dim].to(dtype).contiguous(), norms.to(dtype), labels


class ShardedLoss(torch.autograd.Function):
    """Gather, passes over the classes, sums over ranks, loss; see the module's docstring for what is communicated and scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: torch.Tensor,
        weight: torch.Tensor,
        norms: torch.Tensor,
        labels: torch.Tensor,
        head: ShardedClassifier,
        step: Step,
        context: dict[str, torch.Tensor],
    ) -> Any:
        dim, dtype = unit.shape[1], weight.dtype
        wire = torch.bfloat16 if head.gather == "bfloat16" else dtype
        if head.ranks > 1:
            sizes = gather_sizes(len(unit), unit.device, head.group) if head.ragged else [len(unit)] * head.ranks
            x, norms, labels = _unpack(
                all_gather_rows(_pack(unit.to(wire), norms, labels), sizes, head.group), dim, dtype
            )
        else:
            sizes, x = [len(unit)], unit.to(wire).to(dtype)
        need_embeddings = ctx.needs_input_grad[0]

        anchors = [head.classes(step, expectation=False)]
        if head.expectation is not None:
            anchors.append(head.classes(step, expectation=True))
        positions = anchors[0].positions(labels, head.rows[0])  # both anchors use the same rows
        targets = [classes.unit_rows_at(positions) for classes in anchors]
        summed = [(x * target).sum(dim=1) for target in targets]
        passes = anchors if head.expectation_negatives == "own" else anchors[:1]
        running = any(classes.needs_running_max(head.num_classes) for classes in passes)
        # the rows' gradient has its memory from here on: until backward writes it, exponentials wait there
        shelf = (
            None
            if head.in_backward or step.gradient is not None or not ctx.needs_input_grad[1]
            else weight.new_empty(anchors[0].count, dim)
        )
        parts = [
            forward_pass(
                classes,
                x,
                positions,
                running=running,
                need_rows=need_embeddings,
                shelf=shelf if classes is anchors[0] else None,
            )
            for classes in passes
        ]
        if anchors[-1].mask is not None:
            summed.append(
                (anchors[-1].mask[anchors[-1].rows_at(positions)] & (positions >= 0)).to(dtype)
                if anchors[-1].count
                else torch.zeros_like(summed[0])
            )
        logsumexps, summed = combine(parts, summed, running=running, group=head.group)

        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in logsumexps + summed[: len(anchors)]]
            n, cosines = leaves[: len(passes)], leaves[len(passes) :]
            valid = labels >= 0
            terms = [n[0] - head.margin.target_logit(cosines[0], labels, norms, **context)]
            if head.expectation is not None:
                assert head.expectation_margin is not None
                term = n[-1] - head.expectation_margin.target_logit(cosines[1], labels, norms, **context)
                if len(summed) > len(anchors):  # a class that has no expectation yet has no second fraction
                    term = torch.where(summed[-1] > 0, term, -torch.inf)
                terms.append(term)
            each = torch.logsumexp(torch.stack([torch.zeros_like(terms[0]), *terms]), dim=0)
            loss = torch.where(valid, each, 0.0).sum() / max(len(labels), 1)
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        grad_n, grad_cosines = grads[: len(passes)], grads[len(passes) :]

        grad_x = None
        if need_embeddings:
            grad_x = torch.zeros_like(x)
            for part, g in zip(parts, grad_n):
                assert part.rows is not None
                grad_x.addcmul_(part.rows, g.unsqueeze(1))
            for target, g in zip(targets, grad_cosines):
                grad_x.addcmul_(target, g.unsqueeze(1))
        ctx.head, ctx.step, ctx.classes, ctx.sizes, ctx.wire = head, step, anchors[0], sizes, wire
        ctx.running, ctx.kept, ctx.shelf = running, parts[0].kept, shelf
        ctx.save_for_backward(x, positions, logsumexps[0], grad_n[0], grad_cosines[0], grad_x)
        if head.expectation is not None and head.expectation_updates:
            step.embeddings.append(x)
        if head.margin.reads_norms:
            step.norms.append(norms)
        step.labels.append(labels)
        loss = loss.detach()
        cosine = cosines[0].detach()
        expectation_cosine = cosines[1].detach() if head.expectation is not None else torch.zeros((), device=x.device)
        gathered = x.detach()
        ctx.mark_non_differentiable(cosine, expectation_cosine, labels, gathered)
        return loss, cosine, expectation_cosine, labels, gathered

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, positions, logsumexp, grad_n, grad_cosine, grad_x = ctx.saved_tensors
        head, step = ctx.head, ctx.step
        pending: PendingRows | None = None
        if grad_x is not None:
            pending = reduce_scatter_rows(grad_x.to(ctx.wire), ctx.sizes, head.group)
        if ctx.needs_input_grad[1]:
            arguments = (ctx.classes, x, positions, logsumexp, grad_n * grad_loss, grad_cosine * grad_loss)
            _row_gradients(
                head, step, partial(weight_gradient_pass, *arguments, running=ctx.running, kept=ctx.kept), ctx.shelf
            )
            ctx.shelf = None
            head.aside.follow()
        gradient = None
        if pending is not None:
            gradient = pending.wait().to(x.dtype) * (grad_loss * head.gradient_scale)
        return gradient, None, None, None, None, None, None


class Centres(torch.autograd.Function):
    """Some rows of the weight, whose gradient is added to the step's."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, local_rows: torch.Tensor, head: ShardedClassifier, step: Step
    ) -> torch.Tensor:
        ctx.head, ctx.step, ctx.count = head, step, len(weight) if step.indices is None else len(step.indices)
        ctx.save_for_backward(local_rows if step.indices is None else torch.searchsorted(step.indices, local_rows))
        return weight[local_rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        if ctx.step.gradient is None:
            ctx.step.gradient = gradient.new_zeros(ctx.count, gradient.shape[1])
        ctx.step.gradient[places] += gradient
        ctx.head.aside.follow()
        return None, None, None, None


def _row_gradients(head: ShardedClassifier, step: Step, run: Callable[..., None], shelf: torch.Tensor | None) -> None:
    """Adds this micro-step's gradient to the rows', or applies it at once. `run`: pass 2 but for where its result goes; `shelf`: the memory for it, if
    forward took any."""
    step.backwards += 1
    if head.in_backward:
        if step.backwards > 1:
            raise UserError(
                "classifier.optimizer.in_backward: a second micro-step in one step; set micro_batches to the number of ranks"
            )
        head.optimizer.begin_step()

        def apply(start: int, stop: int, gradient: torch.Tensor) -> None:
            assert step.lr is not None
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            head.optimizer.step_chunk(gradient, slice(start, stop), lr=step.lr, weight_decay=step.weight_decay)

        run(apply)
    elif shelf is not None:
        run(out=shelf)
        step.gradient = shelf if step.gradient is None else step.gradient.add_(shelf)
    else:
        assert step.gradient is not None
        total = step.gradient

        def add(start: int, stop: int, gradient: torch.Tensor) -> None:
            total[start:stop] += gradient

        run(add)
