"""One image of a source: its problems, and the JPEG that goes into the shard.

A JPEG that needs no change is copied byte for byte. Everything else (PNG, WebP, a fix, an alignment) is encoded once, at
the quality in the options, without chroma subsampling.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image

from lvtrain.data import align
from lvtrain.data.images import ImageError, open_image
from lvtrain.errors import UserError

UNDECODABLE, WRONG_SIZE, GREY, NO_FACE, CONVERTED, NARROW = 1, 2, 4, 8, 16, 32
INSPECTION = np.dtype([("hash", "<u8"), ("width", "<u2"), ("height", "<u2"), ("flags", "u1")])
ALIGNED_INSPECTION = np.dtype([*INSPECTION.descr, ("matrix", "<f4", (2, 3))])
UNREADABLE = (ImageError, OSError, zlib.error, UserError)


@dataclass(frozen=True)
class Target:
    """What images in the shards are: `size` pixels a side (None = any), and the JPEG `quality` where one is encoded."""

    size: int | None
    quality: int


def inspect(
    data: bytes, target: Target, detector: align.Detector | align.YuNet | None
) -> tuple[int, int, int, int, np.ndarray | None]:
    """Inspects an encoded image: hash of its bytes, width, height, flags, alignment matrix [2, 3].

    Bytes that cannot be decoded give a flag, not an exception.
    """
    digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
    try:
        picture = open_image(data, upright=detector is not None)
    except UNREADABLE:
        return digest, 0, 0, UNDECODABLE, None
    flags = 0
    if picture.format != "JPEG" or picture.mode not in ("RGB", "L"):
        flags |= CONVERTED
    if picture.mode == "L":
        flags |= NARROW
    pixels = np.asarray(picture.convert("RGB"))
    if picture.mode == "L" or ((pixels[..., 0] == pixels[..., 1]) & (pixels[..., 1] == pixels[..., 2])).all():
        flags |= GREY
    width, height = min(picture.width, 65535), min(picture.height, 65535)
    matrix = None
    if detector is not None:
        points = detector.largest_face(pixels)
        if points is None:
            flags |= NO_FACE
        else:
            matrix = align.similarity(points, align.template(target.size or align.TEMPLATE_SIZE))
        flags |= CONVERTED
    elif target.size is not None and picture.size != (target.size, target.size):
        flags |= WRONG_SIZE
    return digest, width, height, flags, matrix


def jpeg(data: bytes, target: Target, *, resize: bool, widen: bool, matrix: np.ndarray | None) -> bytes:
    """The JPEG of an image that cannot be copied: aligned by `matrix`, resized, made RGB (`widen`), or only converted."""
    picture = open_image(data)  # the encoded image has no EXIF
    if matrix is not None:
        picture = Image.fromarray(
            align.warp(np.asarray(picture.convert("RGB")), matrix, target.size or align.TEMPLATE_SIZE)
        )
    elif picture.mode not in ("RGB", "L") or (widen and picture.mode == "L"):
        picture = picture.convert("RGB")
    if resize and target.size is not None and picture.size != (target.size, target.size):
        # INTER_AREA's equivalent when shrinking, bilinear when growing
        picture = picture.resize((target.size, target.size), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=target.quality, subsampling=0)
    return out.getvalue()
