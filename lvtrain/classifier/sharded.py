"""The classifier whose classes are split over the ranks: embeddings and labels in, one scalar loss out.

One step:

    classifier.begin_step(step, global_labels)             # which classes take part: the same on any number of ranks
    for each micro-batch: engine.backward(classifier(embeddings, labels, step=step).loss)
    classifier.end_step(lr=...)                            # updates the class centres; or classifier.discard_step()

`sharded_loss.py` computes a micro-batch. The gradient contract:

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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.classifier.classes import Anchor
from lvtrain.classifier.kernel import on_device
from lvtrain.classifier.logsumexp import class_ids
from lvtrain.classifier.margins.base import Margin
from lvtrain.classifier.numerics import EXACT, Numerics
from lvtrain.classifier.optimizer import ADAMW, CentreOptimizer, OptimizerSettings, SideStream
from lvtrain.classifier.partition import class_range, initial_centres
from lvtrain.classifier.sampling import sampled_classes
from lvtrain.classifier.sharded_loss import Centres, Shard, ShardedLoss, Step
from lvtrain.distributed.collectives import Group, group_rank, group_size
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
        self._step: Step | None = None
        self.enter_phase(sample_rate=sample_rate)

    def enter_phase(self, *, sample_rate: float) -> None:
        """Sets what a phase changes."""
        if not 0 < sample_rate <= 1:
            raise UserError(f"phase.sample_rate: {sample_rate} is not in (0, 1]")
        self.sample_rate = sample_rate

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
        self._step = Step(step, sampled_classes(*drawn, global_labels, self.weight.device))

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
        shard = Shard(
            self.rows, self.num_classes, self.group, self.ranks, self.gradient_scale, self.numerics, self.side_stream
        )
        every_anchor = [Anchor(self.weight.detach(), self.margin), *anchors]
        loss, cosine, all_labels, gathered = ShardedLoss.apply(
            unit, self.weight, norms, labels, shard, begun, every_anchor, context or {}, share
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
        centres: Tensor = Centres.apply(self.weight, local_classes, self._begun(), self.side_stream)
        return centres

    def _begun(self) -> Step:
        if self._step is None:
            raise RuntimeError("begin_step comes first")
        return self._step

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
