"""Sources that are files in folders: one folder an identity, and WebFace's own naming of the same."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from lvtrain.data.images import is_image_name, read_file
from lvtrain.datasets.importers.catalogue import Catalogue, CatalogueWriter, natural_key
from lvtrain.errors import UserError

WEBFACE_IDENTITY = re.compile(r"\d+_\d+_\d{7}")  # part_k_id, e.g. 0_0_0000000


class Folder:
    """SRC/identity/**/image: every folder directly below SRC is an identity, also an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def accepts(self, identity: str) -> bool:
        return not identity.startswith(".")

    def scan(self, out: CatalogueWriter) -> None:
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} is not a folder; --kind folder and webface want one folder an identity below SRC"
            )
        for entry in sorted(os.scandir(self.path), key=lambda entry: natural_key(entry.name)):
            if not entry.is_dir():
                out.ignore("file beside the identity folders")
            elif not self.accepts(entry.name):
                out.ignore("folder whose name is no identity")
            else:
                out.identity(entry.name)
                for folder, below, files in os.walk(entry.path):
                    below.sort(key=natural_key)
                    for name in sorted(files, key=natural_key):
                        if is_image_name(name):
                            out.add(entry.name, os.path.relpath(os.path.join(folder, name), self.path))
                        else:
                            out.ignore("file which is no image by its suffix")

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        return read_file(self.path / catalogue.name(row))

    def grains(self, catalogue: Catalogue) -> np.ndarray | None:
        return None


class WebFace(Folder):
    """WebFace42M (4M, 12M, 260M) as extracted: SRC/0_0_0000000/0_0.jpg; other folders are counted and left out."""

    def accepts(self, identity: str) -> bool:
        return WEBFACE_IDENTITY.fullmatch(identity) is not None
