"""What stands in a `.rec`: its `.idx`, insightface's header and identity records, and the files beside it.

insightface's files:

- Key 0 is a header record: flag 2, labels [N+1, N+1+C].
- Keys 1..N are images.
- Keys N+1..N+C are identity records. Their labels are the half-open range of their images' keys.

Files of other tools hold images only, from key 0. All these numbers are float32, so they are rounded from 2^24 on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvtrain.datasets.recordio.records import LARGEST_LABEL, RecordFile, integer_label
from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.checked import check_regular


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


def catalogue(file: RecordFile) -> RecordCatalogue:
    """Lists all image records of a `.rec`: insightface's layout or images only, with an `.idx` beside it or without.

    Raises:
        UserError: a damaged record, a bad label, an `.idx` of another file, or no image at all.
    """
    index = file.path.with_suffix(".idx")
    indexed = index.exists()
    if indexed:
        keys, offsets = read_index(index)
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
            at = file.after(at)
        if offset < at and offset < len(file):
            raise UserError(
                f"{file.path}: no record starts at byte {offset}, which the index names; it belongs to another file"
            )
        if offset < len(file):
            at = file.after(offset)
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
