"""Copies of shards on a local disk, up to a size, for datasets on a slow shared file system.

A shard is copied in the background when it is first read. Until the copy is complete, reads use the original. When the
limit is reached, the copies that were not read for the longest time are deleted, of whatever dataset. Ranks of one machine
may share a cache folder.

The cache never changes what is read: a copy is used only if it has the recorded size, and never again after a failed read.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
import time
from pathlib import Path

from lvtrain.data.index import Manifest
from lvtrain.data.shard_files import Forget, OpenFiles, Originals, Warn
from lvtrain.errors import UserError

_ABANDONED = 3600.0  # seconds without a write after which an unfinished copy is abandoned


def cached(folder: str | Path, max_bytes: int) -> OpenFiles:
    """For `ShardDataset(files=...)`: reads from copies in `folder`, which hold at most `max_bytes`."""

    def open_files(source: Path, manifest: Manifest, forget: Forget, warn: Warn) -> ShardCache:
        return ShardCache(Originals(source, manifest, forget, warn), folder, max_bytes)

    return open_files


class ShardCache:
    """Reads copies instead of the original shards, where they exist. `close` stops the copying.

    Args:
        originals: the shards as they lie in the dataset.
        folder: local folder, made if missing.
        max_bytes: limit of the copies in the folder; a larger shard is never copied.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, originals: Originals, folder: str | Path, max_bytes: int) -> None:
        self.originals, self.manifest, self.max_bytes = originals, originals.manifest, max_bytes
        self.folder = Path(folder) / self.manifest.fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the shard cache cannot be made in {folder}: {error.strerror}; "
                "set data.cache to a folder that can be written, or remove data.cache"
            ) from None
        for path in self.folder.glob("*.tmp"):  # left by ranks that were killed while they copied
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        self._asked: set[int] = set()
        self._failed: set[int] = set()  # shards whose copy could not be read; the original is read from then on
        self._lock = threading.Lock()
        self._wanted: queue.Queue[int | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="shard-cache", daemon=True)
        self._thread.start()

    def locate(self, shard: int) -> Path:
        """The copy if it is whole, otherwise the original, which is then queued for copying."""
        if shard in self._failed:
            return self.originals.locate(shard)
        copy = self._copy(shard)
        try:
            if copy.stat().st_size == self.manifest.shards[shard].size:
                os.utime(copy)  # read just now
                return copy
        except OSError:  # missing, or the local disk fails
            pass
        if shard not in self._asked:
            self._asked.add(shard)
            self._wanted.put(shard)
        return self.originals.locate(shard)

    def distrust(self, shard: int, path: str, reason: str) -> bool:
        """Whether `path`, which could not be read, is a copy. If so, the original is read from now on; this is reported once."""
        copy = self._copy(shard)
        if Path(path) != copy:
            return False
        with self._lock:
            first = shard not in self._failed
            self._failed.add(shard)
        if first:
            self.originals.warn(f"{copy}, a copy of shard {shard}, failed ({reason}); reading the original from now on")
            with contextlib.suppress(OSError):
                copy.unlink(missing_ok=True)
        self.originals.forget(shard)
        return True

    def close(self) -> None:
        self._wanted.put(None)
        self._thread.join()

    def _copy(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.tar"

    def _run(self) -> None:
        while (shard := self._wanted.get()) is not None:
            if self.manifest.shards[shard].size <= self.max_bytes:
                self._fetch(shard)
            self._wanted.task_done()

    def _fetch(self, shard: int) -> None:
        temporary = self.folder / f"{shard:06d}.{os.getpid()}.tmp"
        try:
            self._make_room(self.manifest.shards[shard].size)
            shutil.copyfile(self.originals.locate(shard), temporary)
            os.replace(temporary, self._copy(shard))
            # the next read opens the copy
            self.originals.forget(shard)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.originals.warn(
                f"shard {shard} was not cached in {self.folder} ({error.strerror or error}); reading the original"
            )
        self._asked.discard(shard)

    def _make_room(self, size: int) -> None:
        # other ranks add and delete at the same time
        found = []
        for path in self.folder.parent.glob("*/*.tar"):  # copies of other datasets, too: the limit is for the disk
            try:
                state = path.stat()
                found.append((state.st_mtime, state.st_size, path))
            except FileNotFoundError:
                continue
        total = sum(entry[1] for entry in found)
        for _, bytes_, path in sorted(found):
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            if path.parent == self.folder:
                self.originals.forget(int(path.stem))
            total -= bytes_
