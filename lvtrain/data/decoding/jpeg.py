"""Decides from a JPEG's markers, without decoding, whether a fast decoder may see it.

DALI 2.4's CPU decoder crashes the process on bytes without a readable JPEG header, and after a sample that fails its
pipeline must be rebuilt. simplejpeg reads only JPEG and ignores the EXIF rotation. So both get only whole, upright, baseline
or progressive JPEGs in grey or colour. Pillow reads the rest.
"""

from __future__ import annotations

import io

from lvtrain.data import images

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_LARGEST = 8192
_REMEMBERED = 4096


class HeaderCheck:
    """Remembers the headers that it has checked. Images of one encoder share them, so most checks are one look-up in a set.

    Args:
        size: (height, width) that every image must have; None = any.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self._good: set[bytes] = set()
        self._lengths: list[int] = []

    def problem(self, data: bytes) -> str | None:
        """What is wrong with the image, in a few words; None if nothing is."""
        if data[-2:] != b"\xff\xd9" and data.rfind(b"\xff\xd9", -256) < 0:
            return "no end-of-image marker: cut short, or not a JPEG" if data else "no bytes"
        for length in self._lengths:
            if data[:length] in self._good:
                return None
        return self._walk(data)

    def _walk(self, data: bytes) -> str | None:
        if data[:2] != b"\xff\xd8":
            return "does not start as a JPEG"
        at, end, frame, tables, huffman = 2, len(data), False, False, False
        while True:
            if at + 4 > end or data[at] != 0xFF:
                return "its JPEG header is damaged"
            marker = data[at + 1]
            if marker == 0xFF:  # fill byte
                at += 1
                continue
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if length < 2 or at + 2 + length > end or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
                return "its JPEG header is damaged"
            if marker in _FRAMES:
                if frame or length < 11 or data[at + 4] != 8:
                    return "its JPEG frame header is damaged"
                height, width, components = (
                    int.from_bytes(data[at + 5 : at + 7], "big"),
                    int.from_bytes(data[at + 7 : at + 9], "big"),
                    data[at + 9],
                )
                if length != 8 + 3 * components or components not in (1, 3):
                    return f"a JPEG of {components} components"
                if not (0 < height <= _LARGEST and 0 < width <= _LARGEST):
                    return f"{width}x{height} pixels"
                if self.size and (height, width) != self.size:
                    return f"{width}x{height} pixels, {self.size[1]}x{self.size[0]} expected"
                frame = True
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return "a kind of JPEG that is not baseline or progressive"
            elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0" and _turned(data[at + 4 : at + 2 + length]):
                return "lies on its side or upside down, says its EXIF"
            tables |= marker == 0xDB
            huffman |= marker == 0xC4
            at += 2 + length
            if marker == 0xDA:
                break
        if not (frame and tables and huffman):
            return "its JPEG header is incomplete"
        if len(self._good) < _REMEMBERED:
            self._good.add(data[:at])
            if at not in self._lengths and len(self._lengths) < 2:
                self._lengths.append(at)
        return None


def _turned(exif: bytes) -> bool:
    from PIL import ExifTags, Image

    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow reports what is wrong
        return True


def rescue(data: bytes, size: tuple[int, int] | None) -> bytes | None:
    """The image, decoded by Pillow, as PNG; None if it cannot be decoded."""
    from PIL import Image

    pixels = images.try_decode(data, size)
    if pixels is None:
        return None
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def black(height: int, width: int) -> bytes:
    """A black JPEG, which replaces a sample that cannot be decoded."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "JPEG")
    return out.getvalue()
