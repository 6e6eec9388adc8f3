"""Writes a dataset as RecordIO, or an `.idx` of some records of a `.rec`, for trainers that read only RecordIO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lvtrain import randomness
from lvtrain.data.subset import first_of_each
from lvtrain.datasets import recordio
from lvtrain.errors import UserError
from lvtrain.files.atomic import write_text

if TYPE_CHECKING:
    from lvtrain.data.shards import ShardDataset


def write_recordio(
    dataset: ShardDataset, path: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes a dataset in insightface's layout: header, images sorted by identity, identity records, and `property`.

    Image bytes are copied. With more than 2^24 records float32 would round the header, so the file then has im2rec's
    layout: only images, from key 0.

    Args:
        dataset: to write.
        path: `*.rec`.
        progress: called with (images written, images in all).

    Returns:
        Number of images.

    Raises:
        UserError: there are 2^24 identities or more, which float32 labels cannot distinguish.
    """
    path = Path(path)
    if path.suffix != ".rec":
        raise UserError(f"{path} must end in .rec; its .idx is written beside it")
    if dataset.num_classes > recordio.LARGEST_LABEL:
        raise UserError(
            f"{dataset.path} has {dataset.num_classes} identities; RecordIO labels end at {recordio.LARGEST_LABEL}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = dataset.labels(np.arange(len(dataset)))
    order = np.argsort(labels, kind="stable")
    count = len(order)
    flat = count + 1 + dataset.num_classes > recordio.LARGEST_LABEL
    with recordio.RecordWriter(path) as writer:
        if not flat:
            writer.write(0, recordio.pack_record([count + 1, count + 1 + dataset.num_classes]))
        for done, sample in enumerate(order.tolist(), start=1):
            data, label = dataset.read(sample)
            key = done - flat
            writer.write(key, recordio.pack_record(label, data, id=key))
            if progress and (done % 256 == 0 or done == count):
                progress(done, count)
        if not flat:
            edges = np.searchsorted(labels[order], np.arange(dataset.num_classes + 1)) + 1
            for label in range(dataset.num_classes):
                writer.write(count + 1 + label, recordio.pack_record([int(edges[label]), int(edges[label + 1])]))
    size = dataset.manifest.image_size or (112, 112)
    write_text(path.with_name("property"), f"{dataset.num_classes},{size[0]},{size[1]}\n{count}\n")
    return count


def filter_index(
    rec: str | Path,
    out: str | Path,
    *,
    identities: Iterable[int] | None = None,
    min_images: int = 1,
    shots: int | None = None,
    without_keys: Iterable[int] = (),
    seed: int = 0,
) -> tuple[int, int]:
    """Writes an `.idx` of some image records of a `.rec`, which does not change. Returns (images, identities).

    Header and identity records are left out, because DALI's `fn.readers.mxnet` cannot decode them. Labels do not change.

    Args:
        rec: the `.rec`.
        out: the `.idx` to write.
        identities: labels to choose from; None = all.
        min_images: identities with fewer images are left out (counted after `without_keys`).
        shots: images of each identity, at most.
        without_keys: records to leave out.
        seed: of the draw of the shots.

    Raises:
        UserError: the file has no such key or label or is damaged, nothing is left, or `out` is the file or its index.
    """
    rec, out = Path(rec), Path(out)
    if out.resolve() in (rec.resolve(), rec.with_suffix(".idx").resolve()):
        raise UserError(f"{out} is the .rec itself or its own index; write the choice under another name")
    found = recordio.catalogue(recordio.RecordFile(rec))
    keep = ~_named("record", without_keys, found.keys, rec)
    if identities is not None:
        keep &= _named("identity", identities, found.labels, rec)
    images = np.bincount(found.labels[keep], minlength=int(found.labels.max()) + 1)
    keep &= images[found.labels] >= min_images
    chosen = np.flatnonzero(keep)
    if shots is not None:
        draws = randomness.bits(seed, "recordio/shot", found.keys[chosen])
        chosen = chosen[first_of_each(found.labels[chosen], shots, draws)]
    if not len(chosen):
        raise UserError(f"nothing of {rec} is left by this choice; loosen the filters")
    recordio.write_index(out, found.keys[chosen].tolist(), found.offsets[chosen].tolist())
    return len(chosen), len(np.unique(found.labels[chosen]))


def _named(what: str, numbers: Iterable[int], among: np.ndarray, rec: Path) -> np.ndarray:
    wanted = np.fromiter(numbers, dtype=np.int64)
    unknown = np.setdiff1d(wanted, among)
    if len(unknown):
        raise UserError(
            f"{rec} has no {what} {unknown[0]} ({len(unknown)} of {len(wanted)} in the list are not in it); correct the list"
        )
    return np.isin(among, wanted)
