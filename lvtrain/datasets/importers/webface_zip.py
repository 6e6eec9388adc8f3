"""WebFace's zips, read without extraction: entries named .../0_0_0000000/0_0.jpg, stored or deflated."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from lvtrain.data.folders import in_hidden_folder, natural_key
from lvtrain.data.images import MAX_BYTES, is_image_name
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.containers import Containers
from lvtrain.datasets.importer import IMPORTERS, Importer
from lvtrain.datasets.importers.webface import IDENTITY
from lvtrain.errors import UserError
from lvtrain.files.checked import inflate, reading

_LATER = 8  # flag: checksum and sizes follow the data


@IMPORTERS.register("webface-zip")
class WebFaceZip(Importer):
    """SRC/*.zip of WebFace."""

    def __init__(self, path: Path, options: Any) -> None:
        super().__init__(path, options)
        self.zips = Containers(path, ".zip")

    def scan(self, out: CatalogueWriter) -> None:
        for file in self.zips.files(out):
            with reading(file, "a zip"), zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            for entry in sorted(entries, key=lambda entry: natural_key(entry.filename)):
                self._add(entry, file, out)

    def _add(self, entry: zipfile.ZipInfo, file: Path, out: CatalogueWriter) -> None:
        parts = entry.filename.rstrip("/").split("/")
        where = f"{self.zips.relative(file)}: {entry.filename}"
        if entry.is_dir():
            if IDENTITY.fullmatch(parts[-1]) and not in_hidden_folder(entry.filename):
                out.identity(parts[-1])
        elif in_hidden_folder(entry.filename):
            out.left_out("zip entry in a hidden or system folder", where)
        elif not is_image_name(entry.filename) or len(parts) < 2 or not IDENTITY.fullmatch(parts[-2]):
            out.left_out("zip entry that is not a WebFace image by its name", where)
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise UserError(
                f"{where} is encrypted or packed with method {entry.compress_type}; extract the zip and use --kind webface"
            )
        elif entry.file_size > MAX_BYTES:
            out.left_out(f"zip entry of more than {MAX_BYTES:,} bytes", where)
        else:
            out.add(
                parts[-2],
                "/".join(parts[-2:]),
                container=self.zips.relative(file),
                offset=entry.header_offset,
                length=entry.compress_size,
            )

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        file, offset, length = catalogue.containers[record["container"]], int(record["offset"]), int(record["length"])
        header = struct.unpack("<4s2xHH4xI8xHH", self.zips.read_at(file, offset, 30))
        magic, flags, method, checksum, name, extra = header
        where = f"{self.zips.absolute(file)}: the entry at byte {offset}"
        if magic != b"PK\3\4":
            raise UserError(
                f"{where} does not exist any more; the zip changed since it was listed: start again in an empty OUT"
            )
        data = self.zips.read_at(file, offset + 30 + name + extra, length)
        image = data if method == zipfile.ZIP_STORED else inflate(data, MAX_BYTES, where)
        if not flags & _LATER and zlib.crc32(image) != checksum:
            raise UserError(f"{where} is damaged: its checksum differs; copy the zip again")
        return image
