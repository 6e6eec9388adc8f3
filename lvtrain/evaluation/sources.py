"""Labelled images to embed: a dataset's shards, a subset manifest, or a folder with one folder per identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lvtrain.data.images import is_image_name
from lvtrain.errors import UserError
from lvtrain.evaluation.extract import Images


class ShardImages:
    """The encoded images of a `lvtrain.data.ShardDataset`, by sample id."""

    def __init__(self, path: Path) -> None:
        from lvtrain.data import ShardDataset

        self.dataset = ShardDataset(path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int, /) -> bytes:
        return self.dataset.read(position)[0]

    def labels(self) -> np.ndarray:
        return np.asarray(self.dataset.labels(np.arange(len(self.dataset))), dtype=np.int64)


def is_labelled_set(path: Path) -> bool:
    """Whether `labelled_images` reads it: a dataset folder, a subset manifest, or a folder with one folder an identity."""
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        return True
    return path.is_dir() and not (path / "meta").is_dir()


def labelled_images(path: str | Path) -> tuple[Images, np.ndarray]:
    """Images and their labels int64 [N].

    Args:
        path: folder with `dataset.json`, a subset manifest (.json), or a folder with one folder per identity.

    Raises:
        UserError: none of these, or no image in it.
    """
    path = Path(path)
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        shards = ShardImages(path)
        return shards, shards.labels()
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder; a labelled set is a dataset folder, a subset manifest, or a folder with one folder per identity"
        )
    files = sorted(file for file in path.glob("*/*") if is_image_name(file.name))
    if not files:
        raise UserError(f"{path} holds no images; IDENTITY/IMAGE.jpg is expected, or a dataset.json")
    numbers = {folder: label for label, folder in enumerate(sorted({file.parent for file in files}))}
    return files, np.array([numbers[file.parent] for file in files], dtype=np.int64)
