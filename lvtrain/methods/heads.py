"""From the recipe's `classifier` section to a `ShardedClassifier`, for every method that has one."""

from __future__ import annotations

from typing import Any

import torch

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.margins import Margin, create_margin
from lvtrain.errors import UserError
from lvtrain.methods.base import Now
from lvtrain.recipe.sections import Recipe


def create_classifier(recipe: Recipe, *, num_classes: int, device: torch.device, **options: Any) -> ShardedClassifier:
    """The recipe's classifier over `num_classes` identities; `options` go to `ShardedClassifier` and win over the recipe's.

    Raises:
        UserError: the method needs a classifier and the recipe says there is none; settings that do not go together.
    """
    section = recipe.classifier
    if section is None:
        raise UserError(f"method {recipe.method.name} needs a classifier; remove `classifier: null` from the recipe")
    rows, backbone = section.optimizer, recipe.optimizer
    arguments: dict[str, Any] = {
        "margin": recipe_margin(recipe),
        "seed": recipe.seed,
        "in_backward": rows.in_backward,
        "precision": section.precision,
        "kernel": section.kernel,
        "gather": section.gather,
        "chunk": section.chunk,
        "keep_mb": section.keep_mb,
        "device": device,
        "optimizer": {
            "name": rows.name,
            "mode": rows.mode,
            "betas": getattr(backbone, "betas", (0.9, 0.999)),  # a backbone under SGD has none
            "eps": getattr(backbone, "eps", 1e-8),
            "momentum": rows.momentum,
            "moments": rows.moments,
            "kernel": rows.kernel,
        },
    }
    return ShardedClassifier(num_classes, recipe.backbone.embedding_dim, **(arguments | options))


def recipe_margin(recipe: Recipe) -> Margin:
    """The margin of the recipe's `classifier.margin` section."""
    assert recipe.classifier is not None
    return create_margin(**recipe.classifier.margin.model_dump(exclude={"warmup"}))


def rows_rates(recipe: Recipe, now: Now) -> dict[str, float]:
    """The class rows' `lr` and `weight_decay` in a step: the backbone's; or in proportion to `classifier.optimizer.lr`, and
    `classifier.optimizer.weight_decay` as it is."""
    assert recipe.classifier is not None
    own, backbone = recipe.classifier.optimizer, recipe.optimizer
    return {
        "lr": now.lr if own.lr is None else now.lr * own.lr / backbone.lr,
        "weight_decay": backbone.weight_decay_at(now.progress) if own.weight_decay is None else own.weight_decay,
    }
