"""The kinds of source `tools/pack_dataset.py --kind` knows; one more is one more class with `scan`, `read` and `grains`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from lvtrain.datasets.importers.archives import RecordIO, WebDataset, WebFaceZip
from lvtrain.datasets.importers.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importers.folders import Folder, WebFace
from lvtrain.datasets.importers.tables import Parquet
from lvtrain.errors import UserError

KINDS = ("folder", "webface", "webface-zip", "recordio", "parquet", "webdataset")


class Source(Protocol):
    def scan(self, out: CatalogueWriter) -> None:
        """Lists every image and identity."""

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        """The encoded image of one row; OSError when it cannot be read, UserError or zlib.error when what is there is damaged."""

    def grains(self, catalogue: Catalogue) -> np.ndarray | None:
        """Per row the number of the run it is best read with [n], or None where any order is as good."""


def open_source(kind: str, path: Path, *, image_column: str = "image", label_column: str = "label") -> Source:
    """Raises UserError for an unknown kind or a missing path."""
    if not path.exists():
        raise UserError(f"{path} does not exist; check SRC")
    if kind == "parquet":
        return Parquet(path, image_column, label_column)
    classes: dict[str, Callable[[Path], Source]] = {
        "folder": Folder,
        "webface": WebFace,
        "webface-zip": WebFaceZip,
        "recordio": RecordIO,
        "webdataset": WebDataset,
    }
    if kind not in classes:
        raise UserError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return classes[kind](path)
