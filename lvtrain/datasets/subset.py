"""Choosing part of a dataset and writing it as a manifest (`lvtrain.data.subset`). No image is copied.

Choices are made by hashes of (seed, identity) and (seed, sample). So with one seed, 1% of the identities lie inside 10% of
them, and 1 shot lies inside 4.
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
from lvtrain.data.subset import DROPPED, HEADER, MAGIC, SCHEMA, first_of_each
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
    """Chooses samples. Returns their ids, int64, ascending.

    Args:
        dataset: whole, or already a subset (for example a few shots of a cleaned set).
        fraction: share of the identities that pass the filters, rounded up.
        shots: images of each identity, at most.
        min_images: identities with fewer are left out (counted before `shots`).
        identities: names (lines of labels.txt) to choose from; None = all.
        without_identities: names to leave out.
        without_samples: sample ids to leave out.
        seed: of the draws.

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
    count = math.ceil(round(fraction * len(candidates), 6))  # rounded, because 0.28 x 25 is 7.000000000000001
    chosen[candidates[drawn[:count]]] = True
    ids = np.flatnonzero(keep & chosen[labels])
    if shots is not None:
        ids = ids[first_of_each(labels[ids], shots, randomness.bits(seed, "subset/shot", ids))]
    if not len(ids):
        raise UserError(f"nothing of {dataset.folder} is left by this choice; loosen the filters")
    return ids


def check_target(path: Path) -> Path:
    """The .bin that belongs to a manifest to be written.

    Raises:
        UserError: the name is not NAME.json, or NAME.bin is another file (such as a verification set) and would be lost.
    """
    if path.suffix != ".json" or path.name == "dataset.json":
        raise UserError(f"{path}: a subset manifest is NAME.json (and not dataset.json)")
    binary = path.with_suffix(".bin")
    if binary.exists():
        with open(binary, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(
                    f"{path}: {binary.name} is not of a subset and would be overwritten; choose another name"
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
    """Writes a subset: `path` (.json) and its .bin.

    Args:
        path: NAME.json.
        dataset: what `ids` belong to. If it is a subset, the new one refers to the whole dataset, too.
        ids: sample ids of `dataset`, in any order, without duplicates.
        label_of: uint32 [num_classes of `dataset`], new label of each identity; two may share one. `DROPPED`: left out. By
            default the identities with a sample are numbered in their old order.
        criteria: how the samples were chosen, for the manifest.
        seed: the same.

    Raises:
        UserError: no samples, an id that is repeated or out of range, a sample whose identity is dropped, labels with
            gaps, or what `check_target` refuses.
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
