"""The embeddings of a folder or a dataset as files: a `.npy` of one row an image, a `.csv` that names the rows, a `.json` about the model.

    OUT.npy    float32 [N, d], rows of unit length; zeros where the image could not be embedded
    OUT.csv    row,name,identity,error: N lines in the order of the rows; `error` is empty, or says why the row is zeros
    OUT.json   `space` (of the embeddings, `lvtrain.weights.space`), `shape`, `model`, `mirror`, `aligned` (on request, by the detector)

`name` is a path relative to the folder, or a sample's key; `identity` the folder below the top, or the dataset's name of the label.
Row i of a dataset is sample id i, so `tools/clean_dataset.py --embeddings OUT.npy` takes the file.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data.folders import is_hidden, natural_key
from lvtrain.data.images import is_image_name
from lvtrain.data.shards import ShardDataset
from lvtrain.errors import UserError
from lvtrain.evaluation.embeddings import write_facts
from lvtrain.files.atomic import commit, write_bytes
from lvtrain.weights import Model
from lvtrain.weights.faces import Faces

_AT_ONCE = 16  # batches between two reports of progress


@dataclass(frozen=True)
class Listing:
    """What is embedded.

    Attributes:
        images: paths, or encoded images, by row.
        name: of a row.
        identity: of a row; empty where none is known.
        left_out: files of the folder that are not images by their suffix, or lie in hidden folders.
        source: where they are from.
    """

    images: Sequence[Any]
    name: Callable[[int], str]
    identity: Callable[[int], str]
    source: Path
    left_out: int = 0


@dataclass(frozen=True)
class Embedded:
    """What was written: `errors` by row."""

    rows: int
    embedding_dim: int
    errors: dict[int, str]
    names: Path


class _Samples(Sequence[bytes]):
    """The encoded images of a dataset."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: Any) -> Any:
        return self._dataset.read(sample)[0]


class _Tolerant:
    """Faces by position; one that cannot be read is black, and its reason is noted."""

    def __init__(self, faces: Faces, rows: range, side: int, errors: dict[int, str]) -> None:
        self._faces, self._rows, self._side, self._errors = faces, rows, side, errors

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int, /) -> np.ndarray:
        row = self._rows[position]
        try:
            return self._faces[row]
        except UserError as error:
            self._errors[row] = str(error)
            return np.zeros((self._side, self._side, 3), dtype=np.uint8)


def list_images(source: str | Path) -> Listing:
    """The images of a dataset, a subset manifest (.json), or of a folder at any depth, in natural order.

    Raises:
        UserError: none of these, or no image in it.
    """
    source = Path(source)
    if source.suffix == ".json" or (source / "dataset.json").is_file():
        return _of_dataset(source)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a folder of images, a dataset, or a subset manifest (.json)")
    found, left_out = _walk(source)
    if not found:
        raise UserError(f"{source} holds no image by its suffix; {left_out} other files were found")

    def identity(row: int) -> str:
        return found[row].split("/")[0] if "/" in found[row] else ""

    return Listing([source / name for name in found], found.__getitem__, identity, source, left_out)


def embed_images(
    model: Model,
    listing: Listing,
    out: str | Path,
    *,
    space: str,
    batch: int = 64,
    mirror: bool = False,
    align: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Embedded:
    """Writes `out` (.npy), with the .csv and .json beside it, whole or not at all, in memory that does not grow with the number of images.

    Args:
        model: see `Model.embed`, also for `batch`, `mirror` and `align`.
        listing: what is embedded.
        out: path of the .npy file.
        space: identifier of the model's embedding space, by `space_of`.
        batch: images a forward call.
        mirror: add the embedding of the mirrored image before normalising.
        align: find and align the largest face of each photograph.
        overwrite: replace files that are there.
        progress: called with the number of rows done.

    Raises:
        UserError: `out` is there or is not a .npy, no image can be embedded, or the model gives NaN.
        OSError: it cannot be written, or a disk fails.
    """
    out = Path(out)
    names = check_out(out, listing.source, overwrite=overwrite)
    count, step = len(listing.images), _AT_ONCE * batch
    faces = Faces(listing.images, model.image_size, align=align)
    errors: dict[int, str] = {}
    beside = out.with_name(f".{out.name}.new")
    try:
        rows = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=(count, model.embedding_dim))
        for start in range(0, count, step):
            part = range(start, min(start + step, count))
            rows[part.start : part.stop] = model.embed(
                _Tolerant(faces, part, model.image_size, errors), batch=batch, mirror=mirror
            )
            progress(part.stop)
        if len(errors) == count:
            raise UserError(f"none of the {count} images can be embedded; the first: {errors[0]}")
        rows[sorted(errors)] = 0.0
        rows.flush()
        del rows
        write_bytes(names, _table(listing, errors))
        shape = (count, model.embedding_dim)
        write_facts(out, shape, space=space, model=model.name, mirror=mirror, aligned=align)
        commit(open(beside, "r+b"), out)  # noqa: SIM115  (closed by commit)
    finally:
        beside.unlink(missing_ok=True)
    return Embedded(count, model.embedding_dim, errors, names)


def check_out(out: Path, source: Path, *, overwrite: bool) -> Path:
    """Where the names go: beside `out`. `source` is what is embedded, which is never replaced.

    Raises:
        UserError: `out` is not a .npy, or one of the three files is there and must not be replaced.
    """
    if out.suffix != ".npy":
        raise UserError(f"{out} does not end with .npy; the embeddings are saved as numpy.save would")
    names = out.with_suffix(".csv")
    for path in (out, names, out.with_suffix(".json")):
        if path.resolve() == source.resolve():
            raise UserError(f"{out} would replace {source}, which is embedded; choose another name")
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already; choose another name, or replace it with --overwrite")
    return names


def _of_dataset(source: Path) -> Listing:
    dataset = ShardDataset(source)
    identities = dataset.label_names()

    def identity(row: int) -> str:
        return identities[int(dataset.labels(np.array([row]))[0])]

    return Listing(_Samples(dataset), lambda row: dataset.describe(row)[1], identity, source)


def _walk(root: Path) -> tuple[list[str], int]:
    """Relative paths of the images below `root`, and the number of other files."""
    found: list[str] = []
    left_out = 0

    def fail(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=fail):
        hidden = [name for name in below if is_hidden(name)]
        left_out += sum(len(inside) for name in hidden for *_, inside in os.walk(os.path.join(folder, name)))
        below[:] = sorted((name for name in below if not is_hidden(name)), key=natural_key)
        images = sorted((name for name in files if is_image_name(name)), key=natural_key)
        left_out += len(files) - len(images)
        found += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in images]
    return found, left_out


def _table(listing: Listing, errors: dict[int, str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "name", "identity", "error"])
    for row in range(len(listing.images)):
        writer.writerow([row, listing.name(row), listing.identity(row), errors.get(row, "")])
    # a name that is not UTF-8 is written with its bytes as \xNN
    return text.getvalue().encode(errors="surrogateescape").decode(errors="backslashreplace").encode()
