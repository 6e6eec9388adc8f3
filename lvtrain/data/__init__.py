"""Serves a dataset during training: from shards on disk to batches on the device. Only `Loader` and `Batch` need torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lvtrain.data.order import SampleOrder
from lvtrain.data.shards import ShardDataset

if TYPE_CHECKING:
    from lvtrain.data.loader import BadSample, Batch, Loader

__all__ = ["BadSample", "Batch", "Loader", "SampleOrder", "ShardDataset"]


def __getattr__(name: str) -> Any:
    if name in ("Loader", "Batch", "BadSample"):
        from lvtrain.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
