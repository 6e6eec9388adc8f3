"""Other people's datasets to WebDataset shards and an index: one source kind a class, one packer for all.

`catalogue` lists what a source holds, `folders`, `archives` and `tables` know the kinds, `images` looks into one image, `policies` says what to
do about trouble, `pack` does it in parallel and can be killed and started again.
"""

from lvtrain.datasets.importers.pack import PackOptions, pack
from lvtrain.datasets.importers.policies import POLICIES, Policies
from lvtrain.datasets.importers.sources import KINDS

__all__ = ["KINDS", "POLICIES", "PackOptions", "Policies", "pack"]
