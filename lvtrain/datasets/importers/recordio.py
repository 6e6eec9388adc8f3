"""RecordIO: insightface's train.rec, with or without train.idx, or any .rec that holds only images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvtrain.data.folders import is_hidden
from lvtrain.datasets import recordio
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importer import IMPORTERS, Importer
from lvtrain.errors import UserError


@IMPORTERS.register("recordio")
class RecordIO(Importer):
    """SRC is the .rec file or its folder. The header, the .idx and `property` are compared with the content."""

    def __init__(self, path: Path, options: Any) -> None:
        if path.is_dir():
            found = sorted(file for file in path.glob("*.rec") if not is_hidden(file.name))
            if len(found) != 1:
                raise UserError(f"{path} holds {len(found)} .rec files; give the file itself")
            path = found[0]
        super().__init__(path, options)
        self._file: recordio.RecordFile | None = None

    @property
    def file(self) -> recordio.RecordFile:
        if self._file is None:
            self._file = recordio.RecordFile(self.path)
        return self._file

    def scan(self, out: CatalogueWriter) -> None:
        found = recordio.catalogue(self.file)
        for label in found.empty:
            out.identity(label)
        for key, offset, label in zip(found.keys.tolist(), found.offsets.tolist(), found.labels.tolist()):
            out.add(label, str(key), offset=offset)
        listed, announced = self.path.with_suffix(".lst"), (found.announced, found.announced_by)
        if listed.exists():
            announced = max(announced, (recordio.count_list(listed), str(listed)))
        out.announced(announced[1], announced[0], out.found)
        if found.announced_identities is not None:
            out.announced(found.announced_by, found.announced_identities, found.identity_records, "identity records")
        stated = recordio.read_property(self.path.with_name("property"))
        if stated is not None:
            out.announced(str(self.path.with_name("property")), stated, out.identities, "identities")

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        return self.file.record(int(catalogue.rows[row]["offset"])).image
