"""lvtrain: the open trainer for face-recognition vision transformers.

From Python:

    model = lvtrain.load_model("runs/mine")                      # or weights of another project, or an ONNX file
    embeddings = model.embed(["a.jpg", "b.jpg"])                 # float32 [2, 512], of unit length

    backbone = lvtrain.create_backbone("vit_b")                  # [B, 3, 112, 112] -> [B, 512]
    head = lvtrain.ShardedClassifier(10_000, 512, margin=lvtrain.CosFace(m=0.4))
    dataset = lvtrain.ShardDataset("data/faces")                 # dataset.read(i) -> (JPEG bytes, label)

Every name is imported when it is first used, so `import lvtrain` costs nothing. Command lines: `python -m lvtrain --help`, and `tools/`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvtrain.backbones import create_backbone
    from lvtrain.classifier import ShardedClassifier
    from lvtrain.classifier.margins import AdaFace, ArcFace, Combined, CosFace, Margin
    from lvtrain.data import SampleOrder, ShardDataset, StreamDataset
    from lvtrain.errors import UserError
    from lvtrain.weights import Model, load_model

__version__ = "0.2.0"

_FROM = {
    "create_backbone": "lvtrain.backbones",
    "ShardedClassifier": "lvtrain.classifier",
    "AdaFace": "lvtrain.classifier.margins",
    "ArcFace": "lvtrain.classifier.margins",
    "Combined": "lvtrain.classifier.margins",
    "CosFace": "lvtrain.classifier.margins",
    "Margin": "lvtrain.classifier.margins",
    "SampleOrder": "lvtrain.data",
    "ShardDataset": "lvtrain.data",
    "StreamDataset": "lvtrain.data",
    "UserError": "lvtrain.errors",
    "Model": "lvtrain.weights",
    "load_model": "lvtrain.weights",
}

__all__ = [
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "Margin",
    "Model",
    "SampleOrder",
    "ShardDataset",
    "ShardedClassifier",
    "StreamDataset",
    "UserError",
    "create_backbone",
    "load_model",
]


if not TYPE_CHECKING:  # type checkers have the imports above; they would take any name otherwise

    def __getattr__(name: str) -> Any:
        if name not in _FROM:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_FROM[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
