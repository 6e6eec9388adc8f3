"""Packs any source into a dataset folder: list it, inspect every image, decide, write. A killed pack can be continued."""

from lvtrain.datasets.packing.options import PackOptions
from lvtrain.datasets.packing.pack import pack
from lvtrain.datasets.packing.policies import POLICIES, Policies

__all__ = ["POLICIES", "PackOptions", "Policies", "pack"]
