"""Cluster: joint label classification and supervised contrastive clustering (arXiv 2312.04029).

A bank (`classifier.banks.CentreBank`) holds a centre c_j per class, which follows the features. It also holds the class's
concentration phi_j: the mean distance of its recent features to c_j over log(Z + 10), small for a tight class. Over the
classes S that take part in the step:

    L_CG   ArcFace with margin m_i = m_low + (m_high - m_low) lambda_i, lambda = (phi_y - min phi) / (max phi - min phi)
    L_con  softplus(N - T): T = x.c_y / phi_y, N = log sum over the other centres of exp(x.c_j / phi_j)
    L_ali  mean of 1 - cos(w_y, c_y), which moves the class centre w_y; the cluster centre is the fixed target
    L      L_CG + alpha L_con + beta L_ali

| the paper's setting | baseline | 1 | 2 | 3 | 4 | 5 | 6 |
|---|---|---|---|---|---|---|---|
| guided | false | true | false | false | true | true | true |
| alpha (clustering: contrastive) | 0 | 0 | > 0 | 0 | > 0 | 0 | > 0 |
| beta | 0 | 0 | 0 | > 0 | 0 | > 0 | > 0 |

The phase's `sample_rate` decides S. Setting 3 is inferred: the text we have describes 1, 2, 4, 5 and 6.

Our readings, besides those of the bank:

- the map to m_low and m_high; lambda = 1/2 where all classes are equally tight;
- a class without a measured distance counts as the step's mean (PCL gives a cluster of one image the largest phi);
- phi is the temperature as it is, with a floor (PCL cuts it at its 10th and 90th percentile, and scales
  its mean: `mean_temperature`);
- classes without a centre yet are left out of L_con and L_ali.

A step reads the bank as it was at the step's start, so nothing depends on the number of ranks.

Collectives: at the step's start, one all-reduce of about three numbers per class of the global batch, and one of two
numbers. In a micro-batch, those of the classifier; L_con adds two all-reduces (MAX of [B], SUM of [B, 2]) and a
reduce-scatter in the backward pass, L_ali an all-reduce of one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from lvtrain.checkpoint.state import Rows, State
from lvtrain.classifier import ClassifierOutput, negative_logsumexp
from lvtrain.classifier.banks import CentreBank
from lvtrain.classifier.margins import ClusterGuided
from lvtrain.classifier.margins.arcface import ArcFaceSection
from lvtrain.data import Batch
from lvtrain.distributed.collectives import all_reduce_sum, gather_rows
from lvtrain.distributed.world import to_device
from lvtrain.errors import UserError
from lvtrain.health.first_loss import FirstLoss
from lvtrain.methods.base import LossOutput, StepInfo
from lvtrain.methods.cost import Cost
from lvtrain.methods.heads import classifier_section
from lvtrain.methods.supervised import SupervisedMethod, SupervisedSection, batch_cosine
from lvtrain.recipe.base import Duration, in_steps_or_epochs, setting
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Phase, Recipe


class WithTemperature(nn.Module):
    """`[B, 3, H, W]` -> embeddings `[B, d]` and 1 / tau0 `[1]`, the one learnable temperature of the ablation."""

    def __init__(self, backbone: nn.Module, tau0: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(tau0)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(images), torch.exp(-self.log_temperature.float())


@dataclass(frozen=True)
class Clusters:
    """What a step reads of the bank; the same on every rank, except `mine`.

    Attributes:
        classes: int64 `[P]`, the sorted distinct labels of the global batch.
        phi: `[P]`, their concentrations.
        known: bool `[P]`, whether a class has a centre.
        mean: scalar, of the concentrations that are measured in S.
        deviation: their standard deviation.
        lowest: the least of them.
        highest: the largest of them.
        mine: int64 `[p]`, local rows of those of `classes` that are on this rank.
    """

    classes: Tensor
    phi: Tensor
    known: Tensor
    mean: Tensor
    deviation: Tensor
    lowest: Tensor
    highest: Tensor
    mine: Tensor

    def hardness(self) -> Tensor:
        """Hardness lambda of each class of the step, `[P]` in [0, 1]."""
        span = self.highest - self.lowest
        return torch.where(span > 0, ((self.phi - self.lowest) / span.clamp_min(1e-30)).clamp(0, 1), 0.5)

    def at(self, values: Tensor, labels: Tensor) -> Tensor:
        """Values `[P]` of the classes -> `[B]`, one for each label; for -1 it may be anything."""
        return F.pad(values, (0, 1), value=1)[torch.searchsorted(self.classes, labels)]


class ClusterSection(SupervisedSection):
    """Joint label classification and supervised contrastive clustering; the defaults are the paper's setting 6."""

    guided: bool = setting(True, "cluster-guided margins; false: ArcFace with classifier.margin.m")
    m_low: float = setting(0.4, "margin of the tightest cluster of the step", unit="radians", ge=0)
    m_high: float = setting(0.6, "margin of the loosest cluster of the step", unit="radians", ge=0)
    clustering: Literal["contrastive", "triplet", "centre", "none"] = setting(
        "contrastive", "clustering loss; triplet and centre loss are the paper's comparisons"
    )
    alpha: float = setting(1.0, "weight of the clustering loss; 0: off", ge=0)
    beta: float = setting(1.0, "weight of the cluster-aligning loss; 0: off", ge=0)
    temperature: Literal["concentration", "learnable"] = setting(
        "concentration", "one temperature per class, phi_j, or a single learnable tau0"
    )
    tau0: float = setting(0.07, "first value of the learnable temperature", gt=0)
    mean_temperature: float | None = setting(
        None, "the temperatures are scaled to this mean over the step's classes, as in PCL; absent: they are not", gt=0
    )
    min_temperature: float = setting(0.05, "smallest temperature of a class", gt=0)
    momentum: float = setting(0.9, "decay of the cluster centres", ge=0, lt=1)
    recent: int = setting(
        100, "Z: number of most recent features from which a class's concentration is computed", unit="features", gt=0
    )
    smoothing: float = setting(10.0, "PCL's alpha in Z log(Z + alpha)", gt=0)
    triplet_margin: float = setting(0.2, "margin of the triplet loss", ge=0)
    warmup: Duration = setting(
        lambda: Duration("1 epochs"),
        "time at the start with plain ArcFace, in which the cluster centres begin to follow the features; in steps or epochs",
    )

    @model_validator(mode="after")
    def _fits(self) -> ClusterSection:
        in_steps_or_epochs(self.warmup)
        if self.m_high < self.m_low:
            raise ValueError(f"m_high {self.m_high} is below m_low {self.m_low}")
        return self


@METHODS.register("cluster")
class ClusterMethod(SupervisedMethod):
    """Joint classification and supervised contrastive clustering (arXiv 2312.04029)."""

    section = ClusterSection
    title = "joint classification and contrastive clustering (arXiv 2312.04029)"
    settings: ClusterSection

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        return Cost(has_classes=True, banks=("cluster centres",), bank_has_negatives=True)

    @classmethod
    def first_loss(cls, recipe: Recipe, *, num_classes: int) -> FirstLoss | str:
        """Plain ArcFace's in the warm-up. Without one, it is not known for the clustering and aligning losses."""
        settings: ClusterSection = recipe.method  # type: ignore[assignment]
        if not settings.warmup.amount:
            return "what the losses on cluster centres begin with is not known (method.warmup: 0)"
        return super().first_loss(recipe, num_classes=num_classes)

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        settings: ClusterSection = recipe.method  # type: ignore[assignment]
        margin = classifier_section(recipe).margin
        if not isinstance(margin, ArcFaceSection) or margin.straight_through:
            raise UserError(
                "method cluster extends ArcFace: set classifier.margin.name: arcface, without straight_through"
            )
        self.plain_margin = margin.m
        guided = ClusterGuided(scale=margin.scale, filter_threshold=margin.filter_threshold)
        super().__init__(recipe, num_classes=num_classes, device=device, margin=guided)
        self.learnable = settings.clustering == "contrastive" and settings.temperature == "learnable"
        if self.learnable:
            self.module = WithTemperature(self.backbone, settings.tau0).to(device)
        self.bank = CentreBank(
            num_classes,
            recipe.backbone.embedding_dim,
            self.classifier.rows,
            momentum=settings.momentum,
            window=settings.recent,
            alpha=settings.smoothing,
            device=device,
        )
        self.triplet = triplet_loss(settings.triplet_margin) if settings.clustering == "triplet" else None
        self.seen: list[ClassifierOutput] = []
        self.expected: Tensor | None = None  # labels of the current step, on the host

    # -------------------------------------------------------------------------------------------------------------------- step

    def begin_step(self, now: StepInfo, global_labels: Tensor) -> None:
        super().begin_step(now, global_labels)
        self.expected = global_labels
        self.seen.clear()
        self.warm = now.warmup_factor(self.settings.warmup) == 1.0
        self.clusters = self.read_bank(global_labels)
        if self.settings.guided and self.warm:
            low, high = self.settings.m_low, self.settings.m_high
            self.margins = low + (high - low) * self.clusters.hardness()
        else:
            self.margins = torch.full_like(self.clusters.phi, self.plain_margin)

    def own_loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        embeddings, inverse_temperature = outputs if self.learnable else (outputs, None)
        context = {"classes": self.clusters.classes, "margins": self.margins}
        output = self.classifier(embeddings, batch.labels, step=now.step, context=context)
        self.seen.append(output)
        loss, metrics = output.loss, {"cos2": output.cos2, "loss_classification": output.loss.detach()}
        metrics |= {"batch_cosine": batch_cosine(output.embeddings)}
        metrics |= {"phi_mean": self.clusters.mean, "phi_std": self.clusters.deviation}
        metrics |= {"phi_min": self.clusters.lowest, "phi_max": self.clusters.highest}
        metrics |= {"margin_mean": self.margins.mean()}
        if self.warm and self.settings.alpha > 0 and self.settings.clustering != "none":
            term = self.clustering_loss(embeddings, batch.labels, output, inverse_temperature)
            loss = loss + self.settings.alpha * term
            metrics["loss_clustering"] = term.detach()
        if self.warm and self.settings.beta > 0:
            term = self.aligning_loss(output.labels)
            loss = loss + self.settings.beta * term
            metrics["loss_aligning"] = term.detach()
        if inverse_temperature is not None:
            metrics["temperature"] = 1 / inverse_temperature.detach().squeeze()
        return LossOutput(loss, metrics, output.cosine)

    def end_step(self, now: StepInfo, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        super().end_step(now, full_parameters)
        labels = torch.cat([output.labels for output in self.seen])
        self.bank.update(torch.cat([output.embeddings for output in self.seen]), labels, self.expected)
        self.seen.clear()

    def discard_step(self) -> None:
        super().discard_step()
        self.seen.clear()

    # -------------------------------------------------------------------------------------------------------------------- bank

    @torch.no_grad()
    def read_bank(self, global_labels: Tensor) -> Clusters:
        """One SUM and one MAX all-reduce. The host does not wait: it has the labels, and finds the classes itself."""
        device, (start, stop) = self.bank.rows_tensor.device, self.bank.rows
        classes = torch.unique(global_labels[global_labels >= 0])
        here = (classes >= start) & (classes < stop)
        mine = to_device(classes[here] - start, device)
        # one behind the last row, for a class that is not on this rank
        places = to_device(torch.where(here, classes - start, stop - start), device)
        phi, measured, chosen = self.bank.concentration(), self.bank.measured, self.classifier.chosen
        table = torch.stack(
            [F.pad(column.to(phi.dtype), (0, 1))[places] for column in (phi, measured, self.bank.valid)]
        )
        if chosen is not None:
            phi, measured = phi[chosen], measured[chosen]
        # a class that was never measured has phi = 0 and adds nothing to the sums
        sums = torch.stack([phi.sum(), phi.square().sum(), measured.sum().to(phi.dtype)])
        ends = torch.stack([torch.where(measured, -phi, -math.inf), torch.where(measured, phi, -math.inf)])
        ends = F.pad(ends, (0, 1), value=-math.inf).amax(dim=1)
        sums = all_reduce_sum(torch.cat([sums, table.flatten()]))
        if self.classifier.ranks > 1:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        total, squares, count = sums[:3]
        mean = torch.where(count > 0, total / count.clamp_min(1), 1.0)
        deviation = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt() * (count > 0)
        lowest, highest = torch.where(count > 0, torch.stack([-ends[0], ends[1]]), mean).unbind()
        of_class, is_measured, known = sums[3:].view(3, -1)
        of_class = torch.where(is_measured > 0, of_class, mean)
        return Clusters(to_device(classes, device), of_class, known > 0, mean, deviation, lowest, highest, mine)

    def temperatures(self, phi: Tensor) -> Tensor:
        """The temperature of each class, from its concentration."""
        mean = self.settings.mean_temperature
        factor = 1.0 if mean is None else mean / self.clusters.mean
        return (phi * factor).clamp_min(self.settings.min_temperature)

    # ------------------------------------------------------------------------------------------------------------------ losses

    def clustering_loss(
        self, embeddings: Tensor, labels: Tensor, output: ClassifierOutput, inverse_temperature: Tensor | None
    ) -> Tensor:
        """Scalar, the same on every rank: the mean over the micro-batch of all ranks. Only the embeddings get a gradient."""
        unit = F.normalize(embeddings.to(output.embeddings.dtype)) * (labels >= 0).unsqueeze(1)
        if self.triplet is not None:  # within a micro-batch, so that it does not depend on the number of ranks
            own = self.triplet(unit, labels)
            return own - own.detach() + all_reduce_sum(own.detach()) / self.classifier.ranks
        gathered = output.embeddings
        if inverse_temperature is not None:  # before the gather, whose backward sums its gradient over the ranks
            unit, gathered = unit * inverse_temperature, gathered * inverse_temperature.detach()
        sizes, scale = [len(unit)] * self.classifier.ranks, self.classifier.gradient_scale
        x = gather_rows(unit, sizes=sizes, gradient_scale=scale, gathered=gathered)
        known = (output.labels >= 0) & self.clusters.at(self.clusters.known, output.labels)
        if self.settings.clustering == "centre":
            each = self.centre_terms(x, output.labels)
        else:
            each = self.contrastive_terms(x, output.labels, scaled=inverse_temperature is not None)
        return torch.where(known, each, 0.0).sum() / max(len(each), 1)

    def contrastive_terms(self, x: Tensor, labels: Tensor, *, scaled: bool) -> Tensor:
        """softplus(N - T) over the centres, `[B]`. `scaled`: x is already divided by the one temperature."""
        phi = torch.where(self.bank.measured, self.bank.concentration(), self.clusters.mean)
        negatives, target = negative_logsumexp(
            x,
            self.bank.rows_tensor.to(x.dtype),
            labels,
            scale=torch.ones_like(phi, dtype=x.dtype) if scaled else (1 / self.temperatures(phi)).to(x.dtype),
            rows=self.bank.rows,
            num_classes=self.bank.num_classes,
            indices=self.classifier.chosen,
            mask=self.bank.valid,
            is_unit=True,
            numerics=self.classifier.numerics,
        )
        if not scaled:
            target = target / self.clusters.at(self.temperatures(self.clusters.phi), labels).to(x.dtype)
        return F.softplus(negatives - target)

    def centre_terms(self, x: Tensor, labels: Tensor) -> Tensor:
        """Centre loss (Wen et al. 2016) against the bank's centres, `[B]`: |x - c_y|^2 / 2 = 1 - x.c_y of unit vectors."""
        start, stop = self.bank.rows
        local = torch.where((labels >= start) & (labels < stop), labels - start, stop - start)
        own = F.pad(self.bank.rows_tensor, (0, 0, 0, 1)).to(x.dtype)[local]
        return 1 - all_reduce_sum((x * own).sum(dim=1))

    def aligning_loss(self, labels: Tensor) -> Tensor:
        """Scalar, the same on every rank. Only the class centres of this rank get a gradient. `labels`: `[B]` of all ranks."""
        mine = self.clusters.mine
        place = torch.searchsorted(mine, labels - self.bank.rows[0])
        hit = F.pad(mine, (0, 1), value=-1)[place] == labels - self.bank.rows[0]
        count = torch.zeros(len(mine) + 1, dtype=torch.int64, device=labels.device)
        count.index_add_(0, torch.where(hit & (labels >= 0), place, len(mine)), torch.ones_like(labels))
        centres = self.classifier.centres_of(mine)
        cosine = (F.normalize(centres) * self.bank.rows_tensor[mine].to(centres.dtype)).sum(dim=1)
        total = (count[:-1] * self.bank.valid[mine] * (1 - cosine)).sum()
        return all_reduce_sum(total) / max(len(labels), 1)

    # ------------------------------------------------------------------------------------------------------------------- state

    def state(self) -> State:
        start, total = self.bank.rows[0], self.bank.num_classes
        bank: State = {f"cluster.{name}": Rows(tensor, start, total) for name, tensor in self.bank.state().items()}
        return super().state() | bank

    def load_state(self, reader: Any) -> None:
        super().load_state(reader)
        self.bank.load_state({name: reader.rows(f"cluster.{name}", *self.bank.rows) for name in self.bank.state()})


def triplet_loss(margin: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Batch-hard triplet loss of pytorch-metric-learning, of unit embeddings `[B, d]` and labels `[B]`; -1 is left out.

    Raises:
        UserError: the library is not installed.
    """
    try:
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchHardMiner
    except ImportError as error:
        raise UserError("method.clustering=triplet needs a library: pip install pytorch-metric-learning") from error
    loss, miner = TripletMarginLoss(margin=margin), BatchHardMiner()

    def triplet(x: Tensor, labels: Tensor) -> Tensor:
        x, labels = x[labels >= 0], labels[labels >= 0]
        value: Tensor = loss(x, labels, miner(x.detach(), labels))
        return value

    return triplet
