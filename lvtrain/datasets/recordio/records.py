"""The records of an MXNet RecordIO file, read and written without mxnet.

A record, little-endian:

    uint32 magic | uint32 lrec | payload | zeros up to a multiple of 4 bytes

- The low 29 bits of `lrec` are the length. `lrec >> 29` is 0 for a whole record, and 1, 2, 3 for the first, a middle and
  the last part of one.
- A payload that holds the magic at a multiple of 4 bytes is cut there. The magic is dropped, and inserted again when the
  parts are joined.
- A payload begins with `<IfQQ`: flag, label, id, id2. With flag k > 0, k float32 labels follow.
"""

from __future__ import annotations

import contextlib
import mmap
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

    def payload(self, offset: int) -> bytes:
        """The joined payload of the record at `offset`.

        Raises:
            UserError: no record starts there, the file ends inside it, or it has more bytes than an image may have.
        """
        found = list(self.parts(offset))
        check_length(sum(length for _, length, _ in found), MAX_BYTES, f"{self.path}: the record at byte {offset}")
        return _MAGIC_BYTES.join(self._map[start : start + length] for start, length, _ in found)

    def record(self, offset: int) -> Record:
        """The unpacked record at `offset`.

        Raises:
            UserError: it is damaged.
        """
        payload = self.payload(offset)
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
            offset = self.after(offset)

    def after(self, offset: int) -> int:
        """The offset after the record at `offset`."""
        *_, (_, _, after) = self.parts(offset)
        return after
