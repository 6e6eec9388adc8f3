"""Sources that are archives: WebFace's zips, RecordIO and WebDataset tars. Bytes are read in place; nothing is extracted."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lvtrain.data.images import is_image_name
from lvtrain.data.index import read_labels
from lvtrain.datasets import recordio
from lvtrain.datasets.importers.catalogue import Catalogue, CatalogueWriter, natural_key
from lvtrain.datasets.importers.folders import WEBFACE_IDENTITY
from lvtrain.errors import UserError


class _Archives:
    """Files opened once a process and read by position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, int] = {}

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._open:
            self._open[name] = os.open(self.path / name if self.path.is_dir() else self.path, os.O_RDONLY)
        data = os.pread(self._open[name], length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.path / name} ends at byte {offset + len(data)} inside an image; it was cut short: download it again"
            )
        return data

    def files(self, suffix: str) -> list[Path]:
        found = (
            [self.path]
            if self.path.is_file()
            else sorted(self.path.rglob(f"*{suffix}"), key=lambda p: natural_key(str(p)))
        )
        if not found:
            raise UserError(f"{self.path} holds no {suffix} file; check SRC and --kind")
        return found

    def relative(self, file: Path) -> str:
        return str(file.relative_to(self.path)) if self.path.is_dir() else file.name

    def grains(self, catalogue: Catalogue) -> np.ndarray | None:
        return None


class WebFaceZip(_Archives):
    """SRC/*.zip whose entries are .../0_0_0000000/0_0.jpg, stored or deflated."""

    def scan(self, out: CatalogueWriter) -> None:
        for file in self.files(".zip"):
            try:
                entries = zipfile.ZipFile(file).infolist()
            except zipfile.BadZipFile as error:
                raise UserError(f"{file} cannot be read as a zip ({error}); download it again") from None
            for entry in sorted(entries, key=lambda entry: natural_key(entry.filename)):
                parts = entry.filename.rstrip("/").split("/")
                if entry.is_dir():
                    if WEBFACE_IDENTITY.fullmatch(parts[-1]):
                        out.identity(parts[-1])
                elif not is_image_name(entry.filename) or len(parts) < 2 or not WEBFACE_IDENTITY.fullmatch(parts[-2]):
                    out.ignore("zip entry which is no WebFace image by its name")
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                    raise UserError(
                        f"{file}: {entry.filename} is encrypted or packed with method {entry.compress_type}; extract it first"
                    )
                else:
                    name = "/".join(parts[-2:])
                    out.add(
                        parts[-2],
                        name,
                        container=self.relative(file),
                        offset=entry.header_offset,
                        length=entry.compress_size,
                    )

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        file, offset, length = catalogue.containers[record["container"]], int(record["offset"]), int(record["length"])
        magic, _, _, method, name, extra = struct.unpack("<4sHHH16xHH", self.read_at(file, offset, 30))
        if magic != b"PK\3\4":
            raise UserError(
                f"{self.path / file}: no entry at byte {offset}; the zip changed since it was listed: start again in an empty OUT"
            )
        data = self.read_at(file, offset + 30 + name + extra, length)
        return data if method == zipfile.ZIP_STORED else zlib.decompress(data, wbits=-15)


class RecordIO:
    """insightface's train.rec (with or without train.idx), or any flat .rec; SRC is the file or its folder."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            found = sorted(path.glob("*.rec"))
            if len(found) != 1:
                raise UserError(f"{path} holds {len(found)} .rec files; give the file itself")
            path = found[0]
        self.path = path
        self._file: recordio.RecordFile | None = None

    @property
    def file(self) -> recordio.RecordFile:
        if self._file is None:
            self._file = recordio.RecordFile(self.path)
        return self._file

    def scan(self, out: CatalogueWriter) -> None:
        found = recordio.catalogue(self.file, self.path.with_suffix(".idx"))
        for label in found.empty:
            out.identity(label)
        for key, offset, label in zip(found.keys.tolist(), found.offsets.tolist(), found.labels.tolist()):
            out.add(label, str(key), offset=offset)

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        return self.file.record(int(catalogue.rows[row]["offset"])).image

    def grains(self, catalogue: Catalogue) -> np.ndarray | None:
        return None


class WebDataset(_Archives):
    """Existing tars: key.jpg (or png, webp, ...) with key.cls, or key.json holding label, cls or class. Also lvtrain's own dataset folders."""

    def scan(self, out: CatalogueWriter) -> None:
        names = self.path / "labels.txt"
        if names.exists() and (self.path / "dataset.json").exists():
            out.class_names.update(enumerate(read_labels(self.path)))
        for file in self.files(".tar"):
            self._scan_tar(file, out)

    def _scan_tar(self, file: Path, out: CatalogueWriter) -> None:
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, str | int] = {}
        try:
            with tarfile.open(file, mode="r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, base = os.path.split(member.name)
                    key, _, suffix = base.partition(".")
                    key = os.path.join(folder, key)
                    if is_image_name("x." + suffix):
                        images[key] = (member.name, member.offset_data, member.size)
                    elif suffix in ("cls", "json"):
                        labels[key] = _label(tar.extractfile(member).read(), suffix, f"{file}: {member.name}")  # type: ignore[union-attr]
                    else:
                        out.ignore(f"member .{suffix} of a tar")
                    if key in images and key in labels:
                        name, offset, size = images.pop(key)
                        out.add(labels.pop(key), name, container=self.relative(file), offset=offset, length=size)
        except tarfile.TarError as error:
            raise UserError(
                f"{file} cannot be read as a tar ({error}); it was cut short, or is compressed: unpack .tar.gz first"
            ) from None
        if images:
            raise UserError(
                f"{file}: {next(iter(images.values()))[0]} has no .cls or .json with a label; add one or remove the image"
            )
        if labels:
            out.ignore("label without an image in a tar")

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        return self.read_at(catalogue.containers[record["container"]], int(record["offset"]), int(record["length"]))


def _label(data: bytes, suffix: str, where: str) -> str | int:
    text: object = data.decode(errors="replace").strip()
    if suffix == "json":
        try:
            body = json.loads(data)
            text = next(body[key] for key in ("label", "cls", "class") if key in body)
        except (ValueError, TypeError, StopIteration):
            raise UserError(f"{where} holds no label, cls or class; add one") from None
    try:
        label = int(str(text))
    except ValueError:
        return str(text)
    if label < 0:
        raise UserError(f"{where} holds the label {label}; labels count from 0")
    return label
