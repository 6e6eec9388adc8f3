"""One file a paper. A new paper is a new file, its section in `recipe.py`, and a line here."""

from lvtrain.methods.base import LossOutput, Method, Now, create_method
from lvtrain.methods.cluster import ClusterMethod
from lvtrain.methods.dino import DinoMethod
from lvtrain.methods.finetune import FinetuneMethod
from lvtrain.methods.lafs import LafsMethod
from lvtrain.methods.pco import PcoMethod

REGISTRY: dict[str, type[Method]] = {
    "pco": PcoMethod,
    "cluster": ClusterMethod,
    "dino": DinoMethod,
    "lafs": LafsMethod,
    "finetune": FinetuneMethod,
}

__all__ = ["REGISTRY", "LossOutput", "Method", "Now", "create_method"]
