"""Imports everything that the operations need, and lets DeepSpeed inspect this machine, once for all forks."""

import importlib

import deepspeed

from lvtrain.data.shards import ShardDataset
from lvtrain.files import patience

MODULES = [
    "lvtrain.training.trainer",
    "lvtrain.training.checks",
    "lvtrain.datasets.packing",
    "lvtrain.evaluation.suite",
    "lvtrain.evaluation.plots",
    "tools.evaluate",
    "tools.pack_dataset",
    "tools.trial",
    "accelerate",
    "cv2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "rich.console",
    "simplejpeg",
    "sklearn.metrics",
    "torch._dynamo",
    "torchvision.transforms.v2",
]
for name in MODULES:
    importlib.import_module(name)
deepspeed.ops.__compatible_ops__  # noqa: B018 (compiles trial programs on first access)
# the waits for a failing disk would take too long in a sweep
patience.WAITS = (0.01, 0.01, 0.01)
ShardDataset.__init__.__kwdefaults__["pause"] = 0.01  # type: ignore[index]
