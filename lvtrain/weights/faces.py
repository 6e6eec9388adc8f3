"""Any image as a recogniser takes it: an aligned square crop of the model's size."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvtrain.errors import UserError
from lvtrain.weights.extract import Images, decode


class Faces:
    """`images` by position as uint8 RGB `[image_size, image_size, 3]`.

    A square image is taken for an aligned crop, and resized (bilinear) where it has another size. With `align` the largest face is found by
    MTCNN, and aligned to insightface's five points as `tools/pack_dataset.py --align` does.

    Args:
        images: see `Images`; one image alone will do, too.
        image_size: pixels of a side.

    Raises (on reading an item):
        UserError: not an image, not square without `align`, no face with it, or an array that is not uint8 [H, W, 3].
    """

    def __init__(self, images: Images | Any, image_size: int, *, align: bool = False) -> None:
        self._images = [images] if _is_one(images) else images
        self._size = image_size
        self._detector = None
        self._lock = threading.Lock()  # the detector keeps its last image
        if align:
            from lvtrain.data.align import Detector

            self._detector = Detector()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int, /) -> np.ndarray:
        image = self._images[position]
        name = str(image) if isinstance(image, (str, Path)) else f"image {position}"
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise UserError(
                f"{name} is an array {image.dtype} {list(image.shape)}; give uint8 [height, width, 3] with the channels R, G, B"
            )
        pixels = decode(image, None, name)
        if self._detector is not None:
            return self._aligned(pixels, name)
        height, width = pixels.shape[:2]
        if height != width:
            raise UserError(
                f"{name} has {width}x{height} pixels; an aligned face is square. Ask for align=True (--align), or crop it first"
            )
        return decode(pixels, self._size)

    def _aligned(self, photograph: np.ndarray, name: str) -> np.ndarray:
        from lvtrain.data import align

        assert self._detector is not None
        with self._lock:
            points = self._detector.largest_face(photograph)
        if points is None:
            raise UserError(f"{name} shows no face that the detector finds; crop it by hand, or leave it out")
        return align.warp(photograph, align.similarity(points, align.template(self._size)), self._size)


def _is_one(images: Any) -> bool:
    """Whether it is one image and not a sequence of them."""
    return isinstance(images, (str, Path, bytes, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim == 3)
