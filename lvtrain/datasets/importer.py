"""The base class of importers, and their registry.

Each file of `lvtrain/datasets/importers/` holds one kind of source: a class that lists the images of a source and reads
one of them. It is registered under the name that `tools/pack_dataset.py --kind` takes. `lvtrain/datasets/README.md` shows
how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ValidationError

from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.errors import UserError
from lvtrain.recipe.base import Section
from lvtrain.recipe.registry import Registry


class Options(Section):
    """Options of a kind of source. A subclass adds some. `--option NAME=VALUE` sets them."""


class Importer(ABC):
    """Lists the images of one source, and reads them.

    Class attributes:
        options_class: its options.
        lists_folders: every folder below the source may be an identity, so the dataset must not be written inside it.
    """

    options_class: ClassVar[type[Options]] = Options
    lists_folders: ClassVar[bool] = False

    def __init__(self, path: Path, options: Any) -> None:
        self.path, self.options = path, options

    @abstractmethod
    def scan(self, out: CatalogueWriter) -> None:
        """Lists every image and identity in `out`.

        It calls `out.add` for an image, and `out.left_out`, `out.ignored` or `out.unlabelled` for everything else.
        `out.announced` compares the numbers that the source announces with what was found.

        Raises:
            UserError: the source is damaged, or of another kind.
        """

    @abstractmethod
    def read(self, catalogue: Catalogue, row: int) -> bytes:
        """The encoded image of one row of the catalogue. Called in worker processes.

        Raises:
            UserError, ImageError: this image is damaged.
            OSError: it cannot be read.
        """

    def read_groups(self, catalogue: Catalogue) -> np.ndarray | None:
        """The group of each row, int [n], if whole groups are read at once; None if any order is equally fast."""
        return None


IMPORTERS: Registry[type[Importer]] = Registry("kind of source", "lvtrain.datasets.importers")


def check_options(kind: str, given: Mapping[str, Any]) -> Options:
    """The options of a kind of source, checked.

    Raises:
        UserError: an unknown kind or option, or a bad value.
    """
    section = IMPORTERS.get(kind).options_class
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        known = ", ".join(section.model_fields) or "none"
        raise UserError(f"--option of --kind {kind}: {wrong} (known: {known})") from None


def open_importer(kind: str, path: Path, options: Mapping[str, Any]) -> Importer:
    """The importer of a kind, for a source.

    Raises:
        UserError: an unknown kind or option, or a path that does not exist.
    """
    chosen = check_options(kind, options)
    if not path.exists():
        raise UserError(f"{path} does not exist; correct SRC")
    return IMPORTERS.get(kind)(path, chosen)
