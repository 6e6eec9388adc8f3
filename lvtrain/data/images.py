"""The one decoder of encoded images, for packing, training, evaluation and reports.

An image is decoded only if its content is one of `FORMATS`, its header announces at most `MAX_SIDE` pixels per side, and, if
it is given as a path, it is a regular file. So no content can start another program (Pillow passes PostScript to
Ghostscript), fill the memory, or block on a pipe. The suffix decides only whether a file is considered (`is_image_name`).

DALI and simplejpeg decode plain JPEGs faster; `lvtrain.data.decoding.jpeg` decides which bytes they may see.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
MAX_SIDE = 8192  # pixels: 200 MB as RGB
MAX_BYTES = 1 << 26  # of an encoded image: 64 MiB


class ImageError(ValueError):
    """An image that cannot be decoded; the text says why, without naming the image."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: by its suffix, but no hidden file (`.name`, macOS's `._name`)."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        ImageError: a folder, pipe, socket or device, or a file of more than `MAX_BYTES`.
        OSError: the file cannot be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageError("it is not a regular file")
    if found.st_size > MAX_BYTES:
        raise ImageError(f"it has {found.st_size:,} bytes, more than {MAX_BYTES:,}")
    return Path(path).read_bytes()


def open_image(source: bytes | str | Path, *, upright: bool = True) -> Image.Image:
    """The decoded image with its `format`. Of 16 bits per pixel, the upper 8 are kept.

    Args:
        source: encoded bytes, or the path of a file.
        upright: turn it as its EXIF orientation says.

    Raises:
        ImageError: not one of the formats, damaged, too large, or pixels that are floating-point numbers or integers of
            more than 16 bits.
        OSError: a path that cannot be read.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > MAX_SIDE:
            raise ImageError(f"it has {image.width}x{image.height} pixels; at most {MAX_SIDE} per side are read")
        image.load()
        if image.mode.startswith("I"):
            wide = np.asarray(image)
            if wide.min() < 0 or wide.max() > 0xFFFF:
                raise ImageError("its pixels are integers of 32 bits; save it again with 8 or 16 bits per colour")
            narrow = Image.fromarray((wide >> 8).astype(np.uint8))
            narrow.format, image = image.format, narrow
        elif image.mode == "F":
            raise ImageError("its pixels are floating-point numbers; save it again with 8 bits per colour")
        if not upright:
            return image
        turned = ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"it is not one of {', '.join(FORMATS)}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, DecompressionBombError, struct.error
        raise ImageError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    turned.format = image.format
    return turned


def decode(source: bytes | str | Path, size: tuple[int, int] | None = None, *, upright: bool = True) -> np.ndarray:
    """Decodes an image to uint8 RGB [height, width, 3], and resizes it (bilinear) to `size` (height, width) if it differs.

    Raises:
        ImageError: as `open_image`.
        OSError: as `open_image`.
    """
    image = open_image(source, upright=upright).convert("RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def try_decode(source: bytes, size: tuple[int, int] | None = None, *, upright: bool = True) -> np.ndarray | None:
    """As `decode`; None where it raises ImageError."""
    try:
        return decode(source, size, upright=upright)
    except ImageError:
        return None
