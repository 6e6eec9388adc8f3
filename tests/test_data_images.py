"""The one decoder: which contents it takes, and that none can run a program, fill the memory or block."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lvtrain.data import images
from tests.conftest import ROOT

PIXELS = np.random.default_rng(3).integers(0, 256, (13, 17, 3), dtype=np.uint8)


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    assert np.array_equal(images.decode(encoded(kind)), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_are_decoded_as_pillow_does(kind: str) -> None:
    data = encoded(kind)
    assert np.array_equal(images.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "ICO", "TGA", "PCX", "PDF", "EPS"])
def test_other_formats_are_refused_whatever_their_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(kind))
    with pytest.raises(images.ImageError):
        images.decode(path)


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ghostscript that notes its start stands in the path; nothing may start it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n{}loop\n%%EOF\n"
    with pytest.raises(images.ImageError):
        images.decode(data)
    assert not (tmp_path / "started").exists()


def test_an_announced_size_is_refused_before_it_is_allocated() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(images.ImageError, match="13000x13000"):
        images.decode(bomb)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")  # reading it would block for ever
    for path in (tmp_path / "x.jpg", tmp_path, Path("/dev/zero")):
        with pytest.raises(images.ImageError):
            images.decode(path)


def test_16_bits_are_narrowed_to_the_upper_8() -> None:
    deep = (PIXELS[..., 0].astype(np.uint16) << 8) + 255
    assert np.array_equal(images.decode(encoded("PNG", deep))[..., 1], PIXELS[..., 0])


def test_upright_by_exif_and_resized() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded("JPEG", exif=exif)
    assert images.decode(data).shape == (17, 13, 3) and images.decode(data, upright=False).shape == (13, 17, 3)
    assert images.decode(data, (8, 9)).shape == (8, 9, 3)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "PPM"]), st.data())
def test_damaged_bytes_decode_or_are_refused(kind: str, data: st.DataObject) -> None:
    good = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    with contextlib.suppress(images.ImageError):
        assert images.decode(bytes(good[:cut])).dtype == np.uint8


def test_names() -> None:
    taken = ("a.jpg", "b.JPEG", "c.png", "d/e.webp", "f.tif", "g.pgm")
    assert all(map(images.is_image_name, taken))
    assert not any(map(images.is_image_name, ("._a.jpg", "d/._e.jpg", ".b.jpg", "a.gif", "a.eps", "jpg", "a.jpg.txt")))


def test_nothing_else_in_the_package_opens_images() -> None:
    places = [
        path.relative_to(ROOT)
        for path in (ROOT / "lvtrain").rglob("*.py")
        if re.search(r"Image\.open\(", path.read_text()) and path.name != "images.py"
    ]
    assert places == [] and "formats=FORMATS" in (ROOT / "lvtrain/data/images.py").read_text()
