"""A small real dataset folder of textured JPEGs, for tests of the data room."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from lvtrain.data.index import IndexWriter
from lvtrain.datasets.shard_writer import ShardWriter


def jpeg(number: int, size: tuple[int, int] = (112, 112)) -> bytes:
    """A different image for every number."""
    rng = np.random.default_rng(number)
    blocks = Image.fromarray(rng.integers(0, 255, (9, 9, 3)).astype(np.uint8)).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    noisy = np.asarray(blocks).astype(int) + rng.normal(0, 5, (*size, 1))
    out = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_dataset(
    folder: Path,
    samples: int = 41,
    classes: int = 5,
    shards: int = 3,
    size: tuple[int, int] = (112, 112),
    replaced: dict[int, bytes] | None = None,
) -> Path:
    """`samples` images of `classes` identities in id order; `replaced` are stored instead of the images of those ids."""
    writer = IndexWriter(folder)
    for number, part in enumerate(np.array_split(np.arange(samples), shards)):
        with ShardWriter(folder, f"shards/{number:06d}.tar") as shard:
            for sample in part.tolist():
                shard.add(
                    f"{sample:09d}", (replaced or {}).get(sample) or jpeg(sample, size), sample * classes // samples
                )
        written = shard.written
        writer.add_shard(written.name, written.size, written.sha256, written.offsets, written.lengths, written.labels)
    writer.close([f"person_{label}" for label in range(classes)], seed=0, image_size=size)
    return folder
