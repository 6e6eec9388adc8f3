"""Samples by id: `ShardDataset` reads JPEG bytes directly from the tars, and checks the folder when it is opened.

Bytes are read with `pread`, not through a memory map. So a failing disk raises an exception, and the read can be tried
again (a map would kill the rank). Threads share no file position.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data.index import RECORD, Manifest, open_index, read_labels, read_manifest
from lvtrain.data.shard_files import OpenFiles, Originals, Warn
from lvtrain.data.subset import DROPPED, read_subset
from lvtrain.errors import UserError
from lvtrain.files.reading import pread

_OPEN_FILES = 128
_CHUNK = 1 << 20


class ReadError(UserError):
    """The bytes of a sample are missing: the shard was cut."""


class ShardDataset:
    """A dataset folder, or a subset manifest (.json) of one. It does not need torch.

    Args:
        path: folder with `dataset.json`, or a manifest written by `lvtrain.datasets.subset`.
        warn: called with a line about reads that failed and were retried, or were slow; nothing is printed here.
        attempts: tries to read a sample. The waits between them begin at `pause` seconds and double.
        slow_seconds: a read that takes longer is reported.
        files: where the shards are read from; `lvtrain.data.cache.cached` reads local copies.

    Raises:
        UserError: dataset.json, the index or a shard is missing, forbidden, of another size than recorded, or empty (the shard is named).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        warn: Warn | None = None,
        attempts: int = 6,
        pause: float = 0.5,
        slow_seconds: float = 10.0,
        files: OpenFiles = Originals,
    ) -> None:
        self.path = Path(path)
        self.warn: Warn = warn or (lambda message: None)
        self.attempts, self.pause, self.slow_seconds = attempts, pause, slow_seconds
        self.folder = self.path
        self._ids: np.ndarray | None = (
            None  # of a subset: its sample ids in the whole dataset, and the new label of each identity
        )
        self._label_of: np.ndarray | None = None
        self._fingerprint_suffix = ""
        if self.path.suffix == ".json" and self.path.name != "dataset.json":
            self.folder, self._ids, self._label_of, self._fingerprint_suffix = read_subset(self.path)
        elif self.path.name == "dataset.json":
            self.folder = self.path.parent
        self.manifest: Manifest = read_manifest(self.folder)
        self.index = open_index(self.folder, self.manifest)
        self._num_classes = self.manifest.num_classes
        if self._label_of is not None:
            self._num_classes = 1 + int(self._label_of[self._label_of != np.uint32(DROPPED)].max())
        if not self.manifest.samples:
            raise UserError(f"{self.folder} holds no image; pack it again")
        self._check_shards()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.files = files(self.folder, self.manifest, self.forget, lambda message: self.warn(message))

    def __len__(self) -> int:
        return self.manifest.samples if self._ids is None else len(self._ids)

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def fingerprint(self) -> str:
        """Changes with the shards and their bytes, the index, the label map, and with a subset's choice."""
        return self.manifest.fingerprint + self._fingerprint_suffix

    def label_names(self) -> list[str]:
        """Identity names, by label."""
        names = read_labels(self.folder, self.manifest)
        if self._label_of is None:
            return names
        kept: list[str] = [""] * self.num_classes
        for old in range(len(names) - 1, -1, -1):  # merged identities have the name of the first
            if int(self._label_of[old]) < self.num_classes:
                kept[int(self._label_of[old])] = names[old]
        return kept

    def in_whole(self, ids: np.ndarray, label_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids [k] and a label map uint32 [num_classes], in terms of the dataset this is a subset of."""
        if self._ids is None or self._label_of is None:
            return ids, label_of
        there = self._label_of != np.uint32(DROPPED)
        composed = np.full(len(there), DROPPED, dtype=np.uint32)
        composed[there] = label_of[self._label_of[there]]
        return self._ids[ids], composed

    def records(self, ids: np.ndarray) -> np.ndarray:
        """Index records (`lvtrain.data.index.RECORD`) [k] of sample ids [k]; labels are those of the whole dataset."""
        ids = np.asarray(ids, dtype=np.int64)
        records: np.ndarray = self.index[ids if self._ids is None else self._ids[ids]]
        return records

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int64 [k] in [0, num_classes) of sample ids [k].

        Raises:
            UserError: the index holds a label that is not below num_classes.
        """
        return self._labels(self.records(ids))

    def _labels(self, records: np.ndarray) -> np.ndarray:
        labels = records["label"].astype(np.int64)
        if len(labels) and int(labels.max()) >= self.manifest.num_classes:
            raise UserError(
                f"{self.folder}/index.bin holds label {int(labels.max())}, "
                f"but dataset.json has {self.manifest.num_classes} classes; pack again"
            )
        if self._label_of is not None:
            labels = self._label_of[labels].astype(np.int64)
            if len(labels) and int(labels.max()) >= self.num_classes:
                raise UserError(f"{self.path}: a sample's identity is not in the subset; write the subset again")
        return labels

    def check_labels(self) -> None:
        """Checks all labels (1 s for 100 million samples).

        Raises:
            UserError: a label is not below num_classes.
        """
        for start in range(0, len(self), _CHUNK):
            self.labels(np.arange(start, min(start + _CHUNK, len(self))))

    def read(self, sample_id: int) -> tuple[bytes, int]:
        """JPEG bytes and label of one sample.

        Raises:
            ReadError: the shard ends before the sample does.
            IndexError: the id is not in [0, len).
            OSError: every attempt to read failed.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} is not in [0, {len(self)})")
        records = self.records(np.array([sample_id]))
        return self.read_record(records[0]), int(self._labels(records)[0])

    def read_batch(self, records: np.ndarray) -> list[bytes | ReadError]:
        """JPEG bytes of index records [k]; a `ReadError` stands in the place of one that its shard does not hold whole.

        Raises:
            OSError: every attempt to read failed.
        """
        batch: list[bytes | ReadError] = []
        handles: dict[int, Any] = {}
        columns = (records["shard"].tolist(), records["offset"].tolist(), records["length"].tolist())
        started = time.monotonic()
        for row, (shard, offset, length) in enumerate(zip(*columns)):
            try:
                file = handles.get(shard) or handles.setdefault(shard, self._file(shard))
                data = pread(file.fileno(), length, offset)
            except OSError:
                data = b""
            if len(data) == length and data:
                batch.append(data)
                continue
            try:
                batch.append(self.read_record(records[row]))
            except ReadError as error:
                batch.append(error)
        elapsed = time.monotonic() - started
        if elapsed > self.slow_seconds:
            self.warn(f"reading {len(records)} samples took {elapsed:.0f} s; the file system is stalling")
        return batch

    def read_record(self, record: np.void) -> bytes:
        """JPEG bytes of one index record, retried with doubling waits while the file system fails.

        Raises:
            ReadError: the shard ends before the sample does.
            OSError: every attempt failed. The sample may be intact, so training must not leave it out.
        """
        shard, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        attempt = 0
        while attempt < self.attempts:
            started = time.monotonic()
            file = None
            try:
                file = self._file(shard)
                data = pread(file.fileno(), length, offset)
            except OSError as error:
                if self.files.distrust(shard, str(file.name if file else error.filename), error.strerror or str(error)):
                    continue
                attempt += 1
                self.forget(shard)
                name = self.manifest.shards[shard].name
                if attempt == self.attempts:
                    failed = f"{error.strerror or error} after {attempt} attempts"
                    raise OSError(error.errno, failed, str(self.folder / name)) from error
                wait = self.pause * 2 ** (attempt - 1)
                self.warn(
                    f"reading {name} failed ({error.strerror or error}); attempt {attempt + 1} of {self.attempts} in {wait:g} s"
                )
                time.sleep(wait)
                continue
            elapsed = time.monotonic() - started
            if elapsed > self.slow_seconds:
                self.warn(
                    f"reading {length} bytes of {self.manifest.shards[shard].name} took {elapsed:.0f} s; the file system is stalling"
                )
            if len(data) < length:
                if self.files.distrust(shard, str(file.name), "cut short"):
                    continue
                raise ReadError(
                    f"{self.manifest.shards[shard].name} ends after {offset + len(data)} bytes, inside the sample"
                )
            return data
        raise ReadError("no attempt was allowed")

    def describe(self, sample_id: int) -> tuple[str, str]:
        """Shard name and key of a sample, for messages. The key is read from the tar header before the image."""
        record = self.records(np.array([sample_id]))[0]
        name = self.manifest.shards[int(record["shard"])].name
        try:
            header = pread(self._file(int(record["shard"])).fileno(), 512, int(record["offset"]) - 512)
        except OSError:
            header = b""
        key = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        return name, key.rsplit(".", 1)[0] or "?"

    def close(self) -> None:
        self.files.close()
        with self._lock:
            self._files.clear()

    def _file(self, shard: int) -> Any:
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        # opening may stall: not under the lock. An evicted file closes when its last reader is done.
        file = open(self.files.locate(shard), "rb", buffering=0)  # noqa: SIM115
        with self._lock:
            file = self._files.setdefault(shard, file)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def forget(self, shard: int) -> None:
        """The next read of this shard opens its file again."""
        with self._lock:
            self._files.pop(shard, None)

    def _check_shards(self) -> None:
        counted = 0
        for shard in self.manifest.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise UserError(f"shard {path} is missing; restore it or pack again") from None
            if not os.access(path, os.R_OK):  # otherwise it would be found at each sample, after all attempts
                raise UserError(f"shard {path} may not be read by this user; correct its permissions")
            if size != shard.size:
                kind = "cut short" if size < shard.size else "longer than recorded"
                raise UserError(
                    f"shard {path} is {kind}: {size} bytes, dataset.json says {shard.size}; copy it again or pack again"
                )
            counted += shard.samples
        if counted != self.manifest.samples:
            raise UserError(
                f"{self.folder}/dataset.json counts {self.manifest.samples} samples, its shards {counted}; pack again"
            )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a ShardDataset cannot be sent to another process; pass its path and open it there")


__all__ = ["RECORD", "ReadError", "ShardDataset"]
