"""Metadata beside a dataset's shards with which Megatron Energon opens it; nothing else changes.

    .nv-meta/.info.json      samples of each shard
    .nv-meta/split.yaml      every shard is in `train`
    .nv-meta/dataset.yaml    samples are `ImageClassificationSample`s: `image` from .jpg, `label` from .cls
    shards/*.tar.idx         uint64 offsets of the samples in the tar, and of its end

The format is that of `energon prepare` of megatron-energon 7 (flavors/webdataset). It follows from `index.bin`, so no tar is read.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import yaml

from lvtrain.data.index import open_index, read_manifest
from lvtrain.errors import UserError
from lvtrain.files.atomic import write_bytes, write_json, write_text

FOLDER = ".nv-meta"
_SAMPLE = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "ImageClassificationSample"},
    "field_map": {"image": "jpg", "label": "cls"},
}


def write_energon(dataset: str | Path) -> Path:
    """Writes the metadata into the dataset folder `dataset`; its fingerprint stays.

    `dataset.yaml` and `split.yaml` that are there already are kept: somebody may have edited them.

    Returns:
        The folder `.nv-meta`.

    Raises:
        UserError: not a dataset folder of lvtrain, or a subset of one.
        OSError: it cannot be written.
    """
    dataset = Path(dataset)
    if dataset.suffix == ".json" and dataset.name != "dataset.json":
        raise UserError(f"{dataset} is a subset; Energon reads whole shards. Give the dataset's folder")
    manifest = read_manifest(dataset)
    index = open_index(dataset, manifest)
    shards = [shard for shard in manifest.shards if shard.samples]
    stops = np.cumsum([shard.samples for shard in shards])
    for shard, stop in zip(shards, stops.tolist()):
        records = index[stop - shard.samples : stop]
        write_bytes(dataset / f"{shard.name}.idx", _offsets(records).astype("<u8").tobytes())
    folder = dataset / FOLDER
    folder.mkdir(exist_ok=True)
    split = {"split_parts": {"train": [shard.name for shard in shards], "val": [], "test": []}, "exclude": []}
    for name, content in (("split.yaml", split), ("dataset.yaml", _SAMPLE)):
        if not (folder / name).exists():
            write_text(folder / name, yaml.safe_dump(content, sort_keys=False))
    # last: with this file Energon takes the folder for a dataset
    write_json(folder / ".info.json", {"shard_counts": {shard.name: shard.samples for shard in shards}}, indent=2)
    return folder


def _offsets(records: np.ndarray) -> np.ndarray:
    """Where the samples of a shard begin, and where the last one ends: a header of one block, the image, and the label in two blocks."""
    block = tarfile.BLOCKSIZE
    offset, length = records["offset"].astype(np.int64), records["length"].astype(np.int64)
    last = offset[-1] + -(-length[-1] // block) * block + 2 * block
    return np.append(offset - block, last)
