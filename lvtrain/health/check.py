"""The health check of a phase: it measures signs while the trainer trains, and names causes at the log line.

Nothing that it does changes a weight, a draw or a gradient. All figures stay on the device until `read`, which the
trainer calls with the log line, where the device is waited for anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lvtrain.data import Batch, ShardDataset
from lvtrain.data.augment import augmentation
from lvtrain.data.augment.operations import Crop, Grey
from lvtrain.data.order import SampleOrder
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.health.batch_signs import BatchSigns
from lvtrain.health.causes import Finding
from lvtrain.health.kinds import Kinds
from lvtrain.health.plateau import Plateau
from lvtrain.health.probes import Gradients, Movement
from lvtrain.health.rules import Signs, name_causes
from lvtrain.health.served import Files, Originals
from lvtrain.health.start import check_counts, check_recipe, count_images
from lvtrain.recipe.sections import Recipe

_LEARNED = 50  # steps before which embeddings say nothing of identities
_ROWS = 64  # class centres of this rank whose movement is watched
_LOOKED_AT = 8  # images of a micro-batch that are compared with their files
_SIDE = 8  # of their thumbnails, in pixels


class HealthCheck:
    """What is measured of one phase on one rank.

    Args:
        recipe: of the run.
        dataset: opened in this process.
        world: this process among the ranks.
        order: of the samples.
        method: `lvtrain.methods.Method`.
        phase: number of the phase in the recipe.
    """

    def __init__(
        self, recipe: Recipe, dataset: ShardDataset, world: World, order: SampleOrder, method: Any, *, phase: int = 0
    ) -> None:
        self.recipe, self.dataset, self.world, self.method = recipe, dataset, world, method
        self.classifier = getattr(method, "classifier", None)
        self.facts = _facts(recipe, len(dataset), method, phase)
        self.files, self.originals = Files(), Originals(dataset, order)
        named = list(method.module.named_parameters())
        self.movement, self.gradients = Movement(named), Gradients(named)
        self.batch_signs = BatchSigns(world.device)
        self.kinds: Kinds | None = None
        if self.classifier is not None:
            self.counts = count_images(dataset)
            self.kinds = Kinds(self.counts, recipe.backbone.embedding_dim, world.device)
        self.plateau = Plateau(recipe)
        self.probing = self.counted = False
        self.steps = 0
        self.probed: dict[str, torch.Tensor] = {}
        self.pulls: list[torch.Tensor] = []
        self.looked_at: tuple[np.ndarray, torch.Tensor, torch.Tensor] | None = None
        self.rows_before: torch.Tensor | None = None
        self.total: dict[str, float] = {}

    def at_start(self) -> list[Finding]:
        """What recipe and labels show."""
        has_attention = any(type(module).__name__.endswith("Attention") for module in self.method.module.modules())
        sizes = {"classes": self.dataset.num_classes, "images": len(self.dataset)}
        found = check_recipe(self.recipe, **sizes, has_attention=has_attention)
        return found + check_counts(self.counts) if self.classifier is not None else found

    # ------------------------------------------------------------------------------------------------------------ in a step

    def begin_step(self, step: int) -> None:
        """Called before the first micro-batch; `step` counts from 0."""
        self.steps += 1
        self.counted = False
        self.probing = (step + 1) % self.recipe.logging.every == 0
        if self.classifier is not None and self.rows_before is None:
            self.rows_before = self._some_rows()
        if self.probing:
            self.pulls = []
            self.gradients.begin()

    def micro_batch(self, batch: Batch, outputs: Any, first: int, accumulation: int) -> None:
        """Called between the loss and its backward.

        Args:
            batch: served.
            outputs: of the method's module.
            first: the stream's position of its first image.
            accumulation: micro-batches of this rank in a step.
        """
        images = next(iter(batch.views.values()))
        embeddings = None
        if self.kinds is not None:
            embeddings = outputs[0] if isinstance(outputs, tuple) else outputs
            self.kinds.add(embeddings, batch.labels)
        if not self.counted:  # one micro-batch of a step is enough, and keeps the cost small
            self.batch_signs.add(images, batch.labels)
            self.counted = True
        if not self.probing:
            return
        if embeddings is not None and embeddings.requires_grad:
            held, size = embeddings.detach(), len(embeddings) * accumulation
            embeddings.register_hook(lambda gradient: self._pull(gradient, held, size))
        if self.looked_at is None:
            self.originals.check_order(batch, first)
            self.batch_signs.look_closely(images)
            some = slice(None, None, max(1, len(images) // _LOOKED_AT))
            thumbs = functional.adaptive_avg_pool2d(images[some][:_LOOKED_AT].float(), _SIDE)
            ids = batch.sample_ids.numpy()[some][:_LOOKED_AT]
            self.looked_at = ids, batch.labels[some][:_LOOKED_AT].clone(), thumbs

    @torch.no_grad()
    def _pull(self, gradient: torch.Tensor, embeddings: torch.Tensor, size: int) -> None:
        """How strongly the loss turns an embedding: |gradient| |x|, times the images of a step on this rank."""
        self.pulls.append((gradient.float().norm(dim=1) * embeddings.float().norm(dim=1)).mean() * size)

    def end_micro_batch(self) -> None:
        """Called after backward."""
        if self.probing:
            self.gradients.end_micro_batch()

    def before_update(self) -> None:
        """Called before the optimizer's step."""
        if self.probing:
            self.movement.begin()

    @torch.no_grad()
    def end_step(self, grad_norm: torch.Tensor, lr: float, *, finite: bool) -> None:
        """Called after the update. `grad_norm`: scalar on the device, over all ranks."""
        if not self.probing:
            return
        norm, dead = self.gradients.end(self.world.device)
        share, stride, shrink = self.movement.end()
        self.probed = {}
        if finite:
            self.facts["rate"] = lr
            self.probed = {"moved": share, "stride": stride / lr, "shrink": shrink / lr, "dead": dead}
            self.probed |= {"own_norm": norm, "grad_norm": grad_norm}
        if finite and self.pulls:
            self.probed["pull"] = torch.stack(self.pulls).mean()

    # ---------------------------------------------------------------------------------------------------- with the log line

    def _some_rows(self) -> torch.Tensor:
        assert self.classifier is not None
        self.classifier.settle()
        weight = self.classifier.weight.detach()
        return weight[:: max(1, len(weight) // _ROWS)][:_ROWS].float().clone()

    def _rows_moved(self) -> dict[str, torch.Tensor]:
        rows, before = self._some_rows(), self.rows_before
        self.rows_before = rows
        return {} if before is None or not len(rows) else {"rows_moved": (rows != before).any(dim=1).float().mean()}

    def read(self, row: dict[str, Any]) -> list[Finding]:
        """What the signs of all ranks and a row of `metrics.jsonl` name. A collective; the device is waited for."""
        step, epoch, device = row["step"], row["epoch"], self.world.device
        tensors = self.probed | (self._rows_moved() if self.classifier is not None else {})
        values = (
            torch.stack([each.double().reshape(()).to(device) for each in tensors.values()]).tolist() if tensors else []
        )
        found = self.batch_signs.read() | self.files.read() | dict(zip(tensors, values))
        if self.looked_at is not None:
            ids, labels, thumbs = self.looked_at
            self.originals.check_images(ids, labels.cpu().numpy(), thumbs.cpu().numpy())
        found |= self.originals.read()
        if self.kinds is not None and step >= _LEARNED:
            found |= self.kinds.read(self.classifier)
        ranks = worlds.gather_objects(found)
        for name in ("same", "other"):
            for key in (f"{name}_pairs", f"{name}_pixels", f"{name}_pixels_square"):
                self.total[key] = self.total.get(key, 0.0) + sum(rank[key] for rank in ranks)
        signs = Signs(ranks, self.total, self.steps, step, epoch, self.facts)
        self.steps, self.probed, self.looked_at = 0, {}, None
        return name_causes(signs) + self.plateau.add(row, step=step, epoch=epoch)


def _facts(recipe: Recipe, images: int, method: Any, phase: int) -> dict[str, Any]:
    """What the rules know of the recipe, see `rules.Signs`."""
    section, view = recipe.method, augmentation(recipe.data.augmentation)[0]
    crops = [op.scale[0] for op in view.ops if isinstance(op, Crop)]
    plain = recipe.method.name in ("pco", "classification") or getattr(section, "landmarks", "") in ("fixed", "trained")
    return {
        "scale": recipe.classifier.margin.scale if recipe.classifier else float("nan"),
        "optimizer": recipe.optimizer.name,
        "weight_decay": recipe.optimizer.weight_decay,
        "rate": recipe.optimizer.lr,
        "layer_decay": recipe.optimizer.layer_decay,
        "sample_rate": recipe.phases[phase].sample_rate,
        "grey": sum(op.p for op in view.ops if isinstance(op, Grey)),
        "keeps_identity": min(crops, default=1.0) >= 0.5,
        "frozen": bool(getattr(section, "frozen", None))
        or (recipe.init_from is not None and recipe.init_from.head_only is not None)
        or bool(getattr(method.evaluated(), "freeze_landmarks", False)),
        "weighs": plain and recipe.classifier is not None and getattr(section, "distill", None) is None,
        "images": images,
        "global_batch": recipe.phases[phase].global_batch,
    }
