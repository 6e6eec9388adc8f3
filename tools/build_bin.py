"""Writes a verification set (`.bin`) from a list of pairs and the images in it."""

from __future__ import annotations

import io
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lvtrain.errors import UserError, one_line_errors
from lvtrain.files.reading import read_lines


def main(
    pairs: Annotated[
        Path, typer.Argument(help="text file, one pair per line: IMAGE IMAGE 1|0, separated by tabs or spaces")
    ],
    images: Annotated[Path, typer.Argument(help="folder that the images' paths are relative to")],
    out: Annotated[Path, typer.Argument(help=".bin file to write; .bin.json is written next to it")],
    image_size: Annotated[
        int, typer.Option(help="images of another size are resized and encoded again; 0 keeps every file")
    ] = 112,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that are encoded again")] = 95,
    balance_folds: Annotated[
        bool,
        typer.Option(
            help="reorder the pairs into ten folds with equally many positive ones; the order within each kind stays"
        ),
    ] = False,
    align: Annotated[
        bool,
        typer.Option("--align", help="photographs: find the largest face and align it to insightface's five points"),
    ] = False,
    alignment: Annotated[
        str,
        typer.Option(help="how the faces were aligned, for .bin.json; accuracies depend on it"),
    ] = "unknown",
) -> None:
    """Writes a verification set. It has ten consecutive folds: keep the list's order, or give --balance-folds."""
    from lvtrain.evaluation.alignment import TEMPLATE, look
    from lvtrain.evaluation.bins import balanced_order, check_folds, write_bin

    with one_line_errors("build_bin", out):
        if align and not image_size:
            raise UserError("--align needs the size of the aligned faces; give --image-size 112")
        names, issame = read_pairs(pairs)
        if balance_folds:
            order = balanced_order(issame)
            names, issame = [names[i] for i in order], issame[order]
        check_folds(issame, out)
        # an image is often in many pairs: read it once
        every = dict.fromkeys(chain.from_iterable(names))
        if align:
            encoded, alignment = aligned(images, list(every), image_size, quality), TEMPLATE
        else:
            encoded = {name: encode(images / name, image_size, quality) for name in every}
        found = look(list(encoded.values()), alignment, name=str(out))
        about = {"alignment": alignment, "alignment_found": asdict(found)}
        write_bin(out, [encoded[name] for pair in names for name in pair], issame, about=about)
    print(f"{out}: {len(issame)} pairs, {int(issame.sum())} of one identity, {len(encoded)} images")
    print(found.line(str(out)))


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Image names of every pair and issame, bool [P]."""
    if not path.is_file():
        raise UserError(f"list of pairs {path} does not exist")
    names, issame = [], []
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise UserError(f"list of pairs {path} is not a text file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.rstrip("\n").split("\t") if "\t" in line else line.split()
        if len(columns) != 3 or columns[2].strip() not in ("0", "1"):
            raise UserError(f"{path}, line {number}: IMAGE IMAGE 1|0 is expected, got {line!r}")
        names.append((columns[0], columns[1]))
        issame.append(columns[2].strip() == "1")
    return names, np.array(issame, dtype=bool)


def aligned(folder: Path, names: list[str], image_size: int, quality: int) -> dict[str, bytes]:
    """The largest face of each photograph, aligned, as JPEG bytes by name."""
    from lvtrain.data.align import Detector, similarity, template, warp
    from lvtrain.weights.extract import decode

    detector, found, faceless = Detector(), {}, []
    for name in names:
        image = decode((folder / name).read_bytes(), None, f"image {folder / name}")
        points = detector.largest_face(image)
        if points is None:
            faceless.append(name)
            continue
        found[name] = _jpeg(warp(image, similarity(points, template(image_size)), image_size), quality)
    if faceless:
        raise UserError(
            f"no face found in {len(faceless)} of {len(names)} images under {folder}: {', '.join(faceless[:5])}"
            f"{' …' if len(faceless) > 5 else ''}; take their pairs out of the list"
        )
    return found


def encode(path: Path, image_size: int, quality: int) -> bytes:
    """The file's bytes if the image has the right size, else a new JPEG of it."""
    from PIL import Image

    from lvtrain.weights.extract import decode

    data = path.read_bytes()
    picture = decode(data, None, f"image {path}")
    if image_size == 0 or picture.shape[:2] == (image_size, image_size):
        return data
    return _jpeg(Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.BICUBIC), quality)


def _jpeg(image: Any, quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    typer.run(main)
