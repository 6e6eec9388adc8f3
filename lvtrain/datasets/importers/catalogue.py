"""What a source holds, as flat files next to the pack: one row an image, so that 42 million of them need no Python objects and no second listing.

Written once per pack, in the source's own order; worker processes map it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lvtrain.errors import UserError

# container: number of the archive; offset, length: what the source needs to find the bytes; name: offset into names.bin
ROW = np.dtype([("offset", "<u8"), ("name", "<u8"), ("container", "<u4"), ("length", "<u4"), ("identity", "<u4")])
LABEL_ORDERS = ("natural", "lexicographic")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts id2 before id10: digits count as numbers; no two names (id1, id01) are equal, or a listing's order would decide."""
    parts = [(1, int(part), "") if part.isdecimal() else (2, 0, part) for part in re.split(r"(\d+)", name) if part]
    return [*parts, (0, 0, name)]


class CatalogueWriter:
    """Takes images in any order of identities; `close` numbers the identities in the order asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = open(folder / "rows.tmp", "wb")  # noqa: SIM115  (closed by close)
        self._names = open(folder / "names.bin", "wb")  # noqa: SIM115
        self._identities: dict[str | int, int] = {}
        self._containers: dict[str, int] = {}
        self._buffer: list[tuple[int, int, int, int, int]] = []
        self._position = 0
        self.ignored: dict[str, int] = {}
        self.class_names: dict[int, str] = {}
        self.count = 0

    def identity(self, identity: str | int) -> int:
        """Registers an identity; it may stay without an image. Integers are labels of the source, strings its names."""
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

    def ignore(self, reason: str) -> None:
        self.ignored[reason] = self.ignored.get(reason, 0) + 1

    def _flush(self) -> None:
        self._rows.write(np.array(self._buffer, dtype=ROW).tobytes())
        self._buffer.clear()

    def close(self, label_order: str) -> None:
        """Raises UserError when the source mixes names and numbers, or holds nothing."""
        self._flush()
        self._rows.close()
        self._names.close()
        identities = list(self._identities)
        numeric = all(isinstance(identity, int) for identity in identities)
        if not self.count:
            left_out = "".join(f"; left out: {count} x {reason}" for reason, count in self.ignored.items())
            raise UserError(f"the source holds no image{left_out}; check SRC and --kind")
        if not numeric and any(isinstance(identity, int) for identity in identities):
            raise UserError("the source has labels that are numbers and labels that are names; use one of both")
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
            "ignored": self.ignored,
        }
        (self.folder / "catalogue.json").write_text(json.dumps(body))
        os.replace(
            self.folder / "rows.tmp", self.folder / "rows.bin"
        )  # the commit: rows.bin exists only when all is there


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue, mapped. `identities[i]` is the name or source label of rows whose `identity` is i."""

    rows: np.ndarray
    identities: list[str | int]
    numeric: bool
    class_names: dict[int, str]
    containers: list[str]
    ignored: dict[str, int]
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
            ignored=body["ignored"],
            _names=np.memmap(folder / "names.bin", dtype=np.uint8, mode="r"),
        )

    def name(self, row: int) -> str:
        start = int(self.rows["name"][row])
        stop = int(self.rows["name"][row + 1]) if row + 1 < len(self.rows) else len(self._names)
        return bytes(self._names[start : stop - 1]).decode(errors="surrogateescape")
