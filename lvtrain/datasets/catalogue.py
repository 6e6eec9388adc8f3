"""The catalogue of a source: flat files in the pack's scratch folder, one row for each image.

So 42 million images need no Python objects, and the source is listed once. The catalogue is written in the source's order;
worker processes map it into memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data.folders import natural_key
from lvtrain.errors import UserError
from lvtrain.files import atomic

# container: number of the archive; offset and length: where the source finds the bytes; name: offset into names.bin
ROW = np.dtype([("offset", "<u8"), ("name", "<u8"), ("container", "<u4"), ("length", "<u4"), ("identity", "<u4")])
LABEL_ORDERS = ("natural", "lexicographic")
LISTED = 10_000  # names kept for each reason; the count is exact


@dataclass
class Tally:
    """A count, and the names of the first `LISTED` that were counted."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < LISTED:
            self.names.append(name)


@dataclass
class Ledger:
    """Counts of everything in a source that is not in the catalogue. Whatever is left out must be counted here.

    Attributes:
        left_out: files, members or records that are not packed, by reason.
        ignored: members that belong to a packed image but hold no image (its metadata), by kind.
        unlabelled: images without a label.
        mismatches: one line for each announcement (header, index, manifest, ...) that differs from what was found.
        missing: images that were announced but not found.
        unannounced: images that were found beyond an announcement.
    """

    left_out: dict[str, Tally] = field(default_factory=dict)
    ignored: dict[str, Tally] = field(default_factory=dict)
    unlabelled: Tally = field(default_factory=Tally)
    mismatches: Tally = field(default_factory=Tally)
    missing: int = 0
    unannounced: int = 0

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Ledger:
        return cls(
            left_out={reason: Tally(**tally) for reason, tally in body["left_out"].items()},
            ignored={reason: Tally(**tally) for reason, tally in body["ignored"].items()},
            unlabelled=Tally(**body["unlabelled"]),
            mismatches=Tally(**body["mismatches"]),
            missing=body["missing"],
            unannounced=body["unannounced"],
        )


class CatalogueWriter:
    """Takes images in any order of identities. `close` numbers the identities."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = open(folder / "rows.tmp", "wb")  # noqa: SIM115  (closed by close)
        self._names = open(folder / "names.bin", "wb")  # noqa: SIM115
        self._identities: dict[str | int, int] = {}
        self._containers: dict[str, int] = {}
        self._buffer: list[tuple[int, int, int, int, int]] = []
        self._position = 0
        self.ledger = Ledger()
        self.class_names: dict[int, str] = {}
        self.count = 0

    @property
    def found(self) -> int:
        """Everything found so far that is an image, or stands where an image should be."""
        left_out = sum(tally.count for tally in self.ledger.left_out.values())
        return self.count + left_out + self.ledger.unlabelled.count

    @property
    def identities(self) -> int:
        return len(self._identities)

    def left_out(self, reason: str, name: str) -> None:
        """Counts a file, member or record that is not packed."""
        self.ledger.left_out.setdefault(reason, Tally()).add(_printable(name))

    def ignored(self, kind: str, name: str) -> None:
        """Counts a member that belongs to a packed image but holds no image."""
        self.ledger.ignored.setdefault(kind, Tally()).add(_printable(name))

    def unlabelled(self, name: str) -> None:
        """Counts an image without a label. The policy `unlabelled` decides whether that is an error."""
        self.ledger.unlabelled.add(_printable(name))

    def announced(self, where: str, announced: int, found: int, what: str = "images") -> None:
        """Compares what the source announces with what was found.

        The policy `mismatch` decides whether a difference is an error.
        """
        if announced == found:
            return
        self.ledger.mismatches.add(_printable(f"{where} announces {announced:,} {what}, {found:,} were found"))
        if what == "images":
            self.ledger.missing += max(0, announced - found)
            self.ledger.unannounced += max(0, found - announced)

    def identity(self, identity: str | int) -> int:
        """Registers an identity, which may have no image. Integers are labels of the source, strings are names."""
        if isinstance(identity, str):
            check_name(identity)
        return self._identities.setdefault(identity, len(self._identities))

    def add(self, identity: str | int, name: str, *, container: str = "", offset: int = 0, length: int = 0) -> None:
        data = name.encode(errors="surrogateescape") + b"\n"
        self._names.write(data)
        number = self._containers.setdefault(container, len(self._containers))
        self._buffer.append((offset, self._position, number, min(length, 0xFFFFFFFF), self.identity(identity)))
        self._position += len(data)
        self.count += 1
        if len(self._buffer) >= 65536:
            self._flush()

    def _flush(self) -> None:
        self._rows.write(np.array(self._buffer, dtype=ROW).tobytes())
        self._buffer.clear()

    def close(self, label_order: str) -> None:
        """Numbers the identities and commits the catalogue.

        Args:
            label_order: one of `LABEL_ORDERS`.

        Raises:
            UserError: the source mixes names and numbers, or holds no image.
        """
        for name in self.class_names.values():
            check_name(name)
        self._flush()
        for file in (self._rows, self._names):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        identities = list(self._identities)
        numeric = all(isinstance(identity, int) for identity in identities)
        if not self.count:
            left_out = "".join(
                f"; left out: {tally.count} x {reason}" for reason, tally in self.ledger.left_out.items()
            )
            without = f"; {self.ledger.unlabelled.count} without a label" if self.ledger.unlabelled.count else ""
            raise UserError(f"the source holds no image{left_out}{without}; check SRC and --kind")
        if not numeric and any(isinstance(identity, int) for identity in identities):
            raise UserError("the source has labels that are numbers and labels that are names; use one kind")
        if numeric:
            order = sorted(range(len(identities)), key=lambda i: identities[i])
        elif label_order == "natural":
            order = sorted(range(len(identities)), key=lambda i: natural_key(str(identities[i])))
        else:
            order = sorted(range(len(identities)), key=lambda i: str(identities[i]))
        rank = np.empty(len(order), dtype=np.uint32)
        rank[order] = np.arange(len(order))
        rows = np.memmap(self.folder / "rows.tmp", dtype=ROW, mode="r+")
        for start in range(0, len(rows), 1 << 20):
            rows["identity"][start : start + (1 << 20)] = rank[rows["identity"][start : start + (1 << 20)]]
        rows.flush()
        body = {
            "identities": [identities[i] for i in order],
            "numeric": numeric,
            "class_names": {str(label): name for label, name in self.class_names.items()},
            "containers": list(self._containers),
            "ledger": asdict(self.ledger),
        }
        atomic.write_json(self.folder / "catalogue.json", body)
        # the commit: rows.bin exists only when everything is there
        os.replace(self.folder / "rows.tmp", self.folder / "rows.bin")
        atomic.sync_folder(self.folder)


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue, mapped into memory. `identities[i]` is the name or source label of the rows with `identity` i."""

    rows: np.ndarray
    identities: list[str | int]
    numeric: bool
    class_names: dict[int, str]
    containers: list[str]
    ledger: Ledger
    _names: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Catalogue:
        body = json.loads((folder / "catalogue.json").read_text())
        return cls(
            rows=np.memmap(folder / "rows.bin", dtype=ROW, mode="r"),
            identities=body["identities"],
            numeric=body["numeric"],
            class_names={int(label): name for label, name in body["class_names"].items()},
            containers=body["containers"],
            ledger=Ledger.from_dict(body["ledger"]),
            _names=np.memmap(folder / "names.bin", dtype=np.uint8, mode="r"),
        )

    def name(self, row: int) -> str:
        start = int(self.rows["name"][row])
        stop = int(self.rows["name"][row + 1]) if row + 1 < len(self.rows) else len(self._names)
        return bytes(self._names[start : stop - 1]).decode(errors="surrogateescape")


def check_name(name: str) -> None:
    r"""Checks the name of an identity.

    Raises:
        UserError: it holds half of a character (JSON's `\\ud800` alone), which no text file can hold.
    """
    try:
        name.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise UserError(f"the identity {name!a} holds half of a character; correct its name in the source") from None


def _printable(name: str) -> str:
    """A name as one line for JSON and terminals, even if it is not UTF-8."""
    return " ".join(name.encode(errors="surrogateescape").decode(errors="backslashreplace").split("\n"))
