"""A PNG to look at before training: some images of some identities, channel means, and a check of the colour order."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvtrain.data.images import try_decode
from lvtrain.files import atomic

_CELL = 112
_ROWS, _COLUMNS = 8, 10  # of a dataset's sheet
_MARGIN = 92
_SIZE = 12  # of letters, in pixels


def colour_order(means: np.ndarray) -> str:
    """Guesses the colour order from the channel means [3] of the images' middle.

    Skin of every tone reflects more red than blue.
    """
    difference = float(means[0] - means[2])
    if difference > 4:
        return "RGB (red above blue, as skin has it)"
    if difference < -4:
        return "BGR? blue lies above red: red and blue look swapped"
    return "undecided (grey images, or strong light colours)"


def channel_means(decoded: Sequence[np.ndarray | None]) -> np.ndarray:
    """Mean of red, green, blue over the middle half of each image, float64 [3]; zeros without an image."""
    middles = []
    for pixels in decoded:
        if pixels is not None:
            height, width = pixels.shape[:2]
            middles.append(
                pixels[height // 4 : 3 * height // 4 or 1, width // 4 : 3 * width // 4 or 1].reshape(-1, 3).mean(axis=0)
            )
    return np.mean(middles, axis=0) if middles else np.zeros(3)


def fonts_for(texts: Iterable[str]) -> dict[str, Path | None]:
    """For each text that is not ASCII, a font of this system that has all its letters; None if there is none."""
    missing = {text for text in texts if not text.isascii()}
    found: dict[str, Path | None] = dict.fromkeys(missing)
    if not missing:
        return found
    from matplotlib import font_manager, ft2font

    for path in sorted(font_manager.findSystemFonts()):
        try:
            letters = set(ft2font.FT2Font(path).get_charmap())
        except (RuntimeError, OSError, ValueError):  # a font that cannot be opened
            continue
        for text in list(missing):
            if {ord(letter) for letter in text if not letter.isspace()} <= letters:
                found[text] = Path(path)
                missing.remove(text)
        if not missing:
            break
    return found


def _visible(text: str) -> str:
    """Control characters and line breaks as code points: fonts cannot measure them."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class _Pen:
    r"""Draws text in a font that has its letters. If no font has them, it draws their code points, such as \u738b."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._fonts = fonts_for(_visible(text) for text in texts)
        self._plain = ImageFont.load_default(_SIZE)

    def prepared(self, text: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
        """The text as it is drawn, and its font."""
        text = _visible(text)
        path = self._fonts.get(text)
        if path is not None:
            return text, ImageFont.truetype(str(path), _SIZE)
        return text.encode("ascii", "backslashreplace").decode(), self._plain

    def width(self, text: str) -> int:
        shown, font = self.prepared(text)
        return int(font.getlength(shown))

    def lines(
        self, text: str, width: int, count: int
    ) -> tuple[list[str], ImageFont.FreeTypeFont | ImageFont.ImageFont]:
        """The text cut into at most `count` lines of `width` pixels."""
        shown, font = self.prepared(text)
        lines = [""]
        for letter in shown:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        return lines[:count], font


def draw(rows: Sequence[tuple[str, Sequence[bytes]]], title: str, path: str | Path) -> str:
    """Draws the sheet: one row for each identity. Images that cannot be decoded are drawn as crossed boxes.

    Args:
        rows: (name, encoded images) of each identity.
        title: written at the top.
        path: PNG to write.

    Returns:
        The line under the title: channel means and colour order.
    """
    columns = max(len(encoded) for _, encoded in rows)
    decoded = [[try_decode(image, upright=False) for image in encoded] for _, encoded in rows]
    means = channel_means([pixels for row in decoded for pixels in row])
    line = f"channel means of the middle: R {means[0]:.1f}  G {means[1]:.1f}  B {means[2]:.1f}; colour order: {colour_order(means)}"
    head = 40
    pen = _Pen([title, *(name for name, _ in rows)])
    width = max(_MARGIN + columns * _CELL, *(12 + pen.width(text) for text in (title, line)))
    sheet = Image.new("RGB", (width, head + len(rows) * _CELL), (250, 250, 250))
    canvas = ImageDraw.Draw(sheet)
    for text, top, colour in ((title, 4, (20, 20, 20)), (line, 21, (160, 20, 20) if "BGR" in line else (90, 90, 90))):
        shown, font = pen.prepared(text)
        canvas.text((6, top), shown, fill=colour, font=font)
    for number, ((name, _), images_of_row) in enumerate(zip(rows, decoded)):
        top = head + number * _CELL
        lines, font = pen.lines(name, _MARGIN - 8, 5)
        for at, part in enumerate(lines):
            canvas.text((4, top + 24 + 14 * at), part, fill=(60, 60, 60), font=font)
        for column, pixels in enumerate(images_of_row):
            left = _MARGIN + column * _CELL
            if pixels is None:
                canvas.rectangle((left + 2, top + 2, left + _CELL - 3, top + _CELL - 3), outline=(200, 30, 30))
                canvas.line((left + 2, top + 2, left + _CELL - 3, top + _CELL - 3), fill=(200, 30, 30))
            else:
                sheet.paste(Image.fromarray(pixels).resize((_CELL - 2, _CELL - 2)), (left + 1, top + 1))
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    atomic.write_bytes(Path(path), encoded.getvalue())
    return line


def of_index(labels: np.ndarray, names: Sequence[str], read: Callable[[int], bytes]) -> list[tuple[str, list[bytes]]]:
    """Rows for `draw` from a dataset, with identities that are spread evenly over the labels.

    Args:
        labels: int [n] of all samples. Only the first two million are used, so that a huge index is not read for a few
            images.
        names: of the identities, by label.
        read: from sample id to encoded image.
    """
    labels = np.asarray(labels[:2_000_000])
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(_ROWS, len(present))).astype(int)]
    rows = []
    for label in chosen:
        samples = np.flatnonzero(labels == label)[:_COLUMNS]
        rows.append((names[label], [read(int(sample)) for sample in samples]))
    return rows
