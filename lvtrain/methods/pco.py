"""PCO: progressive cluster optimisation (LVFace, ICCV 2025, arXiv 2501.13420).

Three phases over one backbone and one sharded classifier:

1. feature alignment: negative class sub-sampling (NCS, r = 0.1) and CosFace;
2. centroid stabilisation: NCS, and a second anchor a class, its feature expectation e, which follows the features without gradient;
3. boundary refinement: both anchors, all classes, e frozen.

    L = mean_i log(1 + e^(N_i - T_i) + e^(Ne_i - Te_i))      N: log-sum-exp over the negatives, T: target logit, e: of the expectations

Each is a `Phase` of the recipe: `sample_rate` is r, `expectation` is off, update or frozen, `end.cos2` is CSS's delta.
`lvtrain.classifier` computes the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lvtrain.classifier.margins import create_margin
from lvtrain.methods.cost import Cost
from lvtrain.methods.supervised import SupervisedMethod, SupervisedSection
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Classifier, Phase, Recipe


class PcoSection(SupervisedSection):
    """The phases are the recipe's; these are the options of the second anchor."""

    expectation_init: Literal["weight", "first_feature"] = Field(
        "weight", description="feature expectations begin at the class centres, or at a class's first feature"
    )
    expectation_negatives: Literal["own", "shared"] = Field(
        "own", description="shared: the second term uses the first one's sum over the negatives, which is cheaper"
    )
    m2: float = Field(0.4, description="margin on the feature expectation")


@METHODS.register("pco")
class PcoMethod(SupervisedMethod):
    section = PcoSection
    title = "PCO: progressive cluster optimisation (LVFace, ICCV 2025)"
    settings: PcoSection

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        if phase.expectation == "off":
            return super().cost(recipe, phase)
        settings: PcoSection = recipe.method  # type: ignore[assignment]
        own = settings.expectation_negatives == "own"
        return Cost(has_classes=True, banks=("feature expectations",), bank_has_negatives=own)

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        settings: PcoSection = recipe.method  # type: ignore[assignment]
        scale = (recipe.classifier or Classifier()).margin.scale
        super().__init__(
            recipe,
            num_classes=num_classes,
            device=device,
            expectation_margin=create_margin("cosface", scale, m=settings.m2),
            expectation_negatives=settings.expectation_negatives,
            expectation_init=settings.expectation_init,
        )
