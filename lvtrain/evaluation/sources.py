"""Labelled images to embed: a dataset's shards, a subset manifest, or a folder with one folder per identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lvtrain.data import ShardDataset
from lvtrain.data.folders import walk_identities
from lvtrain.errors import UserError
from lvtrain.weights.extract import Forward, Images, Setting


class ShardImages:
    """The encoded images of a dataset, or of the sample `ids` [k] of it."""

    def __init__(self, dataset: ShardDataset, ids: np.ndarray | None = None) -> None:
        self.dataset = dataset
        self.ids = np.arange(len(dataset)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int, /) -> bytes:
        return self.dataset.read(int(self.ids[position]))[0]

    def labels(self) -> np.ndarray:
        """int64 [k]."""
        return np.asarray(self.dataset.labels(self.ids), dtype=np.int64)


def is_labelled_set(path: Path) -> bool:
    """Whether `labelled_images` reads it: a dataset folder, a subset manifest, or a folder with one folder per identity."""
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
        shards = ShardImages(ShardDataset(path))
        return shards, shards.labels()
    found = [(entry.path, entry.identity) for entry in walk_identities(path) if entry.path and not entry.reason]
    if not found:
        raise UserError(f"{path} holds no images; IDENTITY/IMAGE.jpg is expected, or a dataset.json")
    files = sorted(path / str(image) for image, _ in found)
    number = {name: label for label, name in enumerate(sorted({str(identity) for _, identity in found}))}
    return files, np.array([number[file.relative_to(path).parts[0]] for file in files], dtype=np.int64)


def identity_names(path: str | Path) -> list[str]:
    """The names of the identities of a labelled set, by label.

    Raises:
        UserError: as `labelled_images`.
    """
    path = Path(path)
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        dataset = ShardDataset(path)
        return dataset.label_names() or [str(label) for label in range(dataset.num_classes)]
    return sorted({str(entry.identity) for entry in walk_identities(path) if entry.path and not entry.reason})


def embed_labelled(forward: Forward, path: Path, setting: Setting, *, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float32 [N, d] of a labelled set, and its labels int64 [N]. A collective.

    Raises:
        UserError: as `labelled_images`, or an image that cannot be decoded.
    """
    images, labels = labelled_images(path)
    return embed_kept(forward, images, path, setting, mirror=mirror), labels


def embed_kept(forward: Forward, images: Images, path: Path, setting: Setting, *, mirror: bool) -> np.ndarray:
    """`Setting.embed` of all images at `path`, read-only. A collective.

    Where the setting keeps embeddings, the next protocol on the same path gets the same array.
    """
    key = (path.resolve(), mirror)
    if setting.kept is not None and key in setting.kept:
        return setting.kept[key]
    if setting.kept is not None:
        setting.kept.clear()  # before the next set is embedded: one set's embeddings are in memory
    embeddings = setting.embed(forward, images, mirror=mirror)
    embeddings.setflags(write=False)
    if setting.kept is not None:
        setting.kept[key] = embeddings
    return embeddings
