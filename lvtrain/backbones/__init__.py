"""Image -> embedding: one registry over the room's networks. `create_backbone("vit_l")` is the front door."""

from lvtrain.backbones.registry import backbone_names, create_backbone

__all__ = ["backbone_names", "create_backbone"]
