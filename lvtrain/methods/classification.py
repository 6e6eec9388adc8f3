"""Plain training: classification with the recipe's margin, in one phase or several.

    L = mean_i softplus(N_i - T_i)      N: log-sum-exp over the negatives, T: target logit with its margin

This is the cross-entropy of CosFace, ArcFace, AdaFace or whichever margin the recipe names (`classifier.margin`), as
arcface_torch and CVLface train. A phase's `sample_rate` below 1 is Partial FC.
"""

from __future__ import annotations

from lvtrain.methods.supervised import SupervisedMethod
from lvtrain.recipe.registry import METHODS


@METHODS.register("classification")
class ClassificationMethod(SupervisedMethod):
    """Plain training of one or more phases with a margin softmax."""

    title = "margin softmax classification"
