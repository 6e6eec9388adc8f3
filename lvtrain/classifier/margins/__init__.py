"""One margin a file. A new margin is a new file here: a `Margin` with its section of the recipe, registered by name."""

from lvtrain.classifier.margins.adaface import AdaFace
from lvtrain.classifier.margins.angular import AngularMargin, angle, angular_target
from lvtrain.classifier.margins.arcface import ArcFace
from lvtrain.classifier.margins.base import Margin
from lvtrain.classifier.margins.combined import Combined
from lvtrain.classifier.margins.cosface import CosFace
from lvtrain.classifier.margins.guided import ClusterGuided
from lvtrain.recipe.classifier import MarginSection
from lvtrain.recipe.registry import MARGINS

__all__ = [
    "MARGINS",
    "AdaFace",
    "AngularMargin",
    "ArcFace",
    "ClusterGuided",
    "Combined",
    "CosFace",
    "Margin",
    "MarginSection",
    "angle",
    "angular_target",
]


def create_margin(section: MarginSection) -> Margin:
    """The margin of a recipe's section.

    Raises:
        UserError: no margin has that name.
    """
    return MARGINS.get(section.name)(section)
