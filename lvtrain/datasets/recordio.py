"""MXNet RecordIO (`train.rec`, `train.idx`), read and written without mxnet.

A record, little-endian:

    uint32 magic | uint32 lrec | payload | zeros up to a multiple of 4 bytes

- The low 29 bits of `lrec` are the length. `lrec >> 29` is 0 for a whole record, and 1, 2, 3 for the first, a middle and
  the last part of one.
- A payload that holds the magic at a multiple of 4 bytes is cut there. The magic is dropped, and inserted again when the
  parts are joined.
- A payload begins with `<IfQQ`: flag, label, id, id2. With flag k > 0, k float32 labels follow.

insightface's files:

- Key 0 is a header record: flag 2, labels [N+1, N+1+C].
- Keys 1..N are images.
- Keys N+1..N+C are identity records. Their labels are the half-open range of their images' keys.

Files of other tools hold images only, from key 0. All these numbers are float32, so they are rounded from 2^24 on.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lvtrain.data.images import MAX_BYTES
from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.checked import check_length, check_regular

MAGIC = 0xCED7230A
LARGEST_LABEL = 1 << 24  # labels are float32, which cannot represent every integer from here on
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")


@dataclass(frozen=True)
class Record:
    """An unpacked record. `labels` is float32 [1] for flag 0, else [flag]. Header and identity records have no image."""

    flag: int
    labels: np.ndarray
    id: int
    id2: int
    image: bytes


def pack_record(label: float | Iterable[float], image: bytes = b"", *, id: int = 0) -> bytes:
    """The payload of a record. A number is written with flag 0, a sequence of k numbers with flag k."""
    if isinstance(label, (int, float, np.integer, np.floating)):
        return _HEADER.pack(0, float(label), id, 0) + image
    labels = np.asarray(list(label), dtype="<f4")
    return _HEADER.pack(len(labels), 0.0, id, 0) + labels.tobytes() + image


def unpack_record(payload: bytes) -> Record:
    """Unpacks a payload.

    Raises:
        ValueError: it is shorter than its header says.
    """
    if len(payload) < _HEADER.size:
        raise ValueError(f"{len(payload)} bytes are too few for a record header")
    flag, label, id_, id2 = _HEADER.unpack_from(payload)
    end = _HEADER.size + 4 * flag
    if len(payload) < end:
        raise ValueError(f"{flag} labels do not fit into {len(payload)} bytes")
    labels = (
        np.frombuffer(payload, dtype="<f4", count=flag, offset=_HEADER.size).copy()
        if flag
        else np.array([label], np.float32)
    )
    return Record(flag, labels, id_, id2, payload[end:])


class RecordWriter:
    """Writes a `.rec` and its `.idx`: `with RecordWriter("train.rec") as rec: rec.write(key, pack_record(label, jpeg))`.

    Both get their final names when the block ends without an exception.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".idx")
        self._temporary = [p.with_name(p.name + ".tmp") for p in (self.path, self.index_path)]
        self._rec: IO[bytes] = open(self._temporary[0], "wb")  # noqa: SIM115  (closed by __exit__)
        self._idx: IO[str] = open(self._temporary[1], "w")  # noqa: SIM115

    def write(self, key: int, payload: bytes) -> int:
        """Appends a payload. Returns its offset.

        Raises:
            UserError: its label is 2^24 or more, or it is too long.
        """
        if len(payload) > _LENGTH_MASK:
            raise UserError(f"{self.path}: record {key} has {len(payload)} bytes, RecordIO ends at {_LENGTH_MASK}")
        record = unpack_record(payload)
        if record.image:
            integer_label(record, f"{self.path}: record {key}")
        offset = self._rec.tell()
        parts = _split(payload)
        for number, part in enumerate(parts):
            flag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
            self._rec.write(_PART.pack(MAGIC, flag << _LENGTH_BITS | len(part)))
            self._rec.write(part + bytes(-len(part) % 4))
        self._idx.write(f"{key}\t{offset}\n")
        return offset

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        files: tuple[IO[Any], ...] = (self._rec, self._idx)
        try:
            if kind is None:
                atomic.commit(self._rec, self.path)
                atomic.commit(self._idx, self.index_path)
        finally:
            for file, path in zip(files, self._temporary):
                with contextlib.suppress(OSError):  # on a full disk what is still buffered cannot be written
                    file.close()
                path.unlink(missing_ok=True)


def _split(payload: bytes) -> list[bytes]:
    parts, start, at = [], 0, payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(payload[start:at])
            start = at + 4
        at = payload.find(_MAGIC_BYTES, start if at % 4 == 0 else at + 1)
    return [*parts, payload[start:]]


def integer_label(record: Record, where: str) -> int:
    """The identity of an image record (its first label).

    Raises:
        UserError: it is negative, not an integer, or 2^24 or more, where float32 cannot distinguish identities.
    """
    label = float(record.labels[0])
    if not label.is_integer() or label < 0:
        raise UserError(f"{where} has label {label}, which is not an identity's number; write the file again")
    if label >= LARGEST_LABEL:
        raise UserError(
            f"{where} has label {label:.0f}; RecordIO labels are float32 and lose identities from {LARGEST_LABEL} on: pack from images"
        )
    return int(label)


class RecordFile:
    """Random access to an existing `.rec`, memory-mapped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_regular(self.path)
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._map)

    def parts(self, offset: int) -> Iterator[tuple[int, int, int]]:
        """The parts of the record at `offset`: start, length, and the offset after it.

        Raises:
            UserError: no record starts there, or the file ends inside it.
        """
        first = True
        while True:
            if offset < 0 or offset + _PART.size > len(self._map):
                raise UserError(
                    f"{self.path} ends inside a record at byte {offset}; it was cut short: download it again"
                )
            magic, lrec = _PART.unpack_from(self._map, offset)
            flag, length = lrec >> _LENGTH_BITS, lrec & _LENGTH_MASK
            if magic != MAGIC or (flag in (0, 1)) != first:
                raise UserError(
                    f"{self.path}: no record starts at byte {offset}; the .idx belongs to another file or the file is damaged"
                )
            start = offset + _PART.size
            offset = start + length + (-length % 4)
            if start + length > len(self._map):
                raise UserError(
                    f"{self.path} ends inside a record at byte {start}; it was cut short: download it again"
                )
            yield start, length, offset
            first = False
            if flag in (0, 3):
                return

    def payload(self, offset: int) -> tuple[bytes, int]:
        """The joined payload of the record at `offset`, and the offset after it.

        Raises:
            UserError: no record starts there, the file ends inside it, or it has more bytes than an image may have.
        """
        found = list(self.parts(offset))
        check_length(sum(length for _, length, _ in found), MAX_BYTES, f"{self.path}: the record at byte {offset}")
        return _MAGIC_BYTES.join(self._map[start : start + length] for start, length, _ in found), found[-1][2]

    def record(self, offset: int) -> Record:
        """The unpacked record at `offset`.

        Raises:
            UserError: it is damaged.
        """
        payload, _ = self.payload(offset)
        try:
            return unpack_record(payload)
        except ValueError as error:
            raise UserError(
                f"{self.path}: the record at byte {offset} is damaged ({error}); download it again"
            ) from None

    def scan(self) -> Iterator[int]:
        """Offsets of all records, for a `.rec` without `.idx`."""
        offset = 0
        while offset < len(self._map):
            yield offset
            *_, (_, _, offset) = self.parts(offset)


def read_index(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads an `.idx`: keys and offsets, int64 [n] each, in the file's order.

    Raises:
        UserError: the file is missing or damaged, or a line is not `key<TAB>offset`.
    """
    try:
        check_regular(Path(path))
        text = Path(path).read_text(encoding="ascii")
        damaged = re.search(r"[^0-9\s-]|[0-9-]-|-(?![0-9])", text)
        table = np.empty(0, dtype=np.int64) if damaged else np.fromstring(text, dtype=np.int64, sep=" ")
    except ValueError:  # not text
        table = np.empty(0, dtype=np.int64)
    if len(table) % 2 or not len(table):
        raise UserError(
            f"{path} is not a RecordIO index (lines of key, tab, offset); remove it to have the .rec scanned"
        )
    keys, offsets = table[0::2], table[1::2]
    if int(table.min()) < 0:
        raise UserError(
            f"{path} holds a negative number; it is damaged: copy it again, or remove it to have the .rec scanned"
        )
    for what, values in (("key", keys), ("offset", offsets)):
        if len(np.unique(values)) < len(values):
            raise UserError(
                f"{path} holds a {what} twice; it is damaged: copy it again, or remove it to have the .rec scanned"
            )
    return keys, offsets


def write_index(path: str | Path, keys: Iterable[int], offsets: Iterable[int]) -> None:
    """Writes an `.idx` of chosen records. With it DALI's `fn.readers.mxnet` reads a subset of an unchanged `.rec`."""
    atomic.write_text(Path(path), "".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets)))


def read_property(path: Path) -> int | None:
    """Number of identities in insightface's `property` file (`C,height,width`); None without one.

    Raises:
        UserError: it does not begin with a number.
    """
    if not path.exists():
        return None
    head = path.read_bytes()[:4096] if check_regular(path) <= 4096 else b""
    number = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].split(b",")[0].strip()
    if not number.isdigit():
        raise UserError(f"{path} does not begin with the number of identities; copy it again, or remove it")
    return int(number)


def count_list(path: Path) -> int:
    """Number of images in the `.lst` that a `.rec` was made from: its lines.

    Raises:
        UserError: not a regular file, or not text.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


@dataclass(frozen=True)
class RecordCatalogue:
    """Which records are images, and how many were announced.

    Attributes:
        keys: int64 [n], of the image records.
        offsets: int64 [n], of the image records.
        labels: int64 [n], of the image records.
        empty: labels of identities without an image.
        announced: images according to the header; more if the .rec holds image records that the index does not list, and
            with records that stand among the images but hold none.
        announced_by: the file that announces them.
        announced_identities: according to the header; None without one.
        identity_records: how many were found.
    """

    keys: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    empty: tuple[int, ...]
    announced: int
    announced_by: str
    announced_identities: int | None
    identity_records: int


def catalogue(file: RecordFile, index: str | Path | None) -> RecordCatalogue:
    """Lists all image records of a `.rec`: insightface's layout or images only, with `.idx` or without.

    Raises:
        UserError: a damaged record, a bad label, an `.idx` of another file, or no image at all.
    """
    indexed = index is not None and Path(index).exists()
    if indexed:
        keys, offsets = read_index(Path(str(index)))
        if int(offsets.max()) >= len(file):
            raise UserError(
                f"{index} points beyond the end of {file.path}; it belongs to another file, or the .rec was cut short"
            )
    else:
        offsets = np.fromiter(file.scan(), dtype=np.int64)
        keys = np.arange(len(offsets))
    first = np.flatnonzero(keys == 0)
    header = file.record(int(offsets[first[0]])) if len(first) else None
    images = np.ones(len(keys), dtype=bool)
    identity_rows: np.ndarray = np.empty(0, dtype=np.int64)
    stated: tuple[int, int] | None = None
    if header is not None and header.flag > 0 and not header.image:
        if not np.isfinite(header.labels).all() or header.labels[0] < 1 or (header.labels % 1).any():
            raise UserError(
                f"{file.path}: its header counts {header.labels.tolist()} records; it is damaged: copy it again"
            )
        start = _first_identity(file, keys, offsets, header.labels[0])
        images = (keys > 0) & (keys < start)
        identity_rows = np.flatnonzero(keys >= start)
        if header.flag > 1 and header.labels[0] <= header.labels[1] < LARGEST_LABEL:  # larger ones are rounded
            stated = start - 1, int(header.labels[1]) - start
            identity_rows = identity_rows[keys[identity_rows] < start + stated[1]]
    chosen = np.flatnonzero(images)
    labels, holds = np.empty(len(chosen), dtype=np.int64), np.ones(len(chosen), dtype=bool)
    for row, at in enumerate(chosen):
        record = file.record(int(offsets[at]))
        holds[row] = bool(record.image)
        if record.image:
            labels[row] = integer_label(record, f"{file.path}: record {keys[at]}")
    empty_images = int((~holds).sum())
    chosen, labels = chosen[holds], labels[holds]
    if not len(chosen):
        raise UserError(f"{file.path} holds no image records")
    empty = []
    for at in identity_rows:
        ranges = file.record(int(offsets[at])).labels
        if len(ranges) >= 2 and ranges[0] >= ranges[1]:
            empty.append(int(keys[at]) - start)
    announced, by = len(chosen) + empty_images, str(file.path)
    if indexed:
        announced += _unnamed_images(file, offsets)
    if stated is not None:
        announced, by = max(announced, stated[0]), f"{file.path} (its header)"
    return RecordCatalogue(
        keys[chosen], offsets[chosen], labels, tuple(empty), announced, by,
        None if stated is None else stated[1], len(identity_rows),
    )  # fmt: skip


def _unnamed_images(file: RecordFile, offsets: np.ndarray) -> int:
    """Number of image records in the file that its index does not list."""
    count = at = 0
    for offset in [*np.sort(offsets).tolist(), len(file)]:
        while at < offset:
            count += len(file.record(at).image) > 0
            *_, (_, _, at) = file.parts(at)
        if offset < at and offset < len(file):
            raise UserError(
                f"{file.path}: no record starts at byte {offset}, which the index names; it belongs to another file"
            )
        if offset < len(file):
            *_, (_, _, at) = file.parts(offset)
    return count


def _first_identity(file: RecordFile, keys: np.ndarray, offsets: np.ndarray, stated: np.float32) -> int:
    """Key of the first identity record.

    It is the header's number. If that may be rounded, it is the first record near it without an image.
    """
    start = int(stated)
    if start < LARGEST_LABEL:
        return start
    doubt = int(np.spacing(stated))
    near = np.flatnonzero(np.abs(keys - start) <= doubt)
    return min((int(keys[at]) for at in near if not file.record(int(offsets[at])).image), default=start + doubt + 1)
