"""Embeddings and labels to a loss, with classes split over the ranks; see README.md in this folder."""

from lvtrain.classifier.classes import Anchor
from lvtrain.classifier.logsumexp import negative_logsumexp
from lvtrain.classifier.numerics import Numerics
from lvtrain.classifier.optimizer import OptimizerSettings
from lvtrain.classifier.partition import class_range
from lvtrain.classifier.sharded import ClassifierOutput, ShardedClassifier

__all__ = [
    "Anchor",
    "ClassifierOutput",
    "Numerics",
    "OptimizerSettings",
    "ShardedClassifier",
    "class_range",
    "negative_logsumexp",
]
