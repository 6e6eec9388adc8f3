"""WebDataset tars: key.jpg (or png, webp, ...) with key.cls, or with key.json that holds label, cls or class.

It also reads datasets of lvtrain. The members of a sample follow each other. A sample ends where the key changes, or where
a suffix occurs again.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from lvtrain.data.folders import in_hidden_folder
from lvtrain.data.images import is_image_name
from lvtrain.data.index import Manifest, read_labels, read_manifest
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.containers import Containers
from lvtrain.datasets.importer import IMPORTERS, Importer, Options
from lvtrain.datasets.labels import MAX_JSON, Form, Label, LabelReader
from lvtrain.errors import UserError
from lvtrain.files.checked import check_length, reading
from lvtrain.files.reading import parse_json

_PREFERRED = ("jpg", "jpeg", "png", "webp")


class WebDatasetOptions(Options):
    """Options of `--kind webdataset`."""

    encoding: str = Field("utf-8", description="of .cls files that are text, such as gbk")
    labels: Form = Field(
        "auto", description=".cls files are text, binary (little-endian integers of 1, 2, 4 or 8 bytes), or auto"
    )
    image: str | None = Field(None, description="suffix of the image, where a sample has several: png, image.jpg")


@dataclass
class _Sample:
    """The members of a sample by suffix: name, offset and length of their bytes."""

    key: str
    members: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@IMPORTERS.register("webdataset")
class WebDataset(Importer):
    """SRC/*.tar, uncompressed."""

    options_class = WebDatasetOptions

    def __init__(self, path: Path, options: WebDatasetOptions) -> None:
        super().__init__(path, options)
        self.tars = Containers(path, ".tar")

    def scan(self, out: CatalogueWriter) -> None:
        ours = self._own_manifest()
        if ours is not None:
            out.class_names.update(enumerate(read_labels(self.path, ours)))
        announced = _announcements(self.path, ours)
        listed = bool(announced)
        reader = LabelReader(self.options.encoding, self.options.labels)
        for file in self.tars.files(out):
            before, images_before = out.found, out.count + out.ledger.unlabelled.count
            with (
                reading(file, "an uncompressed tar"),
                _Tar(open(file, "rb", buffering=0)) as raw,
                tarfile.open(fileobj=raw, mode="r:") as tar,
            ):
                for run in _runs(tar, self.tars.relative(file), out):
                    self._add(run, file, raw, reader, out)
                _check_end(tar, raw, file, out)
            stated = announced.pop(self.tars.relative(file), None) or _img2dataset(file)
            if stated is None and listed:
                stated = (f"the manifest of {self.path} ({file.name}, which it does not list)", 0)
            if stated is not None:
                images = out.count + out.ledger.unlabelled.count - images_before
                out.announced(*stated, images)
                out.ledger.unannounced += out.found - before - images  # masks, hidden files
        for who, count in announced.values():  # shards that a manifest lists but that do not exist
            out.announced(who, count, 0)

    def _own_manifest(self) -> Manifest | None:
        path = self.path / "dataset.json"
        if not path.is_file() or b"lvtrain-dataset" not in path.read_bytes()[:4096]:
            return None
        return read_manifest(self.path)

    def _add(self, run: list[_Sample], file: Path, raw: Any, reader: LabelReader, out: CatalogueWriter) -> None:
        """Adds consecutive samples of one key.

        Several are added only if each is complete. Otherwise a label could go to the image of another sample.
        """
        relative = self.tars.relative(file)
        found = [(sample, self._image(sample), self._label(sample, file, raw, reader)) for sample in run]
        incomplete = len(run) > 1 and any(image is None or label is None for _, image, label in found)
        for sample, image, label in found:
            name = f"{relative}: {sample.key}"
            if image is None:
                out.left_out("sample without an image that its suffix identifies", name)
                continue
            for suffix, (member, _, _) in sample.members.items():
                if suffix == image or suffix == "cls" or (suffix == "json" and "cls" not in sample.members):
                    continue
                if is_image_name("x." + suffix):
                    out.left_out(f"image .{suffix} of a sample with .{image}", f"{relative}: {member}")
                else:
                    out.ignored(f"member .{suffix} of a sample", f"{relative}: {member}")
            member, offset, size = sample.members[image]
            if label is None or incomplete:
                out.unlabelled(f"{relative}: {member}")
            else:
                out.add(label, member, container=relative, offset=offset, length=size)

    def _image(self, sample: _Sample) -> str | None:
        """The suffix of the sample's image: the one in the options, a plain one (jpg), or the only one."""
        if self.options.image is not None:
            return self.options.image if self.options.image in sample.members else None
        images = [suffix for suffix in sample.members if is_image_name("x." + suffix)]
        plain = [suffix for suffix in images if "." not in suffix]
        if plain:
            return min(plain, key=lambda suffix: _PREFERRED.index(suffix) if suffix in _PREFERRED else len(_PREFERRED))
        return images[0] if len(images) == 1 else None

    def _label(self, sample: _Sample, file: Path, raw: Any, reader: LabelReader) -> Label | None:
        """The label from .cls, or from .json if there is no .cls."""
        for suffix, read in (("cls", reader.of_bytes), ("json", reader.of_json)):
            if suffix in sample.members:
                name, offset, size = sample.members[suffix]
                check_length(size, MAX_JSON, f"{file}: {name}")
                raw.seek(offset)
                return read(raw.read(size), f"{file}: {name}")
        return None

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        return self.tars.read_at(
            catalogue.containers[record["container"]], int(record["offset"]), int(record["length"])
        )


class _Tar(io.BufferedReader):
    """A tar. A damaged header can announce any number of bytes, also a negative one (CVE-2025-8194)."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise UserError(
                f"{self.name} is damaged before byte {self.tell()}: a member of {size} bytes; copy it again"
            )
        check_length(size, MAX_JSON, f"{self.name}: a header before byte {self.tell()}")
        return super().read(size)


def _runs(tar: tarfile.TarFile, relative: str, out: CatalogueWriter) -> Iterator[list[_Sample]]:
    """Groups of consecutive samples of one key: one sample, or several if a suffix occurs again."""
    run: list[_Sample] = []
    files: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.size < 0:  # the next header would be this one again
            raise UserError(
                f"{relative}: {member.name} announces {member.size} bytes; the tar is damaged: copy it again"
            )
        if member.isdir():
            continue
        where = f"{relative}: {member.name}"
        folder, base = os.path.split(member.name)
        if base.startswith(".") or in_hidden_folder(member.name):
            out.left_out("hidden file of a tar", where)
            continue
        target = files.get(member.linkname) if member.islnk() else member
        if target is None or not target.isreg() or target.sparse is not None:
            out.left_out("link, device or sparse file of a tar", where)
            continue
        files[member.name] = target
        stem, _, suffix = base.partition(".")
        key, suffix = os.path.join(folder, stem), suffix.lower()
        if run and run[-1].key != key:
            yield run
            run = []
        if not run or suffix in run[-1].members:
            run.append(_Sample(key))
        run[-1].members[suffix] = (member.name, target.offset_data, target.size)
    if run:
        yield run


def _check_end(tar: tarfile.TarFile, raw: Any, file: Path, out: CatalogueWriter) -> None:
    """Checks what follows the last member. tarfile silently ends at a damaged header and at a block of zeros.

    Raises:
        UserError: a damaged header.
    """
    end = tar.offset
    raw.seek(end)
    block = raw.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        out.ledger.mismatches.add(f"{file} has no end-of-archive mark; it may have been cut at byte {end + len(block)}")
    elif block.strip(b"\0"):
        raise UserError(f"{file} is damaged at byte {end}, where a member should begin; copy it again")
    while block := raw.read(1 << 20):
        if block.strip(b"\0"):
            out.ledger.mismatches.add(
                f"{file} has data after its end-of-archive mark at byte {end}, which is not read; were two tars joined?"
            )
            return


def _announcements(path: Path, ours: Manifest | None) -> dict[str, tuple[str, int]]:
    """What manifests in the folder announce: tar (relative to the source) -> (the manifest, number of images)."""
    if not path.is_dir():
        return {}
    found = {}
    if ours is not None:
        found = {shard.name: (f"{path / 'dataset.json'} ({shard.name})", shard.samples) for shard in ours.shards}
    # webdataset's index: {"shardlist": [{"url", "nsamples"}]}
    for file in sorted(path.glob("*.json")) if ours is None else ():
        body = _json(file)
        if not isinstance(body, dict) or "shardlist" not in body:
            continue
        try:
            for url, count in [(str(shard["url"]), int(shard["nsamples"])) for shard in body["shardlist"]]:
                place = os.path.normpath(url)
                found[place if (path / place).is_file() else os.path.basename(place)] = (f"{file} ({url})", count)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(
                f"{file}: its shardlist needs url and nsamples for each shard; correct or remove it"
            ) from None
    return found


def _json(file: Path) -> Any:
    """The content of a JSON file; None if it is not one, or is too large.

    Raises:
        UserError: it has a shardlist, which cannot be read.
    """
    if not file.is_file() or file.stat().st_size > MAX_JSON:
        return None
    data = file.read_bytes()
    try:
        return parse_json(data)
    except ValueError as error:
        if b'"shardlist"' in data:
            raise UserError(
                f"{file}: it has a shardlist (url and nsamples for each shard), but is not JSON ({error}); correct or remove it"
            ) from None
        return None


def _img2dataset(file: Path) -> tuple[str, int] | None:
    """The number of images that img2dataset's 00000_stats.json gives for 00000.tar; None without one."""
    stats = file.with_name(f"{file.stem}_stats.json")
    try:
        return str(stats), int(_json(stats)["successes"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
