"""Generated identities on disk: a training dataset, a held-out dataset of other identities, and verification pairs of these.

An image depends on (seed, identity, image) only, and so does the order in the shards. The number of processes changes only
the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lvtrain import randomness
from lvtrain.data.index import IndexWriter, Manifest
from lvtrain.datasets.parallel import ordered_map
from lvtrain.datasets.shard_writer import ShardWriter
from lvtrain.datasets.synthetic.faces import DIFFICULTIES, Difficulty
from lvtrain.datasets.synthetic.render import render_face
from lvtrain.errors import UserError

FOLDS = 10
JPEG_QUALITY = 95
_SAMPLES_A_SHARD = 8192
_CHUNK = 64


@dataclass(frozen=True)
class GeneratedFaces:
    """What `write_faces` wrote: manifests of both dataset folders, and the encoded images of each held-out identity."""

    train: Manifest
    heldout: Manifest
    heldout_images: list[list[bytes]]


def encode_face(seed: int, identity: int, image: int, difficulty: Difficulty) -> bytes:
    """A generated face as JPEG: quality 95, 4:4:4, which is cv2's default at this quality."""
    ok, data = cv2.imencode(
        ".jpg", render_face(seed, identity, image, difficulty)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    if not ok:
        raise RuntimeError(f"cv2 could not encode identity {identity} image {image}")
    return data.tobytes()


def _encode_chunk(tasks: list[tuple[int, int]], seed: int, difficulty: Difficulty) -> list[bytes]:
    cv2.setNumThreads(1)  # one process a core is faster than threads inside 112 x 112 images
    return [encode_face(seed, identity, image, difficulty) for identity, image in tasks]


def _encoded(tasks: list[tuple[int, int]], seed: int, difficulty: Difficulty, workers: int) -> Iterator[bytes]:
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    encode = functools.partial(_encode_chunk, seed=seed, difficulty=difficulty)
    for images in ordered_map(encode, chunks, workers=workers):
        yield from images


def write_faces(
    folder: str | Path,
    *,
    identities: int,
    images: int,
    heldout: int,
    seed: int,
    difficulty: str = "normal",
    heldout_images: int | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedFaces:
    """Writes `folder/train` (identities 0 .. identities-1) and `folder/heldout` (the next `heldout` identities).

    Args:
        folder: holds both datasets.
        identities: for training.
        images: of each identity for training.
        heldout: identities that are not in the training set.
        seed: of every draw.
        difficulty: a name in `DIFFICULTIES`.
        heldout_images: of each held-out identity; None = `images`, but at least 2.
        workers: processes.
        progress: called with (images done, images in all).

    Raises:
        UserError: a count that is too small (a pair needs two images) or an unknown difficulty.
    """
    heldout_images = max(images, 2) if heldout_images is None else heldout_images
    if identities < 1 or images < 1 or heldout < 2 or heldout_images < 2:
        raise UserError(
            f"generated faces need at least 1 identity x 1 image, and 2 held out x 2 images for pairs; "
            f"got {identities} x {images} and {heldout} x {heldout_images}"
        )
    if difficulty not in DIFFICULTIES:
        raise UserError(f"unknown difficulty {difficulty!r}; choose one of {', '.join(DIFFICULTIES)}")
    folder = Path(folder)
    total = identities * images + heldout * heldout_images
    kept: list[list[bytes]] = [[b""] * heldout_images for _ in range(heldout)]
    manifests = []
    done = 0
    parts = (("train", 0, identities, images), ("heldout", identities, heldout, heldout_images))
    for name, first, count, each in parts:
        # shuffled, so that identities are mixed even for a reader that goes through the shards in order
        order = np.argsort(randomness.bits(seed, f"synthetic/order/{name}", np.arange(count * each)), kind="stable")
        tasks = [(first + int(sample) // each, int(sample) % each) for sample in order]
        encoded = _encoded(tasks, seed, DIFFICULTIES[difficulty], workers)
        writer = IndexWriter(folder / name)
        for number, start in enumerate(range(0, len(tasks), _SAMPLES_A_SHARD)):
            with ShardWriter(folder / name, f"shards/{number:06d}.tar") as shard:
                for identity, image in tasks[start : start + _SAMPLES_A_SHARD]:
                    data = next(encoded)
                    shard.add(f"{identity:07d}_{image:04d}", data, identity - first)
                    if name == "heldout":
                        kept[identity - first][image] = data
                    done += 1
                    if progress and done % _CHUNK == 0:
                        progress(done, total)
            written = shard.written
            writer.add_shard(
                written.name, written.size, written.sha256, written.offsets, written.lengths, written.labels
            )
        provenance = {
            "kind": "generated faces",
            "identities": [first, first + count],
            "images": each,
            "difficulty": {"name": difficulty, **DIFFICULTIES[difficulty].described()},
            "jpeg_quality": JPEG_QUALITY,
            "opencv": cv2.__version__,
        }
        names = [f"generated_{first + label:07d}" for label in range(count)]
        manifests.append(
            writer.close(names, provenance=provenance, seed=seed, licence="CC0-1.0 (generated, no person depicted)")
        )
    if progress:
        progress(done, total)
    return GeneratedFaces(manifests[0], manifests[1], kept)


def heldout_pairs(identities: int, images: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Verification pairs as insightface arranges them: 10 consecutive folds, each half genuine (first) and half impostor.

    Returns:
        int64 [pairs, 2, 2] of (identity, image), no pair twice; bool [pairs], True where both images show one identity.

    Raises:
        UserError: `pairs` is not a multiple of 20, or more than the images allow.
    """
    if pairs <= 0 or pairs % (2 * FOLDS):
        raise UserError(f"--pairs {pairs} must be a positive multiple of {2 * FOLDS}: ten folds, half of each genuine")
    half = pairs // 2
    first, second = np.triu_indices(images, k=1)
    genuine_all = identities * len(first)
    impostor_all = identities * (identities - 1) // 2 * images * images
    if half > genuine_all or half > impostor_all:
        raise UserError(
            f"--pairs {pairs} asks for {half} genuine pairs, {identities} held-out identities x {images} images have {genuine_all}"
        )
    pick = _distinct(genuine_all, half, seed, "synthetic/genuine")
    person, couple = pick // len(first), pick % len(first)
    genuine = np.stack([np.stack([person, first[couple]], -1), np.stack([person, second[couple]], -1)], axis=1)
    left, right = np.triu_indices(identities, k=1)
    pick = _distinct(impostor_all, half, seed, "synthetic/impostor")
    people, shots = pick // (images * images), pick % (images * images)
    impostor = np.stack(
        [np.stack([left[people], shots // images], -1), np.stack([right[people], shots % images], -1)], axis=1
    )
    a_fold = half // FOLDS
    both = np.concatenate([genuine.reshape(FOLDS, a_fold, 2, 2), impostor.reshape(FOLDS, a_fold, 2, 2)], axis=1)
    same = np.concatenate([np.ones((FOLDS, a_fold), bool), np.zeros((FOLDS, a_fold), bool)], axis=1)
    return both.reshape(pairs, 2, 2), same.reshape(pairs)


def _distinct(population: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """`count` different integers below `population`, in random order, in memory that grows with `count` only."""
    numbers = np.empty(0, dtype=np.int64)
    tries = 0
    while len(numbers) < count:
        draws = (randomness.uniform(seed, purpose, np.arange(tries, tries + 2 * count)) * population).astype(np.int64)
        tries += 2 * count
        joined = np.concatenate([numbers, draws])
        numbers = joined[np.sort(np.unique(joined, return_index=True)[1])]
    return numbers[:count]
