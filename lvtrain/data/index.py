"""What stands where: the dataset folder, its `dataset.json` and its memory-mapped `index.bin`.

A dataset folder is

    shards/*.tar    WebDataset: `key.jpg` and `key.cls` for every sample
    index.bin       64 bytes of header, then 20 bytes a sample (`RECORD`), in sample-id order, shard after shard
    labels.txt      line i is the name of identity (label) i
    dataset.json    schema version, counts, shard list with sizes and sha256, provenance, seed, licence; written last: its presence is the commit

The index is mapped, never read: opening 260 million samples costs what opening ten does, and processes of one machine share the pages.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.files.atomic import commit, write_json, write_text
from lvtrain.files.reading import parse_json

SCHEMA = 2
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("shard", "<u4")])
_MAGIC = b"LVTINDEX"
_REMOTE = re.compile(r"pipe:|[a-z][a-z0-9]+:/")  # as text of a Path, which holds no double slash
_HEADER = struct.Struct("<8sIIQ32s8x")  # magic, schema, bytes a record, samples, sha256 of the records


@dataclass(frozen=True)
class Shard:
    """One tar: `name` is relative to the dataset folder (`shards/000000.tar`), `size` in bytes."""

    name: str
    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`dataset.json`."""

    samples: int
    num_classes: int
    shards: tuple[Shard, ...]
    labels_sha256: str
    index_sha256: str
    provenance: dict[str, Any]
    seed: int | None
    licence: str
    image_size: tuple[int, int] | None

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the ordered shards and their bytes, the index, the class count and the label map: a run refuses to resume on another."""
        lines = [f"{shard.name} {shard.samples} {shard.size} {shard.sha256}" for shard in self.shards]
        lines += [str(self.samples), str(self.num_classes), self.labels_sha256, self.index_sha256]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class IndexWriter:
    """Writes `index.bin`, `labels.txt` and `dataset.json`, a shard at a time, in memory that does not grow with the dataset.

    Sample ids are given in the order of the calls: shard after shard, inside a shard by offset. Nothing is visible under its final name
    before `close`; an interrupted writer leaves only `index.bin.tmp`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[Shard] = []
        self.samples = 0
        self._highest_label = -1
        self._digest = hashlib.sha256()
        self._temporary = self.folder / "index.bin.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by close)
        self._file.write(bytes(_HEADER.size))

    def add_shard(self, name: str, size: int, sha256: str, offsets: Any, lengths: Any, labels: Any) -> None:
        """One finished shard; offsets [k] and lengths [k] of the JPEG bytes inside the tar, labels [k] (array-likes of non-negative integers)."""
        records = np.empty(len(offsets), dtype=RECORD)
        records["offset"], records["length"], records["label"] = offsets, lengths, labels
        records["shard"] = len(self.shards)
        if len(records):
            if int((records["offset"] + records["length"]).max()) > size:
                raise UserError(
                    f"{self.folder / name}: a sample ends behind the shard's {size} bytes; write the shard again"
                )
            self._highest_label = max(self._highest_label, int(records["label"].max()))
        self._file.write(records.tobytes())
        self._digest.update(records.tobytes())
        self.shards.append(Shard(name, len(records), int(size), sha256))
        self.samples += len(records)

    def close(
        self,
        label_map: Sequence[str],
        *,
        provenance: dict[str, Any] | None = None,
        seed: int | None = None,
        licence: str = "unknown",
        image_size: tuple[int, int] | None = (112, 112),
    ) -> Manifest:
        """Commits: `label_map[i]` is the name of identity i; `licence` the terms under which the images may be used.

        Raises:
            UserError: no samples, a label without an entry in the map, or a name with a line break.
        """
        if not self.samples:
            raise UserError(
                f"{self.folder}: no sample to write; check the source folder and the policies that skip images"
            )
        if self._highest_label >= len(label_map):
            raise UserError(
                f"{self.folder}: label {self._highest_label} has no name among the {len(label_map)} identities; extend the label map"
            )
        if any("\n" in name for name in label_map):
            raise UserError(f"{self.folder}: an identity's name holds a line break; rename it")
        self._file.seek(0)
        self._file.write(_HEADER.pack(_MAGIC, SCHEMA, RECORD.itemsize, self.samples, self._digest.digest()))
        commit(self._file, self.folder / "index.bin")
        text = "".join(f"{name}\n" for name in label_map)
        write_text(self.folder / "labels.txt", text)
        manifest = Manifest(
            samples=self.samples,
            num_classes=len(label_map),
            shards=tuple(self.shards),
            labels_sha256=hashlib.sha256(text.encode()).hexdigest(),
            index_sha256=self._digest.hexdigest(),
            provenance=provenance or {},
            seed=seed,
            licence=licence,
            image_size=image_size,
        )
        body = {"format": "lvtrain-dataset", "schema": SCHEMA, "fingerprint": manifest.fingerprint, **asdict(manifest)}
        write_json(self.folder / "dataset.json", body, indent=1)
        return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """`dataset.json` of a dataset folder.

    Raises:
        UserError: missing, not ours, of another schema version, or damaged.
    """
    path = Path(folder) / "dataset.json"
    try:
        body = parse_json(path.read_text())
    except FileNotFoundError:
        if _REMOTE.match(str(path)):
            raise UserError(
                f"{path.parent} is not on a disk, and samples are read by their place: copy the dataset to one. "
                "In a loop of your own lvtrain.StreamDataset reads it from there, in no exact order"
            ) from None
        if (path.parent / ".pack").exists():
            raise UserError(
                f"{path.parent} holds a pack that did not end; run tools/pack_dataset.py again with the same options"
            ) from None
        raise UserError(
            f"{path} is missing; pack the images first (tools/pack_dataset.py) or correct data.path"
        ) from None
    except NotADirectoryError:
        raise UserError(
            f"{path.parent} is a file; give the dataset folder (of a subset: the one it is a choice of)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); pack again or restore it from a backup") from None
    if not isinstance(body, dict) or body.get("format") != "lvtrain-dataset":
        raise UserError(
            f"{path} is not a lvtrain dataset; point data.path at a folder written by tools/pack_dataset.py"
        )
    if body.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {body.get('schema')}, this version reads {SCHEMA}; pack again or use the version that wrote it"
        )
    try:
        return Manifest(
            samples=int(body["samples"]),
            num_classes=int(body["num_classes"]),
            shards=tuple(Shard(**shard) for shard in body["shards"]),
            labels_sha256=body["labels_sha256"],
            index_sha256=body["index_sha256"],
            provenance=body["provenance"],
            seed=body["seed"],
            licence=body["licence"],
            image_size=_size(body["image_size"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); pack again or restore it from a backup") from None


def _size(value: Any) -> tuple[int, int] | None:
    """`image_size` of a manifest, or ValueError."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        raise ValueError("image_size")
    return value[0], value[1]


def open_index(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """`index.bin` as a read-only memory map of `RECORD` [samples].

    Raises:
        UserError: missing, damaged, or written for another `dataset.json` (its records are not hashed here: `lvtrain.datasets.verify` does that).
    """
    path = Path(folder) / "index.bin"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; restore it or pack again") from None
    expected = _HEADER.size + RECORD.itemsize * manifest.samples
    if size != expected:
        raise UserError(
            f"{path} does not belong to dataset.json ({size} bytes, {expected} expected); it is cut short or stale: pack again"
        )
    *form, digest = _HEADER.unpack(head)
    if form != [_MAGIC, SCHEMA, RECORD.itemsize, manifest.samples] or digest.hex() != manifest.index_sha256:
        raise UserError(
            f"{path} does not belong to dataset.json (it is of another pack); restore the one that does, or pack again"
        )
    return np.memmap(path, dtype=RECORD, mode="r", offset=_HEADER.size)


def read_labels(folder: str | Path, manifest: Manifest | None = None) -> list[str]:
    """The identity names, by label.

    Args:
        folder: of the dataset.
        manifest: its `dataset.json`, if that was read before.

    Raises:
        UserError: labels.txt is missing, not UTF-8, or not the one of the manifest: a line more or less, and every identity
            after it would have another's name.
    """
    path, manifest = Path(folder) / "labels.txt", manifest or read_manifest(folder)
    try:
        data = path.read_bytes()
        names = data.decode().split("\n")[:-1]  # as text, a carriage return would end a name
    except FileNotFoundError:
        raise UserError(f"{path} is missing; restore it, or pack again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; it is damaged: restore it, or pack again") from None
    if hashlib.sha256(data).hexdigest() != manifest.labels_sha256:
        raise UserError(
            f"{path} does not belong to dataset.json ({len(names)} names); restore the one that does, or pack again"
        )
    return names
