"""WebFace4M, 12M, 42M and 260M after extraction: SRC/0_0_0000000/0_0.jpg."""

from __future__ import annotations

import re

from lvtrain.datasets.importer import IMPORTERS
from lvtrain.datasets.importers.folder import Folder

IDENTITY = re.compile(r"\d+_\d+_\d{7}", re.ASCII)  # part_k_id, e.g. 0_0_0000000


@IMPORTERS.register("webface")
class WebFace(Folder):
    """Folders named like 0_0_0000000; others are left out and counted."""

    @staticmethod
    def accepts(identity: str) -> bool:
        return IDENTITY.fullmatch(identity) is not None
