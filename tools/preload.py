"""Imports what ranks need, once, in the process that they are forked from. A start then takes half a second, not fifteen.

No thread may be started here: a fork has only the thread that forked.
"""

import atexit
import contextlib
import gc
import importlib
from typing import Any

from lvtrain.backbones.registry import BACKBONES
from lvtrain.recipe.optimizer import OPTIMIZERS
from lvtrain.recipe.registry import AUGMENTATIONS, MARGINS, METHODS, Registry
from lvtrain.recipe.trackers import TRACKERS

MODULES = [
    "lvtrain.training.trainer",
    "lvtrain.training.checks",
    "lvtrain.data.decoding.dali",
    "lvtrain.classifier.banks",
    "sklearn.metrics",
    "torch.utils.cpp_extension",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's inductor; DeepSpeed loads it at every start
]
for name in MODULES:
    with contextlib.suppress(ImportError):  # a package that this machine lacks
        importlib.import_module(name)
registries: list[Registry[Any]] = [BACKBONES, OPTIMIZERS, AUGMENTATIONS, MARGINS, METHODS, TRACKERS]
for registry in registries:
    registry.names()
atexit.register(gc.unfreeze)  # otherwise Triton's bindings print at the end that they have leaked
gc.freeze()  # a child that collects garbage does not walk, and so copy, what was imported
