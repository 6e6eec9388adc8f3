"""Where the bytes of a shard are read from: its file in the dataset, or a local copy (`lvtrain.data.cache`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lvtrain.data.index import Manifest

Warn = Callable[[str], None]
Forget = Callable[[int], None]  # the next read of that shard opens its file again


class ShardFiles(Protocol):
    """Says which file the bytes of a shard are read from."""

    def locate(self, shard: int) -> Path:
        """The file to read shard number `shard` from."""

    def distrust(self, shard: int, path: str, reason: str) -> bool:
        """Called when `path` could not be read. Returns True if it is not used again and `locate` gives another file."""

    def close(self) -> None:
        """Stops the background work."""


# folder of the dataset, manifest, forget, warn
OpenFiles = Callable[[Path, Manifest, Forget, Warn], ShardFiles]


class Originals:
    """The shards in the dataset's folder."""

    def __init__(self, folder: Path, manifest: Manifest, forget: Forget, warn: Warn) -> None:
        self.folder, self.manifest, self.forget, self.warn = folder, manifest, forget, warn

    def locate(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def distrust(self, shard: int, path: str, reason: str) -> bool:
        return False

    def close(self) -> None:
        pass
