"""From decoded images to a batch: mirrored, channels first, normalised, in memory that is reused.

Fresh memory costs a page fault every 4 KB, which takes longer than writing it. So `Memory` lends the memory of batches, and
intermediate results use `scratch`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

import cv2
import numpy as np
import torch

TOGETHER = (
    64  # images that go through one step together: its code and tables stay in the cache, and there are few calls
)

_STEP = float(np.nextafter(np.float32(2 / 255), np.float32(0)))  # the float32 below 2 / 255: 255 must not land above 1


class Memory:
    """Lends the memory of tensors, and lends it again when a tensor is freed.

    Args:
        keep: tensors of one shape that are kept for the next batch.
        dtype: of the tensors.
        pinned: page-locked, so that a GPU copies from it directly.
    """

    def __init__(self, keep: int, dtype: torch.dtype = torch.float32, pinned: bool = False) -> None:
        self._keep, self._dtype, self._pinned = keep, dtype, pinned
        self._spare: dict[tuple[int, ...], deque[np.ndarray]] = {}

    def lend(self, *shape: int) -> torch.Tensor:
        """An uninitialised tensor."""
        spare = self._spare.setdefault(shape, deque(maxlen=self._keep))
        memory = spare.pop() if spare else self._new(shape)
        lent = memory.view()  # held by the tensor's storage, so it is freed with the last tensor on it
        weakref.finalize(lent, spare.append, memory).atexit = False
        return torch.from_numpy(lent)

    def _new(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._pinned:
            return torch.empty(shape, dtype=self._dtype, pin_memory=True).numpy()
        # numpy asks the system for huge pages
        return np.empty(shape, dtype=np.float32 if self._dtype == torch.float32 else np.uint8)


_own = threading.local()


def scratch(use: str, *shape: int) -> np.ndarray:
    """This thread's uint8 array of this shape for this use. It holds what was last written there."""
    arrays = _own.__dict__.setdefault("arrays", {})
    if (use, shape) not in arrays:
        arrays[use, shape] = np.empty(shape, dtype=np.uint8)
    return arrays[use, shape]


def mirror_and_normalise(
    images: Sequence[np.ndarray] | np.ndarray, flip: np.ndarray | None, batch: torch.Tensor
) -> None:
    """Writes images uint8 [h, w, 3] to `batch` float32 [m, 3, h, w], normalised, and mirrored where `flip` is 1.

    DALI's `crop_mirror_normalize` does this on a GPU; on a CPU it takes longer than these lines.
    """
    room = scratch("planes", TOGETHER, *batch.shape[1:])
    for start in range(0, len(images), TOGETHER):
        few = slice(start, min(start + TOGETHER, len(images)))
        planes = room[: few.stop - start]
        mirror(images[few], None if flip is None else flip[few], planes)
        normalise(planes, batch[few])


def mirror(images: Sequence[np.ndarray] | np.ndarray, flip: np.ndarray | None, planes: np.ndarray) -> None:
    """Writes images uint8 [h, w, 3] to `planes` uint8 [m, 3, h, w], mirrored where `flip` is 1."""
    turned = scratch("turned", *planes.shape[2:], 3)
    mirrored = [False] * len(images) if flip is None else (flip > 0).tolist()
    for image, here, room in zip(images, mirrored, planes):
        split(cv2.flip(image, 1, turned) if here else image, room)


def split(image: np.ndarray, planes: np.ndarray) -> None:
    """uint8 [h, w, 3] into `planes` [3, h, w]."""
    cv2.split(image, planes)  # type: ignore[call-overload]  # takes an array of planes as well as a list of them, and sooner


def normalise(planes: np.ndarray, batch: torch.Tensor) -> None:
    """uint8 [m, 3, h, w] to float32 `batch` of that shape, x * 2 / 255 - 1, in one pass over `batch`, which no cache holds."""
    flat = planes.reshape(-1, planes.shape[-1])
    cv2.addWeighted(flat, _STEP, flat, 0.0, -1.0, batch.numpy().reshape(flat.shape), cv2.CV_32F)


def normalise_on(planes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies uint8 [m, 3, h, w] to `device` and normalises it there, with the values of `normalise`.

    A quarter of the bytes are copied, and the host's cores have less work.
    """
    return planes.to(device).to(torch.float32).mul_(_STEP).sub_(1.0)
