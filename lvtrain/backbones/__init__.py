"""Image -> embedding: the networks, by name. `create_backbone("vit_l")` builds one."""

from lvtrain.backbones.base import Backbone
from lvtrain.backbones.registry import BACKBONES, create_backbone, register

__all__ = ["BACKBONES", "Backbone", "create_backbone", "register"]
