"""From decoded pictures to a batch of floats on a CPU: mirrored, channels apart, normalised, in memory that is used again.

Fresh memory costs a page fault every 4 KB, more than what is written there: what leaves is lent by `Memory`, what stays is `scratch`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

import cv2
import numpy as np
import torch

TOGETHER = 32  # images handled at once: few calls, and what one writes the next still finds in the cache

_STEP = float(np.nextafter(np.float32(2 / 255), np.float32(0)))  # the float32 below 2 / 255: 255 must not land above 1


class Memory:
    """Float tensors whose memory is lent again once nobody holds it.

    Args:
        keep: tensors of one shape that are kept for the next batch.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._spare: dict[tuple[int, ...], deque[np.ndarray]] = {}

    def floats(self, *shape: int) -> torch.Tensor:
        """An uninitialised float32 tensor."""
        spare = self._spare.setdefault(shape, deque(maxlen=self._keep))
        memory = spare.pop() if spare else np.empty(shape, dtype=np.float32)
        lent = memory.view()  # held by the tensor's storage, so it goes when the last tensor on it goes
        weakref.finalize(lent, spare.append, memory).atexit = False
        return torch.from_numpy(lent)


_own = threading.local()


def scratch(use: str, *shape: int) -> np.ndarray:
    """This thread's uint8 array of that shape for that use, holding whatever was last written there."""
    arrays = _own.__dict__.setdefault("arrays", {})
    if (use, shape) not in arrays:
        arrays[use, shape] = np.empty(shape, dtype=np.uint8)
    return arrays[use, shape]


def mirror_and_normalise(
    images: Sequence[np.ndarray] | np.ndarray, flip: np.ndarray | None, batch: torch.Tensor
) -> None:
    """uint8 [h, w, 3] each to float32 `batch` [m, 3, h, w], mirrored where `flip` is 1.

    DALI's `crop_mirror_normalize` does this on a GPU; on a CPU it takes longer than these lines.
    """
    height, width = batch.shape[2:]
    mirrored = [False] * len(images) if flip is None else (flip > 0).tolist()
    turned, planes = scratch("turned", height, width, 3), scratch("planes", TOGETHER, 3, height, width)
    for start in range(0, len(images), TOGETHER):
        part = images[start : start + TOGETHER]
        for image, mirror, room in zip(part, mirrored[start:], planes):
            split(cv2.flip(image, 1, turned) if mirror else image, room)
        normalise(planes[: len(part)], batch[start : start + len(part)])


def split(image: np.ndarray, planes: np.ndarray) -> None:
    """uint8 [h, w, 3] into `planes` [3, h, w]."""
    cv2.split(image, planes)  # type: ignore[call-overload]  # takes an array of planes as well as a list of them, and sooner


def normalise(planes: np.ndarray, batch: torch.Tensor) -> None:
    """uint8 [m, 3, h, w] to float32 `batch` of that shape, x * 2 / 255 - 1, in one pass over `batch`, which no cache holds."""
    flat = planes.reshape(-1, planes.shape[-1])
    cv2.addWeighted(flat, _STEP, flat, 0.0, -1.0, batch.numpy().reshape(flat.shape), cv2.CV_32F)
