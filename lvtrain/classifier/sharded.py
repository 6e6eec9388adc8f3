"""The classifier whose classes are split over the ranks: embeddings and labels in, one scalar loss out, rows and banks kept up to date.

One step:

    classifier.begin_step(step, global_labels)             # which rows take part (NCS); the same answer on any number of ranks
    for each micro-batch: engine.backward(classifier(embeddings, labels, step=step).loss)
    classifier.end_step(lr=...)                            # rows, banks; or classifier.discard_step()

What moves between ranks in one micro-step: forward one all-gather (embeddings, norms and labels in one buffer) and one all-reduce of `[B, 2]`
(`[B, 4]` or `[B, 5]` with expectations; float16 operands or large scales add a MAX all-reduce); backward one reduce-scatter, under way while the rows'
gradient is computed. The host never waits for the device inside forward and backward.

On a GPU the rows' update has a stream of its own (`aside`): `end_step` returns when it is queued, behind the rows' gradient and nothing else, and the
next forward waits for it; between them lie the backbone's update and its next forward, which hide it. So does whatever else here reads or writes
rows; who reads `.weight` from outside calls `settle` first.

The gradient contract. `loss` is the mean over the gathered samples of all ranks in this micro-step and is the same on every rank. The engine
divides it by the accumulation count before backward and averages the backbone's gradients over ranks; so the embedding gradient, which the
reduce-scatter completes by summation, is multiplied by `gradient_scale` (default: the number of ranks), and nothing else is scaled here. Row
gradients accumulate over the micro-steps, in a buffer of the rows that take part, taken in the first forward; every rank ends up with the complete
gradient of its own rows.
A sample labelled -1 weighs nothing but still counts in the mean's divisor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.classifier.aside import Aside
from lvtrain.classifier.banks import ExpectationBank
from lvtrain.classifier.classes import PRECISIONS, Classes
from lvtrain.classifier.loss import Centres, ShardedLoss, Step
from lvtrain.classifier.margins import Margin
from lvtrain.classifier.optimizer import RowOptimizer
from lvtrain.classifier.partition import class_range, initial_rows
from lvtrain.classifier.sampling import chosen_rows
from lvtrain.distributed.collectives import Group, group_rank, group_size
from lvtrain.errors import UserError


@dataclass
class ClassifierOutput:
    """`loss` scalar, differentiable. Detached, in the order of the gathered micro-batch (rank by rank) and the same on every rank: `cosine` [B] to the
    own class centre (0 for ignored samples), `expectation_cosine` [B] or None, `labels` [B], `embeddings` [B, d] of unit length. `cos2`: mean of cosine squared
    over the samples that are not ignored."""

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
                            1e-3) or "bfloat16" (likewise, below 1e-2; a CPU keeps cosines in float32 then, error below 3e-3); see `classes.formats`
    kernel                  what does the elementwise work of a chunk: "torch", or "triton" (CUDA; see `logsumexp_triton`)
    keep_mb                 MB of exponentials that forward leaves for backward, which then need not be computed again, beyond those that the memory of the
                            rows' gradient holds (all for gathered micro-batches up to d, 2 d in 16 bits): with all of them (B x local classes x 4
                            bytes, 2 in 16 bits) a quarter of the matmuls is saved
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
        keep_mb: float = 8.0,
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
        self.margin = margin.to(device)  # its statistics, if it has any
        self.expectation_margin = None if expectation_margin is None else expectation_margin.to(device)
        self.expectation_negatives, self.expectation_init = expectation_negatives, expectation_init
        self.sample_rate, self.seed, self.group = sample_rate, seed, group
        self.in_backward, self.precision, self.gather, self.chunk, self.ragged = (
            in_backward,
            precision,
            gather,
            chunk,
            ragged,
        )
        self.kernel, self.keep_mb = kernel, keep_mb
        self.ranks = group_size(group)
        self.gradient_scale = float(self.ranks) if gradient_scale is None else gradient_scale
        self.rows = class_range(num_classes, group_rank(group), self.ranks)
        self.weight = nn.Parameter(initial_rows(self.rows, embedding_dim, seed).to(device=device, dtype=dtype))
        self.optimizer = RowOptimizer(self.weight, seed=seed, first_row=self.rows[0], **(optimizer or {}))
        self.expectation: ExpectationBank | None = None
        self.expectation_updates = False
        self.aside = Aside(self.weight.device)
        self._step: Step | None = None
        self._check_in_backward()

    # ------------------------------------------------------------------------------------------------------------------ phases

    def enter_phase(
        self, *, sample_rate: float, expectation: Literal["off", "update", "frozen"] = "off", first_time: bool = True
    ) -> None:
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
            self.expectation = ExpectationBank(
                self.num_classes, self.embedding_dim, self.rows, init=self.expectation_init, device=device
            )
            if self.expectation_init == "weight" and first_time:
                self.settle()
                self.expectation.start_from(self.weight.detach())
        self._check_in_backward()

    def _check_in_backward(self) -> None:
        if self.in_backward and self.sample_rate < 1:
            raise UserError(
                "classifier.optimizer.in_backward: the update during backward needs all classes, set sample_rate: 1 in this phase"
            )

    # -------------------------------------------------------------------------------------------------------------------- step

    def begin_step(
        self, step: int, global_labels: torch.Tensor, *, lr: float | None = None, weight_decay: float | None = None
    ) -> None:
        """Chooses the rows that take part in step `step`. `global_labels`: int64 labels of the whole global batch, -1 = ignored, in any order.

        `lr` and `weight_decay` are read only where the update is applied in backward."""
        if (
            global_labels.device.type == "cpu"
            and len(global_labels)
            and (highest := global_labels.numpy().max()) >= self.num_classes
        ):
            raise UserError(
                f"label {highest} in step {step}, but there are {self.num_classes} classes; repack the dataset"
            )
        indices = chosen_rows(self.seed, step, self.rows, self.sample_rate, global_labels, self.weight.device)
        if self.in_backward and lr is None:
            raise ValueError("in_backward needs begin_step(..., lr=...)")
        self._step = Step(step, indices, lr=lr, weight_decay=weight_decay)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        *,
        step: int,
        context: dict[str, torch.Tensor] | None = None,
    ) -> ClassifierOutput:
        """`embeddings` [b, d] not normalised, any float format; `labels` int64 [b], global class ids, -1 = ignored. Every rank calls it.

        `context`: tensors handed on to the margin by name, in the order of the gathered micro-batch."""
        if self._step is None or self._step.step != step:
            raise RuntimeError(f"begin_step({step}, ...) comes before forward(..., step={step})")
        self.settle()
        # an ignored sample may hold anything, even what is not a number: masked before it is normalised, so that no gradient comes back either
        embeddings = torch.where((labels >= 0).unsqueeze(1), embeddings.to(self.weight.dtype), 0.0)
        norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
        unit = nn.functional.normalize(embeddings)
        loss, cosine, expectation_cosine, gathered_labels, gathered = ShardedLoss.apply(
            unit, self.weight, norms, labels, self, self._step, context or {}
        )
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
            update = partial(self.optimizer.step, gradient, step.indices, lr=lr, weight_decay=weight_decay)
            self.aside.run(update, gradient, step.indices)
        labels = torch.cat(step.labels)
        if self.expectation is not None and self.expectation_updates:
            self.expectation.update(torch.cat(step.embeddings), labels)
        if self.margin.reads_norms:
            self.margin.end_step(torch.cat(step.norms), labels)

    def discard_step(self) -> None:
        """Forgets the step that was begun: nothing was changed (but for `in_backward`, see the class)."""
        self._step = None

    def settle(self) -> None:
        """What is queued on the current stream from now on sees the rows and their moments as the last `end_step` leaves them."""
        self.aside.join()

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
            raise UserError(
                "classifier.optimizer.in_backward: this method has a further loss on the class rows; set it to false"
            )
        self.settle()
        centres: torch.Tensor = Centres.apply(self.weight, local_rows, self, self._step)
        return centres

    def _taken_step(self) -> Step:
        if self._step is None:
            raise RuntimeError("end_step without begin_step")
        step, self._step = self._step, None
        return step

    def classes(self, step: Step, *, expectation: bool) -> Classes:
        """The rows of one anchor for the passes: the class centres or, with `expectation`, the feature expectations."""
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
            keep_mb=self.keep_mb if bank is None else 0.0,
        )

    # ------------------------------------------------------------------------------------------------------------------- state

    def _saved(self) -> dict[str, torch.Tensor]:
        self.settle()
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
