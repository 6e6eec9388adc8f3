"""One PNG to look at before a month of training: identities x images, mean of each channel, and whether red and blue look swapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvtrain.data import images

_CELL = 112
_MARGIN = 92


def decode(data: bytes) -> np.ndarray | None:
    """uint8 RGB [h, w, 3], or None when it cannot be decoded."""
    try:
        return images.decode(data, upright=False)
    except images.ImageError:
        return None


def colour_order(means: np.ndarray) -> str:
    """A guess from the mean of the middle of the images, float [3]: skin of every tone reflects more red than blue."""
    difference = float(means[0] - means[2])
    if difference > 4:
        return "RGB (red above blue, as skin has it)"
    if difference < -4:
        return "BGR? blue lies above red: red and blue look swapped"
    return "undecided (grey images, or strong light colours)"


def channel_means(pictures: Sequence[np.ndarray | None]) -> np.ndarray:
    """Mean of red, green, blue over the middle half of each picture, float64 [3]; zeros without a picture."""
    middles = []
    for picture in pictures:
        if picture is not None:
            height, width = picture.shape[:2]
            middles.append(
                picture[height // 4 : 3 * height // 4 or 1, width // 4 : 3 * width // 4 or 1]
                .reshape(-1, 3)
                .mean(axis=0)
            )
    return np.mean(middles, axis=0) if middles else np.zeros(3)


def draw(rows: Sequence[tuple[str, Sequence[bytes]]], title: str, path: str | Path) -> str:
    """Draws one row an identity, (name, encoded images), and returns the line written under the title.

    Images that cannot be decoded are drawn as a crossed box.
    """
    columns = max(len(encoded) for _, encoded in rows)
    decoded = [[decode(image) for image in encoded] for _, encoded in rows]
    means = channel_means([picture for row in decoded for picture in row])
    line = f"channel means of the middle: R {means[0]:.1f}  G {means[1]:.1f}  B {means[2]:.1f}; colour order: {colour_order(means)}"
    head = 40
    font = ImageFont.load_default(12)
    width = max(_MARGIN + columns * _CELL, *(12 + int(font.getlength(text)) for text in (title, line)))
    sheet = Image.new("RGB", (width, head + len(rows) * _CELL), (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 4), title, fill=(20, 20, 20), font=font)
    pen.text((6, 21), line, fill=(160, 20, 20) if "BGR" in line else (90, 90, 90), font=font)
    for number, ((name, _), pictures) in enumerate(zip(rows, decoded)):
        top = head + number * _CELL
        for part in range(0, min(len(name), 52), 13):
            pen.text((4, top + 36 + part), name[part : part + 13], fill=(60, 60, 60), font=font)
        for column, picture in enumerate(pictures):
            left = _MARGIN + column * _CELL
            if picture is None:
                pen.rectangle((left + 2, top + 2, left + _CELL - 3, top + _CELL - 3), outline=(200, 30, 30))
                pen.line((left + 2, top + 2, left + _CELL - 3, top + _CELL - 3), fill=(200, 30, 30))
            else:
                sheet.paste(Image.fromarray(picture).resize((_CELL - 2, _CELL - 2)), (left + 1, top + 1))
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(path)
    return line


def of_index(
    labels: np.ndarray, names: Sequence[str], read: Callable[[int], bytes], *, identities: int = 8, images: int = 10
) -> list[tuple[str, list[bytes]]]:
    """Rows for `draw` from a dataset: identities spread evenly over the labels of the samples looked at.

    Args:
        labels: int [n] of all samples; at most the first two million are looked at, so that a huge index is not read for a picture.
        read: sample id to encoded image.
    """
    labels = np.asarray(labels[:2_000_000])
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(identities, len(present))).astype(int)]
    rows = []
    for label in chosen:
        samples = np.flatnonzero(labels == label)[:images]
        rows.append((names[label], [read(int(sample)) for sample in samples]))
    return rows
