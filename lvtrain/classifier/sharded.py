"""The classifier whose classes are split over the ranks: embeddings and labels in, one scalar loss out, rows and banks kept up to date.

One step:

    classifier.begin_step(step, global_labels)             # which rows take part (NCS); the same answer on any number of ranks
    for each micro-batch: engine.backward(classifier(embeddings, labels, step=step).loss)
    classifier.end_step(lr=...)                            # rows, banks; or classifier.discard_step()

What moves between ranks in one micro-step: forward one all-gather (embeddings, norms and labels in one buffer) and one all-reduce of `[B, 2]`
(`[B, 4]` or `[B, 5]` with expectations; float16 operands or large scales add a MAX all-reduce); backward one reduce-scatter, under way while the rows'
gradient is computed. The host never waits for the device inside forward and backward.

The gradient contract. `loss` is the mean over the gathered samples of all ranks in this micro-step and is the same on every rank. The engine
divides it by the accumulation count before backward and averages the backbone's gradients over ranks; so the embedding gradient, which the
reduce-scatter completes by summation, is multiplied by `gradient_scale` (default: the number of ranks), and nothing else is scaled here. Row
gradients accumulate over the micro-steps, in a buffer of the rows that take part; every rank ends up with the complete gradient of its own rows.
A sample labelled -1 weighs nothing but still counts in the mean's divisor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lvtrain import randomness
from lvtrain.classifier.banks import ExpectationBank
from lvtrain.classifier.logsumexp import combine
from lvtrain.classifier.margins import Margin
from lvtrain.classifier.optimizer import RowOptimizer
from lvtrain.classifier.partition import class_range
from lvtrain.classifier.classes import PRECISIONS, Classes
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.classifier.sampling import chosen_rows
from lvtrain.collectives import (
    Group,
    PendingRows,
    all_gather_rows,
    gather_sizes,
    group_rank,
    group_size,
    reduce_scatter_rows,
)
from lvtrain.errors import UserError
from lvtrain.state import Replicated, Rows, State

_INITIAL_BLOCK = 4096  # classes whose initial rows are drawn together


@dataclass
class ClassifierOutput:
    """`loss` scalar, differentiable. Detached, in the order of the gathered micro-batch (rank by rank) and the same on every rank: `cosine` [B] to the
    own class centre (0 for ignored samples), `expectation_cosine` [B] or None, `labels` [B], `embeddings` [B, d] of unit length. `cos2`: mean of cosine squared
    over the
    samples that are not ignored."""

    loss: torch.Tensor
    cosine: torch.Tensor
    cos2: torch.Tensor
    labels: torch.Tensor
    embeddings: torch.Tensor
    expectation_cosine: torch.Tensor | None = None


class ShardedClassifier(nn.Module):
    """Class centres of `num_classes` identities split over the ranks of `group`, each rank holding the rows `self.rows` of them.

    margin                  see `margins`; its scale s, its target logit, its inter-class filtering
    sample_rate             r: share of the negative classes that take part in a step; `enter_phase` changes it
    expectation_margin      a margin turns on the second anchor's possibility (PCO); `enter_phase` says when it is used
    expectation_negatives   "own": the expectations' own sum over negatives (the paper); "shared": the class centres' sum in both fractions
    expectation_init        "weight" or "first_feature", see `banks.ExpectationBank`
    optimizer               keyword arguments of `RowOptimizer`
    in_backward             apply the row update chunk by chunk during backward, so that no gradient of the rows exists. Then: every class takes
                            part (r = 1), one micro-step a step, `begin_step` is given the learning rate, nothing can clip the rows'
                            gradient, and `discard_step` comes too late: a gradient that is not finite is taken as zero instead
    precision               "float32", "tf32" (CUDA; elsewhere as float32), "half" (float16 operands, float32 cosines and sums: gradient error below
                            1e-3) or "bfloat16" (likewise, error below 1e-2)
    kernel                  what does the elementwise work of a chunk: "torch", or "triton" (CUDA; see `logsumexp_triton`)
    gather                  number format in which embeddings and their gradients travel
    gradient_scale          factor of the embedding gradient; None = number of ranks, for an engine that averages over ranks
    ragged                  ranks may bring different numbers of samples (costs one small all-gather and a host synchronisation)

    Raises UserError for settings that do not go together.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 512,
        *,
        margin: Margin,
        sample_rate: float = 1.0,
        seed: int = 0,
        group: Group = None,
        expectation_margin: Margin | None = None,
        expectation_negatives: Literal["own", "shared"] = "own",
        expectation_init: Literal["weight", "first_feature"] = "weight",
        optimizer: dict[str, Any] | None = None,
        in_backward: bool = False,
        precision: Literal["float32", "tf32", "half", "bfloat16"] = "float32",
        gather: Literal["float32", "bfloat16"] = "float32",
        kernel: Literal["torch", "triton"] = "torch",
        chunk: int | None = None,
        gradient_scale: float | None = None,
        ragged: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"classifier: num_classes is {num_classes}; the dataset must have at least one identity")
        if precision not in PRECISIONS:
            raise UserError(f"classifier.precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
        if kernel == "triton" and torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError("classifier.kernel: triton needs a CUDA device; set classifier.kernel=torch")
        if expectation_negatives not in ("own", "shared"):
            raise UserError(f"method.expectation_negatives: {expectation_negatives!r} is not own or shared")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.margin, self.expectation_margin = margin, expectation_margin
        self.expectation_negatives, self.expectation_init = expectation_negatives, expectation_init
        self.sample_rate, self.seed, self.group = sample_rate, seed, group
        self.in_backward, self.precision, self.gather, self.chunk, self.ragged = in_backward, precision, gather, chunk, ragged
        self.kernel = kernel
        self.ranks = group_size(group)
        self.gradient_scale = float(self.ranks) if gradient_scale is None else gradient_scale
        self.rows = class_range(num_classes, group_rank(group), self.ranks)
        self.weight = nn.Parameter(initial_rows(self.rows, embedding_dim, seed).to(device=device, dtype=dtype))
        self.optimizer = RowOptimizer(self.weight, seed=seed, first_row=self.rows[0], **(optimizer or {}))
        self.expectation: ExpectationBank | None = None
        self.expectation_updates = False
        self._step: _Step | None = None
        self._check_in_backward()

    # ------------------------------------------------------------------------------------------------------------------ phases

    def enter_phase(self, *, sample_rate: float, expectation: Literal["off", "update", "frozen"] = "off", first_time: bool = True) -> None:
        """What a phase changes. An expectation bank that begins here starts as `expectation_init` says, unless its state is about to be loaded
        (`first_time=False`)."""
        if not 0 < sample_rate <= 1:
            raise UserError(f"phase.sample_rate: {sample_rate} is not in (0, 1]")
        self.sample_rate = sample_rate
        self.expectation_updates = expectation == "update"
        if expectation == "off":
            self.expectation = None
        elif self.expectation is None:
            if self.expectation_margin is None:
                raise UserError(f"phase.expectation: {expectation} needs a margin for the expectations (method.m2)")
            device = self.weight.device
            self.expectation = ExpectationBank(self.num_classes, self.embedding_dim, self.rows, init=self.expectation_init, device=device)
            if self.expectation_init == "weight" and first_time:
                self.expectation.start_from(self.weight.detach())
        self._check_in_backward()

    def _check_in_backward(self) -> None:
        if self.in_backward and self.sample_rate < 1:
            raise UserError("classifier.optimizer.in_backward: the update during backward needs all classes, set sample_rate: 1 in this phase")

    # -------------------------------------------------------------------------------------------------------------------- step

    def begin_step(self, step: int, global_labels: torch.Tensor, *, lr: float | None = None, weight_decay: float | None = None) -> None:
        """Chooses the rows that take part in step `step`. `global_labels`: int64 labels of the whole global batch, -1 = ignored, in any order.

        `lr` and `weight_decay` are read only where the update is applied in backward."""
        if global_labels.device.type == "cpu" and len(global_labels) and int(global_labels.max()) >= self.num_classes:
            raise UserError(f"label {int(global_labels.max())} in step {step}, but there are {self.num_classes} classes; repack the dataset")
        indices = chosen_rows(self.seed, step, self.rows, self.sample_rate, global_labels, self.weight.device)
        if self.in_backward and lr is None:
            raise ValueError("in_backward needs begin_step(..., lr=...)")
        self._step = _Step(step, indices, lr=lr, weight_decay=weight_decay)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, step: int, context: dict[str, torch.Tensor] | None = None
    ) -> ClassifierOutput:
        """`embeddings` [b, d] not normalised, any float format; `labels` int64 [b], global class ids, -1 = ignored. Every rank calls it.

        `context`: tensors handed on to the margin by name, in the order of the gathered micro-batch."""
        if self._step is None or self._step.step != step:
            raise RuntimeError(f"begin_step({step}, ...) comes before forward(..., step={step})")
        # an ignored sample may hold anything, even what is not a number: masked before it is normalised, so that no gradient comes back either
        embeddings = torch.where((labels >= 0).unsqueeze(1), embeddings.to(self.weight.dtype), 0.0)
        norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
        unit = nn.functional.normalize(embeddings)
        loss, cosine, expectation_cosine, gathered_labels, gathered = _ShardedLoss.apply(unit, self.weight, norms, labels, self, self._step, context or {})
        valid = (gathered_labels >= 0).to(cosine.dtype)
        cos2 = (cosine.square() * valid).sum() / valid.sum().clamp(min=1)
        return ClassifierOutput(
            loss, cosine, cos2, gathered_labels, gathered, expectation_cosine if self.expectation is not None else None
        )

    @torch.no_grad()
    def end_step(self, *, lr: float, weight_decay: float | None = None) -> None:
        """Updates the rows from the gradients of the step's micro-steps, then the banks and the margin from all its samples."""
        step = self._taken_step()
        if not self.in_backward:
            gradient = step.gradient
            if gradient is None:
                raise RuntimeError("end_step without a backward")
            self.optimizer.step(gradient, step.indices, lr=lr, weight_decay=weight_decay)
        labels = torch.cat(step.labels)
        if self.expectation is not None and self.expectation_updates:
            self.expectation.update(torch.cat(step.embeddings), labels)
        if self.margin.reads_norms:
            self.margin.end_step(torch.cat(step.norms), labels)

    def discard_step(self) -> None:
        """Forgets the step that was begun: nothing was changed (but for `in_backward`, see the class)."""
        self._step = None

    @property
    def chosen(self) -> torch.Tensor | None:
        """Sorted int64 local rows that take part in the step begun; None = all."""
        if self._step is None:
            raise RuntimeError("begin_step comes first")
        return self._step.indices

    def centres_of(self, local_rows: torch.Tensor) -> torch.Tensor:
        """The rows [k, d] of distinct local rows (int64 [k]) that take part in the step, for a loss of a method's own on them. Differentiable: the
        gradient joins the rows' gradient of the step, as it is (complete on this rank, not scaled by the number of ranks)."""
        if self._step is None:
            raise RuntimeError("begin_step comes first")
        if self.in_backward:
            raise UserError("classifier.optimizer.in_backward: this method has a further loss on the class rows; set it to false")
        centres: torch.Tensor = _Centres.apply(self.weight, local_rows, self._step)
        return centres

    def _taken_step(self) -> _Step:
        if self._step is None:
            raise RuntimeError("end_step without begin_step")
        step, self._step = self._step, None
        return step

    def _classes(self, step: _Step, *, expectation: bool) -> Classes:
        bank = self.expectation if expectation else None
        margin = self.margin if bank is None else self.expectation_margin
        assert margin is not None
        return Classes(
            self.weight.detach() if bank is None else bank.rows_tensor.to(self.weight.dtype),
            margin.scale,
            indices=step.indices,
            threshold=margin.filter_threshold,
            mask=bank.valid if bank is not None and self.expectation_init == "first_feature" else None,
            unit=bank is not None,
            chunk=self.chunk,
            precision=self.precision,
            kernel=self.kernel,
        )

    # ------------------------------------------------------------------------------------------------------------------- state

    def _saved(self) -> dict[str, torch.Tensor]:
        saved = {"weight": self.weight.detach(), **self.optimizer.state()}
        if self.expectation is not None:
            saved.update(self.expectation.state())
        return saved

    def state(self) -> State:
        """Everything a checkpoint must hold: row tensors by global class id, and what is the same on every rank. References, not copies."""
        start = self.rows[0]
        state: State = {}
        for name, tensor in self._saved().items():
            state[name] = Rows(tensor, start, self.num_classes) if tensor.dim() else Replicated(tensor)
        for name, tensor in self.margin.state().items():
            state[f"margin.{name}"] = Replicated(tensor)
        return state

    @torch.no_grad()
    def load_state(self, reader: Any, prefix: str = "") -> None:
        """Takes back what `state` gave on any number of ranks, through `reader.rows(name, start, stop)` and `reader.replicated(name)`."""
        start, stop = self.rows
        for name, tensor in self._saved().items():
            tensor.copy_(reader.rows(prefix + name, start, stop) if tensor.dim() else reader.replicated(prefix + name))
        if margin := self.margin.state():
            self.margin.load_state({name: reader.replicated(f"{prefix}margin.{name}") for name in margin})


def initial_rows(rows: tuple[int, int], dim: int, seed: int) -> torch.Tensor:
    """Normal rows of deviation 0.01 (as arcface_torch), float32 [stop - start, dim]; a function of seed and class id, not of who holds it."""
    start, stop = rows
    result = torch.empty(stop - start, dim)
    generator = torch.Generator()
    for block in range(start // _INITIAL_BLOCK, -(-stop // _INITIAL_BLOCK)):
        generator.manual_seed(randomness.torch_seed(seed, "class-rows", block))
        drawn = torch.randn(_INITIAL_BLOCK, dim, generator=generator)
        first = block * _INITIAL_BLOCK
        low, high = max(start, first), min(stop, first + _INITIAL_BLOCK)
        torch.mul(drawn[low - first : high - first], 0.01, out=result[low - start : high - start])
    return result


class _Step:
    """What is remembered between `begin_step` and `end_step`."""

    def __init__(self, step: int, indices: torch.Tensor | None, *, lr: float | None, weight_decay: float | None) -> None:
        self.step, self.indices, self.lr, self.weight_decay = step, indices, lr, weight_decay
        self.gradient: torch.Tensor | None = None  # [k, d], of the rows that take part
        self.backwards = 0
        self.embeddings: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []


def _pack(unit: torch.Tensor, norms: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[b, d + a few]: embeddings, with the norms and labels appended bit for bit, so that one collective carries all three."""
    extra = torch.cat([norms.to(torch.float64).unsqueeze(1).view(torch.uint8), labels.to(torch.int64).unsqueeze(1).view(torch.uint8)], dim=1)
    return torch.cat([unit, extra.view(unit.dtype)], dim=1)


def _unpack(packed: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    extra = packed[:, dim:].contiguous().view(torch.uint8)
    norms = extra[:, :8].contiguous().view(torch.float64).squeeze(1)
    labels = extra[:, 8:].contiguous().view(torch.int64).squeeze(1)
    return packed[:, :dim].to(dtype).contiguous(), norms.to(dtype), labels


class _ShardedLoss(torch.autograd.Function):
    """Gather, passes over the classes, sums over ranks, loss; see the module's docstring for what is communicated and scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: torch.Tensor,
        weight: torch.Tensor,
        norms: torch.Tensor,
        labels: torch.Tensor,
        head: ShardedClassifier,
        step: _Step,
        context: dict[str, torch.Tensor],
    ) -> Any:
        dim, dtype = unit.shape[1], weight.dtype
        wire = torch.bfloat16 if head.gather == "bfloat16" else dtype
        if head.ranks > 1:
            sizes = gather_sizes(len(unit), unit.device, head.group) if head.ragged else [len(unit)] * head.ranks
            x, norms, labels = _unpack(all_gather_rows(_pack(unit.to(wire), norms, labels), sizes, head.group), dim, dtype)
        else:
            sizes, x = [len(unit)], unit.to(wire).to(dtype)
        need_embeddings = ctx.needs_input_grad[0]

        anchors = [head._classes(step, expectation=False)]
        if head.expectation is not None:
            anchors.append(head._classes(step, expectation=True))
        positions = anchors[0].positions(labels, head.rows[0])  # both anchors use the same rows
        targets = [classes.unit_rows_at(positions) for classes in anchors]
        summed = [(x * target).sum(dim=1) for target in targets]
        passes = anchors if head.expectation_negatives == "own" else anchors[:1]
        running = any(classes.needs_running_max(head.num_classes) for classes in passes)
        parts = [forward_pass(classes, x, positions, running=running, need_rows=need_embeddings) for classes in passes]
        if anchors[-1].mask is not None:
            summed.append((anchors[-1].mask[anchors[-1].rows_at(positions)] & (positions >= 0)).to(dtype) if anchors[-1].count else torch.zeros_like(summed[0]))
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
        ctx.running, ctx.kept = running, parts[0].kept
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
            _row_gradients(head, step, partial(weight_gradient_pass, *arguments, running=ctx.running, kept=ctx.kept), ctx.classes.count)
        gradient = None
        if pending is not None:
            gradient = pending.wait().to(x.dtype) * (grad_loss * head.gradient_scale)
        return gradient, None, None, None, None, None, None


class _Centres(torch.autograd.Function):
    """Some rows of the weight, whose gradient is added to the step's."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, local_rows: torch.Tensor, step: _Step) -> torch.Tensor:
        ctx.step, ctx.count = step, len(weight) if step.indices is None else len(step.indices)
        ctx.save_for_backward(local_rows if step.indices is None else torch.searchsorted(step.indices, local_rows))
        return weight[local_rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        if ctx.step.gradient is None:
            ctx.step.gradient = gradient.new_zeros(ctx.count, gradient.shape[1])
        ctx.step.gradient[places] += gradient
        return None, None, None


def _row_gradients(head: ShardedClassifier, step: _Step, run: Callable[..., None], count: int) -> None:
    """Adds this micro-step's gradient to the rows', or applies it at once. `run`: pass 2 but for where its result goes."""
    step.backwards += 1
    if head.in_backward:
        if step.backwards > 1:
            raise UserError("classifier.optimizer.in_backward: a second micro-step in one step; set virtual_batches to the number of ranks")
        head.optimizer.begin_step()

        def apply(start: int, stop: int, gradient: torch.Tensor) -> None:
            assert step.lr is not None
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            head.optimizer.step_chunk(gradient, slice(start, stop), lr=step.lr, weight_decay=step.weight_decay)

        run(apply)
    elif step.gradient is None:
        step.gradient = head.weight.new_empty(count, head.embedding_dim)
        run(out=step.gradient)
    else:
        total = step.gradient

        def add(start: int, stop: int, gradient: torch.Tensor) -> None:
            total[start:stop] += gradient

        run(add)
