"""The classifier whose classes are split over the ranks: embeddings and labels in, one scalar loss out.

One step:

    classifier.begin_step(step, global_labels)             # which classes take part: the same on any number of ranks
    for each micro-batch: engine.backward(classifier(embeddings, labels, step=step).loss)
    classifier.end_step(lr=...)                            # updates the class centres; or classifier.discard_step()

Forward of a micro-batch: gather the embeddings of all ranks, pass 1 over this rank's classes, sums over ranks, the loss's
formula over `[B]` numbers. Backward: start the reduce-scatter of the embeddings' gradient, and compute the centres'
gradient (pass 2) meanwhile. The host never waits for the device.

Collectives of a micro-batch: forward one all-gather (embeddings, norms and labels in one buffer) and one all-reduce of
`[B, 2 per anchor]`, one more column for an anchor with `valid` (float16 operands or large scales add a MAX all-reduce);
backward one reduce-scatter.

The gradient contract:

- `loss` is the mean over the gathered samples of all ranks in this micro-batch, the same on every rank. A sample
  labelled -1 has weight 0, but counts in the mean's divisor.
- The engine divides the loss by the number of accumulated micro-batches before backward, and averages the backbone's
  gradients over ranks. So the embeddings' gradient, which the reduce-scatter sums over ranks, is multiplied by the
  number of ranks (`gradient_scale`). Nothing else is scaled here.
- The centres' gradients add up over the micro-batches, in one buffer for the classes that take part. Every rank holds
  the complete gradient of its own classes.

On a GPU the centres are updated on a second stream. `end_step` returns when the update is queued, behind the centres'
gradient only. The next forward waits for it. The backbone's update and its next forward lie in between, and hide it.
Code outside this class calls `settle` before it reads `.weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.classifier.classes import Anchor, Classes
from lvtrain.classifier.kernel import on_device
from lvtrain.classifier.logsumexp import class_ids, combine
from lvtrain.classifier.margins.base import Margin
from lvtrain.classifier.mixed import mixed_loss, partner_labels
from lvtrain.classifier.numerics import EXACT, Numerics
from lvtrain.classifier.optimizer import ADAMW, CentreOptimizer, OptimizerSettings, SideStream
from lvtrain.classifier.partition import class_range, initial_centres
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.classifier.sampling import sampled_classes
from lvtrain.distributed.collectives import (
    Group,
    PendingRows,
    all_gather_rows,
    group_rank,
    group_size,
    reduce_scatter_rows,
)
from lvtrain.errors import UserError


@dataclass
class ClassifierOutput:
    """What one micro-batch gives. `loss` is differentiable, everything else detached.

    The tensors are in the order of the gathered micro-batch (rank by rank) and the same on every rank.

    Attributes:
        loss: scalar.
        cosine: [B], to the sample's own class centre; 0 for ignored samples.
        cos2: scalar, the mean of cosine squared over the samples that are not ignored.
        labels: int64 [B].
        embeddings: [B, d], of unit length; zeros for ignored samples.
    """

    loss: Tensor
    cosine: Tensor
    cos2: Tensor
    labels: Tensor
    embeddings: Tensor


@dataclass
class _Step:
    """What is remembered between `begin_step` and `end_step`."""

    number: int
    indices: Tensor | None  # int64 [k], the local classes that take part; None = all
    gradient: Tensor | None = None  # [k, d]
    labels: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)


class ShardedClassifier(nn.Module):
    """Centres of `num_classes` classes split over the ranks of `group`; this rank holds those of the classes `rows`.

    Args:
        num_classes: over all ranks.
        embedding_dim: d.
        margin: target logit, scale and inter-class filtering (`lvtrain.classifier.margins`).
        numerics: number formats, kernel and memory.
        optimizer: of the class centres.
        sample_rate: r, the share of the classes that take part in a step, the batch's own included; a phase may change it.
        seed: of the first centres and of the sampling.
        group: of the ranks; None = the default process group, or one process.
        device: where the centres are.
        dtype: float64 is for tests.

    Raises:
        UserError: there is no class, or settings that do not go together.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 512,
        *,
        margin: Margin,
        numerics: Numerics = EXACT,
        optimizer: OptimizerSettings = ADAMW,
        sample_rate: float = 1.0,
        seed: int = 0,
        group: Group = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"classifier: num_classes is {num_classes}; the dataset must have at least one identity")
        device = torch.device(device)
        self.num_classes, self.embedding_dim, self.seed, self.group = num_classes, embedding_dim, seed, group
        self.margin = margin.to(device)  # its statistics, if it has any
        self.numerics = on_device(numerics, device, group)
        self.ranks = group_size(group)
        self.gradient_scale = float(self.ranks)
        self.rows = class_range(num_classes, group_rank(group), self.ranks)
        self.weight = nn.Parameter(initial_centres(self.rows, embedding_dim, seed).to(device=device, dtype=dtype))
        self.optimizer = CentreOptimizer(
            self.weight, optimizer, kernel=self.numerics.kernel, seed=seed, first_row=self.rows[0]
        )
        self.side_stream = SideStream(device)
        self._step: _Step | None = None
        self.enter_phase(sample_rate=sample_rate)

    def enter_phase(self, *, sample_rate: float) -> None:
        """Sets what a phase changes."""
        if not 0 < sample_rate <= 1:
            raise UserError(f"phase.sample_rate: {sample_rate} is not in (0, 1]")
        self.sample_rate = sample_rate

    # -------------------------------------------------------------------------------------------------------------------- step

    def begin_step(self, step: int, global_labels: Tensor, *, warmup_factor: float = 1.0) -> None:
        """Chooses the classes that take part in step `step`.

        Args:
            step: number of the step; the sampling depends on it.
            global_labels: int64 labels of the whole global batch in any order, -1 = ignored; best on the host.
            warmup_factor: the share of the margin that applies in this step, from 0 to 1.
        """
        global_labels = class_ids(global_labels, "global_labels")
        on_host = global_labels.device.type == "cpu" and len(global_labels) > 0
        if on_host and (highest := global_labels.numpy().max()) >= self.num_classes:
            raise UserError(
                f"label {highest} in step {step}, but there are {self.num_classes} classes; repack the dataset"
            )
        self.margin.warmup_factor = warmup_factor
        drawn = (self.seed, step, self.num_classes, self.rows, self.sample_rate)
        self._step = _Step(step, sampled_classes(*drawn, global_labels, self.weight.device))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        step: int,
        anchors: Sequence[Anchor] = (),
        context: dict[str, Tensor] | None = None,
        share: float = 1.0,
    ) -> ClassifierOutput:
        """The loss of one micro-batch; every rank calls it, with the same number of samples.

            L = mean_i log(1 + sum over the anchors a of exp(N_ai - T_ai))

        N is the log-sum-exp over a sample's negatives, T its target logit. The class centres are the first anchor.

        Args:
            embeddings: [b, d], not normalised, any float format.
            labels: int64 [b], global class ids; -1 = ignored.
            step: as in `begin_step`.
            anchors: further ones, which get no gradient.
            context: tensors for the margins by name, in the order of the gathered micro-batch.
            share: of the own image, where the images are mixed (`lvtrain.classifier.mixed`, which has the loss); the same
                on every rank. There are no further anchors and no context then.
        """
        begun = self._begun()
        if begun.number != step:
            raise RuntimeError(f"begin_step({step}, ...) comes before forward(..., step={step})")
        labels = class_ids(labels)
        self.settle()
        # an ignored sample may hold anything, even NaN: it is masked before it is normalised, so it gets no gradient
        embeddings = torch.where((labels >= 0).unsqueeze(1), embeddings.to(self.weight.dtype), 0.0)
        norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
        unit = nn.functional.normalize(embeddings)
        every_anchor = [Anchor(self.weight.detach(), self.margin), *anchors]
        loss, cosine, all_labels, gathered = _ShardedLoss.apply(
            unit, self.weight, norms, labels, self, every_anchor, context or {}, share
        )
        valid = (all_labels >= 0).to(cosine.dtype)
        cos2 = (cosine.square() * valid).sum() / valid.sum().clamp(min=1)
        return ClassifierOutput(loss, cosine, cos2, all_labels, gathered)

    @torch.no_grad()
    def end_step(self, *, lr: float, weight_decay: float | None = None) -> None:
        """Updates the centres from the gradients of the step's micro-batches, and the margin from all its samples."""
        step, self._step = self._begun(), None
        if step.gradient is None:
            raise RuntimeError("end_step without a backward")
        update = partial(self.optimizer.step, step.gradient, step.indices, lr=lr, weight_decay=weight_decay)
        self.side_stream.run(update, step.gradient, step.indices)
        if self.margin.reads_norms:
            self.margin.end_step(torch.cat(step.norms), torch.cat(step.labels))

    def discard_step(self) -> None:
        """Forgets the step that was begun. Centres and statistics are unchanged."""
        self._step = None

    def settle(self) -> None:
        """Makes the current stream wait for the last `end_step`. What is queued from now on reads the updated centres."""
        self.side_stream.join()

    @property
    def chosen(self) -> Tensor | None:
        """Sorted int64 local classes that take part in the step begun; None = all."""
        return self._begun().indices

    def centres_of(self, local_classes: Tensor) -> Tensor:
        """The centres [k, d] of distinct local classes (int64 [k]) that take part in the step, for a further loss on them.

        Differentiable: the gradient is added to the centres' gradient of the step as it is (complete on this rank, not
        scaled by the number of ranks).
        """
        self.settle()
        centres: Tensor = _Centres.apply(self.weight, local_classes, self._begun(), self.side_stream)
        return centres

    def _begun(self) -> _Step:
        if self._step is None:
            raise RuntimeError("begin_step comes first")
        return self._step

    # ------------------------------------------------------------------------------------------------------------------- state

    def _saved(self) -> dict[str, Tensor]:
        self.settle()
        return {"weight": self.weight.detach(), **self.optimizer.state()}

    def state(self) -> State:
        """Everything a checkpoint must hold: row tensors by global class id, and what is the same on every rank.

        References, not copies.
        """
        start = self.rows[0]
        state: State = {}
        for name, tensor in self._saved().items():
            state[name] = Rows(tensor, start, self.num_classes) if tensor.dim() else Replicated(tensor)
        for name, tensor in self.margin.state().items():
            state[f"margin.{name}"] = Replicated(tensor)
        return state

    @torch.no_grad()
    def load_state(self, reader: Any, prefix: str = "") -> None:
        """Takes back what `state` gave on any number of ranks.

        `reader.rows(name, start, stop)` and `reader.replicated(name)` give the tensors.
        """
        start, stop = self.rows
        for name, tensor in self._saved().items():
            tensor.copy_(reader.rows(prefix + name, start, stop) if tensor.dim() else reader.replicated(prefix + name))
        if margin := self.margin.state():
            self.margin.load_state({name: reader.replicated(f"{prefix}margin.{name}") for name in margin})


class _ShardedLoss(torch.autograd.Function):
    """Gather, passes over the classes, sums over ranks, loss; the module says what is communicated and scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        weight: Tensor,
        norms: Tensor,
        labels: Tensor,
        head: ShardedClassifier,
        anchors: list[Anchor],
        context: dict[str, Tensor],
        share: float,
    ) -> Any:
        step, numerics = head._begun(), head.numerics
        x, norms, labels = _gather(unit, norms, labels, head)
        classes = [Classes.of(anchors[0], step.indices, numerics)]
        classes += [Classes.of(anchor, step.indices, numerics.without_keeping()) for anchor in anchors[1:]]
        positions = classes[0].positions(labels, head.rows[0])  # the same classes take part in every anchor
        targets = [each.unit_rows_at(positions) for each in classes]
        others = None if share == 1 else partner_labels(labels, head.ranks)
        if others is not None:
            (own,) = classes
            second = own.positions(others, head.rows[0])
            classes = [replace(own, second=second)]
            targets.append(own.unit_rows_at(second))
        sums = [(x * target).sum(dim=1) for target in targets]
        sums += [each.is_valid_at(positions).to(x.dtype) for each in classes if each.mask is not None]
        passes = [each for each, anchor in zip(classes, anchors) if anchor.own_negatives]
        running = any(each.needs_running_max(head.num_classes) for each in passes)
        # The gradient gets its memory here already: until backward writes it, pass 1 keeps exponentials in it.
        needs_gradient = ctx.needs_input_grad[1] and step.gradient is None
        memory = weight.new_empty(classes[0].count, x.shape[1]) if needs_gradient else None
        settings: dict[str, Any] = {"running": running, "need_weighted": ctx.needs_input_grad[0]}
        parts = [
            forward_pass(each, x, positions, gradient_memory=memory if i == 0 else None, **settings)
            for i, each in enumerate(passes)
        ]
        logsumexps, sums = combine(parts, sums, running=running, group=head.group)
        cosines, has_direction = sums[: len(targets)], sums[len(targets) :]
        if others is None:
            loss, grad_n, grad_cosines = _mean_loss(anchors, logsumexps, cosines, has_direction, labels, norms, context)
            grad_cosine = grad_cosines[0]
        else:
            loss, by_n, grad_cosines = mixed_loss(head.margin, share, logsumexps[0], cosines, [labels, others], norms)
            grad_n, grad_cosine = [by_n], torch.cat(grad_cosines)

        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            for part, g in zip(parts, grad_n):
                assert part.weighted is not None
                grad_x.addcmul_(part.weighted, g.unsqueeze(1))
            for target, g in zip(targets, grad_cosines):
                grad_x.addcmul_(target, g.unsqueeze(1))
        ctx.head, ctx.step, ctx.classes = head, step, classes[0]
        ctx.running, ctx.kept, ctx.memory = running, parts[0].kept, memory
        ctx.save_for_backward(x, positions, logsumexps[0], grad_n[0], grad_cosine, grad_x)
        if head.margin.reads_norms:
            step.norms.append(norms)
            step.labels.append(labels)
        gathered = x.detach()
        ctx.mark_non_differentiable(cosines[0], labels, gathered)
        return loss, cosines[0], labels, gathered

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, positions, logsumexp, grad_n, grad_cosine, grad_x = ctx.saved_tensors
        head: ShardedClassifier = ctx.head
        pending: PendingRows | None = None
        if grad_x is not None:
            wire = _wire_format(head)
            pending = reduce_scatter_rows(grad_x.to(wire), [len(x) // head.ranks] * head.ranks, head.group)
        if ctx.needs_input_grad[1]:
            arguments = (ctx.classes, x, positions, logsumexp, grad_n * grad_loss, grad_cosine * grad_loss)
            run = partial(weight_gradient_pass, *arguments, running=ctx.running, kept=ctx.kept)
            _add_gradient(ctx.step, run, ctx.memory)
            ctx.memory = None
            head.side_stream.follow()
        gradient = None
        if pending is not None:
            gradient = pending.wait().to(x.dtype) * (grad_loss * head.gradient_scale)
        return gradient, None, None, None, None, None, None, None


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


def _add_gradient(step: _Step, run: Any, memory: Tensor | None) -> None:
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


class _Centres(torch.autograd.Function):
    """Some class centres, whose gradient is added to the step's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, local_classes: Tensor, step: _Step, side_stream: SideStream) -> Tensor:
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


def _wire_format(head: ShardedClassifier) -> torch.dtype:
    return torch.bfloat16 if head.numerics.gather == "bfloat16" else head.weight.dtype


def _gather(unit: Tensor, norms: Tensor, labels: Tensor, head: ShardedClassifier) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, d], norms [B] and labels [B] of all ranks, by one all-gather.

    Norms and labels are appended to the embeddings bit for bit.
    """
    wire, dtype, dim = _wire_format(head), head.weight.dtype, unit.shape[1]
    if head.ranks == 1:
        return unit.to(wire).to(dtype), norms, labels
    numbers = [norms.to(torch.float64), labels.to(torch.int64)]
    extra = torch.cat([each.unsqueeze(1).view(torch.uint8) for each in numbers], dim=1)
    packed = torch.cat([unit.to(wire), extra.view(wire)], dim=1)
    packed = all_gather_rows(packed, [len(unit)] * head.ranks, head.group)
    extra = packed[:, dim:].contiguous().view(torch.uint8)
    norms = extra[:, :8].contiguous().view(torch.float64).squeeze(1)
    labels = extra[:, 8:].contiguous().view(torch.int64).squeeze(1)
    return packed[:, :dim].to(dtype).contiguous(), norms.to(dtype), labels
