"""What frozen networks know of generated faces: the generator's numbers, and where a Part fViT looks.

    python -m tools.studies.probe data/album/heldout RUN [RUN ...] --labelled data/album_landmarks/train

For each run, on the images of a generated dataset:

- accuracy on the verification pairs beside the dataset, with the embeddings as they are, and after LDA on the labelled
  dataset. If only LDA raises it, the embeddings hold the identity and give it too little weight.
- R² of a ridge regression from the embedding to each number of the generator, on identities that were not fitted.
- accuracy when each image's position embeddings are shuffled, and of an fViT when it sees only the inner cells of its
  grid. What is lost is what the network owes to the order of its patches, or to the outer ones.
- for a Part fViT, where its landmarks lie, which pixels its patches show, and accuracy with the landmarks at their mean
  places in every image.

The rows "colours" are no networks: the mean colour of each cell of the grid, of its inner cells, of the patches at the
landmarks, and of these without their order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from lvtrain.backbones.fvit import FViT
from lvtrain.backbones.landmarks.patches import grid_landmarks, sample_patches
from lvtrain.backbones.part_fvit import PartFViT
from lvtrain.data import ShardDataset
from lvtrain.data.index import read_manifest
from lvtrain.datasets.synthetic.faces import DIFFICULTIES, identity_numbers, image_numbers
from lvtrain.datasets.synthetic.render import render_face
from lvtrain.errors import UserError, one_line_errors
from lvtrain.evaluation.bins import read_bin
from lvtrain.evaluation.verification import squared_distances, ten_fold
from lvtrain.weights import load_model
from lvtrain.weights.extract import decode, normalise

IDENTITY = ("skin tone", "skin hue", "hair colour", "hair shade", "hair length", "hair volume", "hair line", "beard",
            "face width", "jaw", "eye distance", "mouth width")  # fmt: skip
POSE = ("yaw", "pitch", "roll", "scale", "dx", "dy")
CAMERA = ("warmth", "exposure", "contrast", "tint", "blur")
PLACES = 200  # images whose pixels are told apart, by rendering each three times


def images_of(encoded: list[bytes], size: int) -> torch.Tensor:
    """Float `[N, 3, size, size]`, as networks take them."""
    pixels = np.stack([decode(image, size) for image in encoded])
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def embed(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> np.ndarray:
    """Of the image and its mirror, added, as verification does: float `[N, d]`."""
    with torch.inference_mode():
        rows = [network(part) + network(part.flip(3)) for part in images.split(128)]
    return torch.cat(rows).double().numpy()


def at(network: FViT, images: torch.Tensor, points: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Embeddings from patches around points `[B or 1, R, 2]` with position embeddings `[R]` or `[B, R]`."""
    patches = sample_patches(images, points.expand(len(images), -1, -1), network.patch)
    embedded = network.pos_embedding[0, 1:][positions]
    output: torch.Tensor = network.encode(patches, embedded if embedded.ndim == 3 else embedded[None])
    return output


def places(network: PartFViT, images: torch.Tensor) -> torch.Tensor:
    """The landmark CNN's points `[N, R, 2]`."""
    with torch.inference_mode():
        return torch.cat([network.predict_landmarks(part) for part in images.split(128)])


def colours(images: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Mean colours of the patches around points `[N or 1, R, 2]`: `[N, R * 3]`."""
    patches = sample_patches(images, points.expand(len(images), -1, -1))
    return patches.unflatten(2, (-1, 3)).mean(2).flatten(1).double().numpy()


def unordered(rows: np.ndarray) -> np.ndarray:
    """Patch colours without their order: along 13 directions of colour, the sorted values."""
    directions = np.array([(a, b, c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)][14:], dtype=float)
    values = rows.reshape(len(rows), -1, 3) @ directions.T
    return np.sort(values, axis=1)[:, ::4].reshape(len(rows), -1)


def accuracy(rows: np.ndarray, same: np.ndarray) -> float:
    """Ten-fold accuracy in percent of pairs (2i, 2i + 1)."""
    return round(100 * ten_fold(squared_distances(rows[::2], rows[1::2]), same).accuracy, 2)


def known(rows: np.ndarray, numbers: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """R² of each number, on the last 30% of the identities."""
    new = labels >= 0.7 * labels.max()
    scaled = StandardScaler().fit(rows[~new]).transform(rows)
    found = {name: Ridge(1.0).fit(scaled[~new], y[~new]).score(scaled[new], y[new]) for name, y in numbers.items()}
    return {name: round(float(value), 2) for name, value in found.items()}


def follows(points: torch.Tensor, numbers: list[np.ndarray], labels: np.ndarray) -> float:
    """R² of all landmarks' places from some numbers (random forest), on the last 30% of the identities."""
    x, y, new = np.stack(numbers, 1), points.flatten(1).double().numpy(), labels >= 0.7 * labels.max()
    forest = RandomForestRegressor(60, min_samples_leaf=5, random_state=0).fit(x[~new], y[~new])
    return round(r2_score(y[new], forest.predict(x[new]), multioutput="variance_weighted"), 2)


def regions(seed: int, faces: list[tuple[int, int]], difficulty: str, size: int) -> torch.Tensor:
    """Shares `[N, 2, size, size]` of hair and of skin in each pixel: what changes with hair colour and with skin tone."""
    chosen, found = DIFFICULTIES[difficulty], []
    for identity, image in faces:
        who = identity_numbers(seed, identity, chosen)
        changes = [None, *({name: (who[name] + 0.5) % 1} for name in ("hair colour", "skin tone"))]
        drawn = [render_face(seed, identity, image, chosen, changed=change).astype(float) for change in changes]
        found.append(np.stack([np.abs(other - drawn[0]).max(2) > 24 for other in drawn[1:]]))
    masks = torch.from_numpy(np.stack(found)).float()
    masks[:, 1] *= 1 - masks[:, 0]
    return torch.nn.functional.interpolate(masks, (size, size), mode="area")


def seen(masks: torch.Tensor, points: torch.Tensor) -> dict[str, float]:
    """What patches of 8 around points `[N, R, 2]` show: shares of their pixels, and how much of the hair is in any of them."""
    size = masks.shape[-1]
    shares = sample_patches(torch.cat([masks, 0 * masks[:, :1]], 1), points).unflatten(2, (-1, 3)).mean((0, 1, 2))
    pixel = torch.arange(size, dtype=torch.float32)
    near = ((pixel - points[..., None]).abs() <= 4).float()  # [N, R, 2, size]
    covered = torch.einsum("nrx,nry->nyx", near[:, :, 0], near[:, :, 1]) > 0
    hair = float((masks[:, 0] * covered).sum() / masks[:, 0].sum())
    values = {"hair": float(shares[0]), "skin": float(shares[1]), "rest": float(1 - shares.sum()), "of all hair": hair}
    return {name: round(value, 3) for name, value in values.items()}


def probe(data: Path, runs: list[Path], labelled: Path) -> dict[str, Any]:
    """All figures as JSON values."""
    models: dict[str, Any] = {run.name: load_model(run).backbone for run in runs}
    if any(not isinstance(network, FViT) for network in models.values()):
        raise UserError("the probe takes fvit and part_fvit networks only")
    if len({network.image_size for network in models.values()}) > 1:
        raise UserError("the networks take images of different sizes; probe them one by one")
    size = next(iter(models.values())).image_size
    dataset, manifest, others = ShardDataset(data), read_manifest(data), ShardDataset(labelled)
    ids = np.arange(len(dataset))
    images = images_of([dataset.read(int(i))[0] for i in ids], size)
    keys = [dataset.describe(int(i))[1].removesuffix(".jpg").split("_") for i in ids]
    faces = [(int(key[-2]), int(key[-1])) for key in keys]
    difficulty, labels = manifest.provenance["difficulty"]["name"], np.asarray(dataset.labels(ids))
    seed = manifest.seed or 0
    drawn = [identity_numbers(seed, who, DIFFICULTIES[difficulty]) for who, _ in faces]
    camera = [image_numbers(seed, who, image, DIFFICULTIES[difficulty]) for who, image in faces]
    numbers = {name: np.array([row[name] for row in drawn]) for name in IDENTITY}
    numbers |= {name: np.array([row[name] for row in camera]) for name in (*POSE, *CAMERA)}
    encoded, same = read_bin(data.with_suffix(".bin"))
    pairs = images_of(encoded, size)
    teaching = images_of([others.read(i)[0] for i in range(len(others))], size)
    classes = np.asarray(others.labels(np.arange(len(others))))

    def both(features: Any) -> dict[str, Any]:
        of_pairs, of_classes = features(pairs), features(teaching)
        fitted = StandardScaler().fit(of_classes)
        lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.01).fit(fitted.transform(of_classes), classes)
        # within an identity all directions have the same spread after LDA
        return {
            "accuracy": accuracy(of_pairs, same),
            "accuracy after LDA": accuracy(lda.transform(fitted.transform(of_pairs)), same),
            "R2": known(features(images), numbers, labels),
        }

    grid = grid_landmarks(size // 8)
    is_inner = ((grid - (size - 1) / 2).abs() < 0.35 * size).all(1)  # without the outermost ring
    found: dict[str, Any] = {}
    masks = regions(seed, faces[:PLACES], difficulty, size)
    draws = torch.Generator().manual_seed(0)
    every = torch.arange(len(grid))

    def measure(name: str, network: FViT) -> None:
        is_part = isinstance(network, PartFViT)
        found[name] = both(lambda x: embed(network, x))

        def shuffled(x: torch.Tensor) -> torch.Tensor:
            points = network.predict_landmarks(x) if isinstance(network, PartFViT) else grid[None]
            return at(network, x, points, torch.rand(len(x), len(grid), generator=draws).argsort(1))

        found[name]["accuracy, positions shuffled"] = accuracy(embed(shuffled, pairs), same)
        if not is_part:
            kept = every[is_inner]
            rows = embed(lambda x: at(network, x, grid[None, kept], kept), pairs)
            found[name]["accuracy, inner cells only"] = accuracy(rows, same)

    def measure_landmarks(name: str, network: PartFViT) -> None:
        points = places(network, images)
        mean = points.mean(0)
        rows = embed(lambda x: at(network, x, mean[None], every), pairs)
        found[name] |= {
            "accuracy, landmarks at their mean places": accuracy(rows, same),
            "landmarks": {
                "mean place": [[round(value, 1) for value in place] for place in mean.tolist()],
                "spread between images, pixels": round(float(points.std(0).mean()), 2),
                "mean distance to the grid's point, pixels": round(float((mean - grid).norm(dim=1).mean()), 2),
                "R2 of their places": {
                    "from pose": follows(points, [numbers[number] for number in POSE], labels),
                    "from identity": follows(points, [numbers[number] for number in IDENTITY], labels),
                },
                "patches show": seen(masks, points[:PLACES]),
            },
        }
        found[f"colours at landmarks of {name}"] = both(lambda x: colours(x, places(network, x)))
        found[f"colours at landmarks, unordered, of {name}"] = both(lambda x: unordered(colours(x, places(network, x))))

    for name, network in models.items():
        measure(name, network)
        if isinstance(network, PartFViT):
            measure_landmarks(name, network)
    found["colours of the grid"] = both(lambda x: colours(x, grid[None]))
    found["colours of the grid, unordered"] = both(lambda x: unordered(colours(x, grid[None])))
    found["colours of its inner cells"] = both(lambda x: colours(x, grid[None, is_inner]))
    found["grid"] = {"patches show": seen(masks, grid.expand(len(masks), -1, -1))}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a generated dataset; DATA.bin beside it holds its pairs")
    parser.add_argument("runs", type=Path, nargs="+", help="runs or exported folders")
    parser.add_argument("--labelled", type=Path, required=True, help="a generated dataset of other identities, for LDA")
    parser.add_argument("--out", type=Path, help="JSON file; default: print")
    options = parser.parse_args(arguments)
    with one_line_errors("probe"):
        text = json.dumps(probe(options.data, options.runs, options.labelled), indent=1)
        if options.out:
            options.out.write_text(text + "\n")
        else:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
