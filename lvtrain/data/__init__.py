"""Serves a dataset during training: from shards on disk to batches on the device. Only `Loader`, `Batch` and `StreamDataset` need torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lvtrain.data.order import SampleOrder
from lvtrain.data.shards import ShardDataset

if TYPE_CHECKING:
    from lvtrain.data.loader import BadSample, Batch, Loader
    from lvtrain.data.stream import StreamDataset

__all__ = ["BadSample", "Batch", "Loader", "SampleOrder", "ShardDataset", "StreamDataset"]


def __getattr__(name: str) -> Any:
    if name in ("Loader", "Batch", "BadSample"):
        from lvtrain.data import loader

        return getattr(loader, name)
    if name == "StreamDataset":
        from lvtrain.data import stream

        return stream.StreamDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
