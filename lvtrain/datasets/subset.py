"""Choosing part of a dataset and writing it as a manifest (`lvtrain.data.subset`); no image is copied.

Choices are by hash of (seed, identity) and (seed, sample): with one seed, 1% of the identities lie inside 10% of them, and 1 shot inside 4.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain import randomness
from lvtrain.data.index import file_sha256
from lvtrain.data.shards import ShardDataset
from lvtrain.data.subset import DROPPED, HEADER, MAGIC, SCHEMA
from lvtrain.errors import UserError
from lvtrain.files.atomic import commit, write_json


def choose(
    dataset: ShardDataset,
    *,
    fraction: float = 1.0,
    shots: int | None = None,
    min_images: int = 1,
    identities: Iterable[str] | None = None,
    without_identities: Iterable[str] = (),
    without_samples: Iterable[int] = (),
    seed: int = 0,
) -> np.ndarray:
    """Sample ids int64, ascending.

    Args:
        dataset: whole, or a subset already (the few shots of a cleaned set).
        fraction: share of the identities that are left by the filters, rounded up.
        shots: at most so many images an identity.
        min_images: identities with fewer are left out (counted before `shots`).
        identities, without_identities: names (lines of labels.txt) to keep to, or to leave out.
        without_samples: sample ids to leave out.

    Raises:
        UserError: an unknown name or sample id, a fraction outside (0, 1], or nothing left.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} of the identities: it must be above 0 and at most 1")
    labels = dataset.labels(np.arange(len(dataset)))
    keep = np.ones(len(labels), dtype=bool)
    without = np.fromiter(without_samples, dtype=np.int64)
    if len(without) and not 0 <= without.min() <= without.max() < len(labels):
        raise UserError(f"samples to leave out must be in [0, {len(labels)}); the list is of another dataset")
    keep[without] = False
    allowed = _named(dataset, identities) if identities is not None else np.ones(dataset.num_classes, dtype=bool)
    allowed &= ~_named(dataset, without_identities)
    images = np.bincount(labels[keep], minlength=dataset.num_classes)
    candidates = np.flatnonzero(allowed & (images >= max(1, min_images)))
    drawn = randomness.bits(seed, "subset/identity", candidates).argsort(kind="stable")
    chosen = np.zeros(dataset.num_classes, dtype=bool)
    chosen[candidates[drawn[: math.ceil(round(fraction * len(candidates), 6))]]] = (
        True  # 0.28 x 25 is 7.000000000000001
    )
    ids = np.flatnonzero(keep & chosen[labels])
    if shots is not None:
        order = ids[np.lexsort((randomness.bits(seed, "subset/shot", ids), labels[ids]))]
        first = np.searchsorted(labels[order], labels[order])
        ids = np.sort(order[np.arange(len(order)) - first < shots])
    if not len(ids):
        raise UserError(f"nothing of {dataset.folder} is left by this choice; loosen the filters")
    return ids


def check_target(path: Path) -> Path:
    """The .bin that belongs to a manifest to be written.

    Raises:
        UserError: not NAME.json, or another kind of file (a verification set, mostly) is called NAME.bin and would be lost.
    """
    if path.suffix != ".json" or path.name == "dataset.json":
        raise UserError(f"{path}: a subset manifest is NAME.json (and not dataset.json)")
    binary = path.with_suffix(".bin")
    if binary.exists():
        with open(binary, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(
                    f"{path}: {binary.name} beside it is not a subset's and would be lost; choose another name"
                )
    return binary


def write_subset(
    path: str | Path,
    dataset: ShardDataset,
    ids: np.ndarray,
    *,
    label_of: np.ndarray | None = None,
    criteria: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Path:
    """Writes `path` (.json) and its .bin.

    Args:
        ids: sample ids of `dataset`, any order, no duplicates. If it is a subset, what is written is a subset of the dataset that one is of.
        label_of: uint32 [num_classes of `dataset`]: new label of each identity (two may share one), `DROPPED` for those left out; by default the identities
            that have a sample are numbered in their old order.

    Raises:
        UserError: no samples, a duplicate or foreign id, a sample whose identity is dropped, labels with gaps, or what `check_target` refuses.
    """
    path = Path(path)
    binary = check_target(path)
    ids = np.sort(np.asarray(ids, dtype=np.uint64))
    if not len(ids) or int(ids[-1]) >= len(dataset) or (ids[1:] == ids[:-1]).any():
        raise UserError(f"{path}: a subset needs distinct sample ids in [0, {len(dataset)})")
    present = np.unique(dataset.labels(ids))
    if label_of is None:
        label_of = np.full(dataset.num_classes, DROPPED, dtype=np.uint32)
        label_of[present] = np.arange(len(present), dtype=np.uint32)
    label_of = np.asarray(label_of, dtype=np.uint32)
    used = np.unique(label_of[label_of != DROPPED])
    if (label_of[present] == DROPPED).any() or not np.array_equal(used, np.arange(len(used))):
        raise UserError(f"{path}: the label map drops an identity that has samples, or leaves gaps between labels")
    ids, label_of = dataset.in_whole(ids, label_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{binary}.tmp", "wb") as file:
        file.write(HEADER.pack(MAGIC, SCHEMA, len(used), len(label_of), len(ids)))
        file.write(label_of.tobytes())
        file.write(bytes(-len(label_of) * 4 % 8))  # ids start on a multiple of 8
        file.write(ids.tobytes())
        commit(file, binary)
    body = {
        "format": "lvtrain-subset",
        "schema": SCHEMA,
        "dataset": os.path.relpath(dataset.folder.resolve(), path.parent.resolve()),
        "dataset_fingerprint": dataset.manifest.fingerprint,
        "samples": len(ids),
        "num_classes": len(used),
        "binary": binary.name,
        "sha256": file_sha256(binary),
        "criteria": criteria or {},
        "seed": seed,
    }
    write_json(path, body, indent=1)
    return path


def _named(dataset: ShardDataset, names: Iterable[str]) -> np.ndarray:
    chosen = np.zeros(dataset.num_classes, dtype=bool)
    wanted = list(names)
    if wanted:
        number = {name: label for label, name in enumerate(dataset.label_names())}
        for name in wanted:
            if name not in number:
                raise UserError(f"identity {name!r} is not in {dataset.folder}/labels.txt; correct the list")
            chosen[number[name]] = True
    return chosen
