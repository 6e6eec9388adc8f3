"""Embeddings on disk, `NAME.npy`, and their embedding space, `NAME.json` beside it.

`NAME.json` is an object; its key `space` is the identifier of `lvtrain.weights.space`. An array without it is of an unknown
space: it is compared with any other, and the user must make sure that both come from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.files.atomic import write_json
from lvtrain.files.reading import parse_json
from lvtrain.weights.space import explain


@dataclass(frozen=True)
class Embeddings:
    """Embeddings `[N, d]`, memory-mapped, and their space; None where it is not known."""

    path: Path
    rows: np.ndarray
    space: str | None


def write_facts(path: Path, shape: tuple[int, ...], *, space: str, **facts: Any) -> None:
    """Writes the JSON file beside `path` (.npy), an array `[N, d]` of that `shape`.

    Args:
        path: ends in .npy.
        shape: of the array.
        space: of the model that made them, by `space_of`.
        facts: more keys of the JSON file, such as `model`.
    """
    write_json(path.with_suffix(".json"), {"space": space, "shape": list(shape), **facts}, indent=1)


def read_embeddings(path: Path) -> Embeddings:
    """Opens a .npy, with the JSON file beside it or without.

    Raises:
        UserError: no such array, or a JSON file beside it that is damaged or of another array.
    """
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as .npy ({error}); save a float array [samples, d] with numpy.save"
        ) from None
    beside = path.with_suffix(".json")
    try:
        found = parse_json(beside.read_text()) if beside.is_file() else {}
        space, shape = found.get("space"), found.get("shape")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{beside} is damaged ({error}); embed these images again") from None
    if shape is not None and tuple(shape) != rows.shape:
        raise UserError(
            f"{beside} describes an array {shape}, {path.name} is {list(rows.shape)}; embed these images again"
        )
    return Embeddings(path, rows, space)


def check_same_space(*embeddings: Embeddings) -> None:
    """Refuses to compare embeddings of different spaces; those of an unknown space pass.

    Raises:
        UserError: two of them are known and differ.
    """
    known = [found for found in embeddings if found.space]
    for other in known[1:]:
        first, second = known[0].space, other.space
        if first != second and first and second:
            raise UserError(
                f"{known[0].path} and {other.path} cannot be compared: {explain(first, second)}; "
                "embed both with one model"
            )
