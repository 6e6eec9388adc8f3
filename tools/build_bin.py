"""Writes a verification set (`.bin`) from a list of pairs and the images in it."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lvtrain.errors import UserError, one_line_errors


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
    alignment: Annotated[
        str,
        typer.Option(help="how the faces were aligned, for .bin.json; accuracies depend on it"),
    ] = "unknown",
) -> None:
    """Writes a verification set. It has ten consecutive folds: keep the list's order, or give --balance-folds."""
    from lvtrain.evaluation.bins import balanced_order, check_folds, write_bin

    with one_line_errors("build_bin", out):
        names, issame = read_pairs(pairs)
        if balance_folds:
            order = balanced_order(issame)
            names, issame = [names[i] for i in order], issame[order]
        check_folds(issame, out)
        # an image is often in many pairs: read it once
        encoded = {
            name: encode(images / name, image_size, quality) for name in dict.fromkeys(chain.from_iterable(names))
        }
        write_bin(out, [encoded[name] for pair in names for name in pair], issame, about={"alignment": alignment})
    print(f"{out}: {len(issame)} pairs, {int(issame.sum())} of one identity, {len(encoded)} images")


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Image names of every pair and issame, bool [P]."""
    if not path.is_file():
        raise UserError(f"list of pairs {path} does not exist")
    names, issame = [], []
    try:
        lines = path.read_text().splitlines()
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


def encode(path: Path, image_size: int, quality: int) -> bytes:
    """The file's bytes if the image has the right size, else a new JPEG of it."""
    from PIL import Image

    from lvtrain.evaluation.extract import decode

    data = path.read_bytes()
    picture = decode(data, None, f"image {path}")
    if image_size == 0 or picture.shape[:2] == (image_size, image_size):
        return data
    resized = Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    typer.run(main)
