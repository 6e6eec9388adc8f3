"""Images in folders, one folder for each identity."""

from __future__ import annotations

from pydantic import Field

from lvtrain.data.folders import walk_identities
from lvtrain.data.images import read_file
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importer import IMPORTERS, Importer, Options


class FolderOptions(Options):
    """Options of `--kind folder` and `--kind webface`."""

    level: int | None = Field(
        None,
        ge=1,
        le=2,
        description="where the identities lie: 1 directly in SRC, 2 inside parts such as train/ and val/",
    )


@IMPORTERS.register("folder")
class Folder(Importer):
    """SRC/identity/**/image. Every folder in SRC is an identity, even an empty one."""

    options_class = FolderOptions
    lists_folders = True

    @staticmethod
    def accepts(identity: str) -> bool:
        """Whether a folder of this name is an identity."""
        return True

    def scan(self, out: CatalogueWriter) -> None:
        for entry in walk_identities(self.path, level=self.options.level, accepts=self.accepts):
            if entry.reason is not None:
                out.left_out(entry.reason, str(entry.path))
            elif entry.path is None:
                out.identity(str(entry.identity))
            else:
                out.add(str(entry.identity), entry.path)

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        return read_file(self.path / catalogue.name(row))
