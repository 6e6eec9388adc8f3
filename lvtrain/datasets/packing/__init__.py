"""Packs any source into a dataset folder: lists it, looks at every image, decides, writes. It can be killed and started again."""

from lvtrain.datasets.packing.pack import PackOptions, pack
from lvtrain.datasets.packing.policies import POLICIES, Policies

__all__ = ["POLICIES", "PackOptions", "Policies", "pack"]
