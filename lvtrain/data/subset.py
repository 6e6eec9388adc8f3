"""Part of a dataset as a manifest: which samples, and which label each identity gets. No image is copied.

`NAME.json` says what was chosen, and from which dataset (its fingerprint). `NAME.bin` holds 32 bytes of header, the label map
(uint32 [identities of the dataset], `DROPPED` for those left out) and the ascending sample ids (uint64 [n]). Both arrays are
memory-mapped.

`lvtrain.datasets.subset` chooses and writes them.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from lvtrain.data.index import read_manifest
from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json

SCHEMA = 1
DROPPED = 0xFFFFFFFF
MAGIC = b"LVTSUBST"
HEADER = struct.Struct("<8sIIQQ")  # magic, schema, num_classes, identities of the dataset, samples


def first_of_each(labels: np.ndarray, most: int, draws: np.ndarray | None = None) -> np.ndarray:
    """Positions of at most `most` samples of every label, int64, ascending.

    Args:
        labels: int64 [N].
        most: samples of a label.
        draws: uint64 [N]; those with the lowest are taken. None: the first.
    """
    order = np.argsort(labels, kind="stable") if draws is None else np.lexsort((draws, labels))
    first = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(order)) - first < most])


def read_subset(path: Path) -> tuple[Path, np.ndarray, np.ndarray, str]:
    """Dataset folder, sample ids (memory map), label map (memory map) and what the subset adds to the fingerprint.

    Raises:
        UserError: missing, not ours, damaged, or written for another state of the dataset.
    """
    try:
        body = parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; correct data.path or write it with tools/make_subset.py") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); write it again with tools/make_subset.py") from None
    if not isinstance(body, dict) or body.get("format") != "lvtrain-subset" or body.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is not a subset manifest of schema {SCHEMA}; point data.path at a dataset folder or a subset"
        )
    folder = path.parent / body["dataset"]
    if read_manifest(folder).fingerprint != body["dataset_fingerprint"]:
        raise UserError(f"{path} was written for another state of {folder}; write it again with tools/make_subset.py")
    binary = path.parent / body["binary"]
    try:
        with open(binary, "rb") as file:
            head = file.read(HEADER.size)
    except FileNotFoundError:
        raise UserError(f"{binary} is missing; it must be in the folder of {path.name}") from None
    identities = read_manifest(folder).num_classes
    start = HEADER.size + -(-identities * 4 // 8) * 8
    whole = len(head) == HEADER.size and binary.stat().st_size == start + 8 * body["samples"]
    if not whole or HEADER.unpack(head) != (MAGIC, SCHEMA, body["num_classes"], identities, body["samples"]):
        raise UserError(
            f"{binary} does not belong to {path.name}; copy both again or write them with tools/make_subset.py"
        )
    label_of = np.memmap(binary, dtype=np.uint32, mode="r", offset=HEADER.size, shape=(identities,))
    ids = np.memmap(binary, dtype=np.uint64, mode="r", offset=start, shape=(body["samples"],))
    return folder, ids, label_of, "-" + hashlib.sha256(body["sha256"].encode()).hexdigest()[:8]
