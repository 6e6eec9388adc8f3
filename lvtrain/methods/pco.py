"""PCO: progressive cluster optimisation (LVFace, ICCV 2025, arXiv 2501.13420).

Three phases over one backbone and one sharded classifier:

1. feature alignment: negative class sub-sampling (NCS, r = 0.1) and CosFace;
2. centroid stabilisation: NCS, and a second anchor a class, its feature expectation e, which follows the features without gradient;
3. boundary refinement: both anchors, all classes, e frozen.

    L = mean_i log(1 + e^(N_i - T_i) + e^(Ne_i - Te_i))      N: log-sum-exp over the negatives, T: target logit, e: of the expectations

Each is a `Phase` of the recipe: `sample_rate` is r, `expectation` is off, update or frozen, `end.cos2` is CSS's delta. Plain CosFace or ArcFace
training is the same method with one phase, r = 1 and the expectation off. All of it is the classifier's to compute; see `lvtrain.classifier`.
"""

from __future__ import annotations

import torch

from lvtrain.classifier.margins import create_margin
from lvtrain.methods.supervised import SupervisedMethod
from lvtrain.recipe.methods import Pco
from lvtrain.recipe.sections import Classifier, Recipe


class PcoMethod(SupervisedMethod):
    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        settings = recipe.method
        assert isinstance(settings, Pco)
        scale = (recipe.classifier or Classifier()).margin.scale
        super().__init__(
            recipe,
            num_classes=num_classes,
            device=device,
            expectation_margin=create_margin("cosface", scale, m=settings.m2),
            expectation_negatives=settings.expectation_negatives,
            expectation_init=settings.expectation_init,
        )
