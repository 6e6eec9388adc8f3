"""Signs of the data on the host: what the shards hold, and whether the loader serves it."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence

import cv2
import numpy as np

from lvtrain.data import Batch, ShardDataset
from lvtrain.data.images import ImageError, decode
from lvtrain.data.order import SampleOrder
from lvtrain.errors import UserError

_SLOTS = 1 << 16  # files that are remembered
_LOOKED_AT = 8  # images of a micro-batch that are compared with their files
_SIDE = 8  # of a thumbnail, in pixels


class Files:
    """Remembers the checksum of each image file that is read: the same file under two sample ids is a copy.

    Called by the loader's reading threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = np.zeros(_SLOTS, dtype=np.uint32)
        self._ids = np.full(_SLOTS, -1, dtype=np.int64)
        self._labels = np.full(_SLOTS, -1, dtype=np.int64)
        self.known = self.copies = self.across = 0

    def add(self, ids: np.ndarray, labels: np.ndarray, encoded: Sequence[bytes]) -> None:
        """Counts the files of a micro-batch that were seen before under another sample id."""
        sums = np.array([zlib.crc32(data) for data in encoded], dtype=np.uint32)
        slots = sums % _SLOTS
        with self._lock:
            for sample, label, checksum, slot in zip(ids.tolist(), labels.tolist(), sums.tolist(), slots.tolist()):
                known = self._ids[slot] >= 0 and self._sums[slot] == checksum
                self.known += 1
                if known and self._ids[slot] != sample:
                    self.copies += 1
                    self.across += int(self._labels[slot] != label)
                elif not known:
                    self._sums[slot], self._ids[slot], self._labels[slot] = checksum, sample, label

    def read(self) -> dict[str, float]:
        with self._lock:
            return {"files": self.known, "file_copies": self.copies, "file_copies_across": self.across}


class Originals:
    """Compares some images of a micro-batch with their files, decoded here without the loader.

    Args:
        dataset: opened in this process.
        order: of the samples.
    """

    def __init__(self, dataset: ShardDataset, order: SampleOrder) -> None:
        self.dataset, self.order = dataset, order
        self.found: dict[str, float] = dict.fromkeys(("seen", "misplaced", "mislabelled", "redder", "coloured"), 0.0)
        self.likeness: list[float] = []
        self.contrast: list[float] = []
        self.swapped: list[float] = []

    def check_order(self, batch: Batch, first: int) -> None:
        """Whether the micro-batch holds the samples of the stream's positions from `first` on."""
        ids = batch.sample_ids.numpy()
        self.found["seen"] += len(ids)
        self.found["misplaced"] += int((self.order.at(np.arange(first, first + len(ids))) != ids).sum())

    def check_images(self, ids: np.ndarray, labels: np.ndarray, thumbs: np.ndarray) -> None:
        """Compares thumbnails [k, 3, 8, 8] and labels [k] of served images with the files of those ids [k]."""
        here = labels >= 0
        self.found["mislabelled"] += float((self.dataset.labels(ids)[here] != labels[here]).mean()) if here.any() else 0
        for sample, thumb in zip(ids[here].tolist(), thumbs[here]):
            try:
                stored = decode(self.dataset.read(sample)[0])
            except (OSError, UserError, ImageError):  # the loader reports what cannot be read
                continue
            original = cv2.resize(stored, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
            original = original.transpose(2, 0, 1) / 127.5 - 1
            middle = original[:, 2:6, 2:6]
            colour = float(np.abs(original - original.mean(axis=0)).mean())
            if colour > 0.02:
                self.found["coloured"] += 1
                self.found["redder"] += float(middle[0].mean() - middle[2].mean())
            turned = [original, original[:, :, ::-1]]
            best = max(turned, key=lambda each: _likeness(each.mean(axis=0), thumb.mean(axis=0)))
            self.likeness.append(_likeness(best.mean(axis=0), thumb.mean(axis=0)))
            self.contrast.append(_spread(thumb) / max(_spread(original), 1e-3))
            if colour > 0.02:
                chroma = thumb - thumb.mean(axis=0)
                own = best - best.mean(axis=0)
                self.swapped.append(_likeness(own[::-1], chroma) - _likeness(own, chroma))

    def read(self) -> dict[str, float]:
        found = dict(self.found)
        if self.likeness:
            found["likeness"] = float(np.median(self.likeness[-64:]))
            found["contrast"] = float(np.median(self.contrast[-64:]))
        if self.swapped:
            found["swapped"] = float(np.median(self.swapped[-64:]))
        return found


def _spread(image: np.ndarray) -> float:
    """Standard deviation [c, h, w] within channels: a tint is no content."""
    return float((image - image.mean(axis=(1, 2), keepdims=True)).std())


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two arrays; 0 where one is constant."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum() / size) if size > 1e-6 else 0.0
