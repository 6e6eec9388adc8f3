"""From the recipe's `classifier` section to a `ShardedClassifier`, for every method that has one."""

from __future__ import annotations

import torch

from lvtrain.classifier import Numerics, OptimizerSettings, ShardedClassifier
from lvtrain.classifier.margins import Margin, create_margin
from lvtrain.errors import UserError
from lvtrain.methods.base import StepInfo
from lvtrain.recipe.classifier import Classifier
from lvtrain.recipe.sections import Recipe


def classifier_section(recipe: Recipe) -> Classifier:
    """The recipe's classifier.

    Raises:
        UserError: the recipe has none.
    """
    if recipe.classifier is None:
        raise UserError(f"method {recipe.method.name} needs a classifier; remove `classifier: null` from the recipe")
    return recipe.classifier


def create_classifier(
    recipe: Recipe, *, num_classes: int, device: torch.device, margin: Margin | None = None
) -> ShardedClassifier:
    """The recipe's classifier over `num_classes` identities. `margin`: the method's own, instead of the recipe's.

    Raises:
        UserError: the recipe has no classifier, or settings that do not go together.
    """
    section, backbone = classifier_section(recipe), recipe.optimizer
    own = section.optimizer
    settings = OptimizerSettings(
        own.name,
        own.mode,
        # the backbone's optimizer may be another one, and have none of these
        betas=getattr(backbone, "betas", (0.9, 0.999)),
        eps=getattr(backbone, "eps", 1e-8),
        momentum=getattr(backbone, "momentum", 0.9),
        moments=own.moments,
    )
    return ShardedClassifier(
        num_classes,
        recipe.backbone.embedding_dim,
        margin=margin or create_margin(section.margin),
        numerics=Numerics(**section.numerics.model_dump(exclude={"preset"})),
        optimizer=settings,
        seed=recipe.seed,
        device=device,
    )


def centre_rates(recipe: Recipe, now: StepInfo) -> dict[str, float]:
    """The class centres' `lr` and `weight_decay` in a step.

    The backbone's, unless `classifier.optimizer` has its own: its `lr` is then a peak that follows the backbone's
    schedule, its `weight_decay` a constant.
    """
    own, backbone = classifier_section(recipe).optimizer, recipe.optimizer
    return {
        "lr": now.lr if own.lr is None else now.lr * own.lr / backbone.lr,
        "weight_decay": backbone.weight_decay_at(now.progress) if own.weight_decay is None else own.weight_decay,
    }
