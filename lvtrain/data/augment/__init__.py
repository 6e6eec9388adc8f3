"""Augmentation: the operations and the draw of their parameters, and the named sets of views."""

from lvtrain.data.augment.draws import Draws
from lvtrain.data.augment.operations import View, draw
from lvtrain.data.augment.sets import SETS, augmentation, with_clean_twin

__all__ = ["SETS", "Draws", "View", "augmentation", "draw", "with_clean_twin"]
